"""What a run will need, without running it: parameters, memory, disk, steps, evaluations. Times only where measured."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import psutil
import torch
from transformers import AutoConfig, TrainingArguments

from lcia.backbone import Backbone, fit_demonstrations
from lcia.backbone.reader import ImageReader
from lcia.config import RunConfig
from lcia.errors import UserError
from lcia.init_stage import check_init, init_config
from lcia.machine import give_back_freed_memory
from lcia.methods import PGP, Combined, ContinualLLaVA, EProj, Method, build_method
from lcia.planning.counting import FP32, Disk, Evaluations, count_disk, count_evaluations, optimizer_steps
from lcia.planning.draws import draw
from lcia.planning.lengths import Lengths
from lcia.planning.live import Bytes
from lcia.planning.outline import depth_of, outline, place
from lcia.planning.parts import BASE, BUCKETS, GATHERED, METHOD, OPTIMIZER, PARTS, SHARDED
from lcia.planning.rehearsal import Batches, Drawn, Rehearsal, StageRehearsed, arguments_of, deeper, rehearse
from lcia.planning.timing import Measured, measure_steps
from lcia.progress import Reporter
from lcia.results import method_name
from lcia.session import check_lengths, check_target_modules, load_run_stream
from lcia.stream import Row, Stream, Task

if TYPE_CHECKING:
    from rich.console import RenderableType

GIB = 2**30
_DEPTHS = (1, 2)  # layers of the real models that are measured where a rehearsal is not possible
# What depends on numbers, which a rehearsal does not have.
_UNKNOWN: dict[type[Method], str] = {
    EProj: "eproj groups tasks by what the vision tower says of their images: counted is a projector per task",
    PGP: "pgp keeps bases of what earlier tasks read, whose size depends on the rows: counted as empty",
}
_REHEARSED = "rehearsed: the run's own code on tensors without numbers, every tensor counted while it lives"
_SEVERAL = (
    "what several devices hold is computed from what one holds, not rehearsed: DDP adds a copy of the gradients; FSDP2 "
    "shares out weights, gradients and states evenly, and has two layers, and what is in no layer, whole. Answers are "
    "given with whole weights under both"
)


@dataclass(frozen=True)
class TaskPlan:
    """One task of the stream."""

    name: str
    train_rows: int  # trained on
    left_out: int  # training rows that do not fit
    tokens: int  # of those trained on, once
    longest: int  # of them
    image_rows: int  # of them
    eval_rows: int
    adapter: str | None
    similarity: float | None  # to the most similar group, where the method groups


@dataclass(frozen=True)
class StagePlan:
    """What is learned at once."""

    tasks: tuple[str, ...]
    adapter: str
    is_new: bool
    rows: int  # an epoch's: those of the tasks, and what the method adds
    steps: int
    tokens: int  # trained on in all steps, on all devices, padding not counted


@dataclass(frozen=True)
class Moment:
    """The tensors of one device when they are most, by part, in bytes."""

    parts: Bytes
    peak: int

    @classmethod
    def of(cls, parts: Bytes) -> Moment:
        return cls({part: parts[part] for part in PARTS if part in parts}, sum(parts.values()))


@dataclass(frozen=True)
class Batch:
    """The one with most tokens, padded ones included."""

    task: str
    rows: int
    longest: int  # tokens of prompt and answer; of a batch to be answered, of the prompt
    tokens: int  # padded ones included


@dataclass(frozen=True)
class Devices:
    """Data parallel over several GPUs: what each of them holds."""

    gpus: int
    ddp: Moment  # the base is there on every one
    fsdp2: Moment | None  # weights, gradients and states are shared out; None: it would be refused


@dataclass(frozen=True)
class InitPlan:
    """The Init stage: tasks learned at once before the stream, their adapter merged into the base."""

    tasks: tuple[TaskPlan, ...]
    stage: StagePlan
    flops: int  # floating-point operations of all its training
    train_batch: Batch
    training: Moment
    devices: Devices | None
    exchanging: Moment  # the merged base is loaded while the old one is still there


@dataclass(frozen=True)
class Plan:
    """A run in numbers; `as_dict()` is plain JSON, and rich can print it."""

    method: str
    model: str
    stream: str
    device: str  # cpu | cuda
    how: str  # the memory was found
    base_parameters: dict[str, int]  # dtype → numbers
    base_bytes: int
    lora: int  # trained numbers of one adapter, without its projector
    projector: int
    adapters: dict[str, tuple[str, ...]]  # at the end of the stream: adapter → its tasks
    training: Moment | None  # the longest micro-batch; None: nothing is trained
    gradients: int  # bytes of all of them: they come as activations go
    closing: Moment | None  # while a task is closed
    evaluating: Moment
    train_batch: Batch | None
    eval_batch: Batch
    devices: Devices | None  # while training
    libraries: int | None  # bytes of a process on a CPU beside its tensors: of this one, measured; None: on a GPU
    init: InitPlan | None
    memory_gib: float | None  # of one device, as asked
    fits: bool | None
    disk: Disk
    tasks: tuple[TaskPlan, ...]
    stages: tuple[StagePlan, ...]
    evaluations: Evaluations
    flops: int | None  # floating-point operations of all training, on all devices; None: nothing is trained
    tflops: float | None  # 10¹² of them a second on each device, as asked
    measured: Measured | None
    notes: tuple[str, ...]

    @property
    def steps(self) -> int:
        """The Init stage's are among them."""
        return sum(stage.steps for stage in self.stages) + (self.init.stage.steps if self.init else 0)

    @property
    def peak(self) -> int:
        """Bytes of tensors on one device; of several, under DDP."""
        moments = [self.training, self.closing, self.evaluating, self.devices.ddp if self.devices else None]
        if self.init is not None:
            moments += [self.init.training, self.init.exchanging, self.init.devices.ddp if self.init.devices else None]
        return max(moment.peak for moment in moments if moment is not None)

    @property
    def needed(self) -> int:
        """Bytes that must be there: of one GPU the tensors, of a CPU's memory the libraries, code and data too."""
        return self.peak + (self.libraries or 0)

    @property
    def training_s(self) -> float | None:
        """At the rate that was measured, or asked; evaluation is not in it."""
        if self.measured is not None:
            return self.steps * self.measured.seconds_per_step
        if self.tflops is None or self.flops is None:
            return None
        return self.flops / (self.tflops * 1e12 * (self.devices.gpus if self.devices else 1))

    def as_dict(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "steps": self.steps,
            "peak": self.peak,
            "needed": self.needed,
            "training_s": self.training_s,
        }

    def __rich__(self) -> RenderableType:
        from lcia.planning.table import render

        return render(self)


def plan_run(
    config: RunConfig,
    reporter: Reporter,
    gpus: int | None = None,
    memory_gib: float | None = None,
    measure: int = 0,
    tflops: float | None = None,
) -> Plan:
    """Plan what `lcia train` would do; nothing is written, and no weights are read but by `measure`.

    Args:
        gpus: so many of them, each with the batch size of the configuration; None: this machine.
        memory_gib: of one device, to be compared with.
        measure: real optimizer steps to be timed on this machine; 0: no time is given.
        tflops: 10¹² floating-point operations a second that each device is taken to make, to give a time.

    Raises:
        UserError: configuration, data or model that `lcia train` would refuse, or options that exclude each other.
    """
    if measure and gpus is not None:
        raise UserError("plan: --measure times this machine; leave out --gpus")
    if measure and tflops is not None:
        raise UserError("plan: --measure and --tflops are two ways to a time; give one of them")
    device = "cuda" if gpus is not None or torch.cuda.is_available() else "cpu"
    init = _init(config, device, gpus, reporter)
    backbone = outline(config, device)
    check_target_modules(backbone, config.lora_target_modules)
    stream = _stream(config, backbone, reporter)
    rows = _Rows(config, backbone)
    rows.count([row for task in stream for row in (*task.train, *_answered(task, config))], reporter)
    method = build_method(config.method_parts())
    test, eval_batch = _longest_answered(stream, rows, backbone, config)
    weights = _weights(backbone)
    batches = _batches(stream, rows, test, config, gpus or 1)
    found, how = _rehearsed(config, backbone, stream, batches, rows, device, gpus or 1, reporter)
    libraries = _resident() if device == "cpu" else None

    stages = _stages(found, config, gpus or 1, rows)
    training = Moment.of(found.training) if found.training else None
    measured = None
    if measure and stages:
        task = next(task for task in stream if task.name == stages[0].tasks[0])
        reporter.start(f"{measure} steps of {task.name}", total=None)
        measured = measure_steps(config, task, [row for row in task.train if rows.fits(row)], measure)
    changes = any(stage.placement.beneath for stage in found.stages) or any(
        isinstance(leaf, ContinualLLaVA) for leaf in method.leaves()
    )
    plan = Plan(
        method=method_name(config),
        model=config.model,
        stream=stream.name,
        device=device,
        how=how,
        base_parameters=weights.numbers,
        base_bytes=weights.all,
        lora=found.trained - found.projector,
        projector=found.projector,
        adapters={
            adapter: tuple(task for stage in stages if stage.adapter == adapter for task in stage.tasks)
            for adapter in found.adapters
        },
        training=training,
        gradients=FP32 * found.trained,
        closing=Moment.of(found.closing) if found.closing else None,
        evaluating=Moment.of(_evaluating(found, config)),
        train_batch=_longest(found, rows),
        eval_batch=eval_batch,
        devices=_devices(gpus, found, method, weights, config),
        libraries=libraries,
        init=None if init is None else init.plan,
        memory_gib=memory_gib,
        fits=None,
        disk=_disk(found, stages, config, weights, init),
        tasks=tuple(_task(task, found, rows, len(_answered(task, config))) for task in stream),
        stages=stages,
        evaluations=count_evaluations([task.name for task in stream], found.stages, changes),
        flops=_flops(found, stages, config, gpus or 1) + (0 if init is None else init.plan.flops) if stages else None,
        tflops=tflops,
        measured=measured,
        notes=tuple(_notes(config, method, stream, rows, gpus)),
    )
    return plan if memory_gib is None else replace(plan, fits=plan.needed <= memory_gib * GIB)


@dataclass(frozen=True)
class _Init:
    plan: InitPlan
    found: Rehearsal


def _init(config: RunConfig, device: str, gpus: int | None, reporter: Reporter) -> _Init | None:
    """The Init stage, which is a run of its own on other tasks; None where the configuration has none."""
    if config.init_stream is None:
        return None
    own = init_config(config)
    backbone = outline(own, device)
    check_target_modules(backbone, own.lora_target_modules)
    stream = _stream(own, backbone, reporter, measured=False)
    check_init(stream, own, backbone, reporter)
    rows = _Rows(own, backbone)
    rows.count([row for task in stream for row in task.train], reporter)
    weights = _weights(backbone)
    method = build_method(own.method_parts())
    batches = _batches(stream, rows, (), own, gpus or 1)
    found, _ = _rehearsed(own, backbone, stream, batches, rows, device, gpus or 1, reporter)
    stages, longest = _stages(found, own, gpus or 1, rows), _longest(found, rows)
    assert longest is not None  # of a stream without tasks, which is refused before
    plan = InitPlan(
        tasks=tuple(_task(task, found, rows, eval_rows=0) for task in stream),
        stage=stages[0],
        flops=_flops(found, stages, own, gpus or 1),
        train_batch=longest,
        training=Moment.of(found.training),
        devices=_devices(gpus, found, method, weights, config),
        exchanging=Moment.of({BASE: 2 * weights.all}),
    )
    return _Init(plan, found)


# --- what is learned and answered


def _stream(config: RunConfig, backbone: Backbone, reporter: Reporter, measured: bool = True) -> Stream:
    """As the run would read it; no image is opened, but for the first to be counted."""
    stream = load_run_stream(config)
    rows = (row for task in stream for row in (*task.train, *task.dev, *task.test))
    shown = next((row for row in rows if row.images), None)
    if shown is not None and not backbone.layout.sees:
        raise UserError(f"{shown.source}: an image row, and model {config.model!r} reads text only")
    check_lengths(stream.tasks, backbone.reader, backbone.layout, config, reporter, measured=measured)
    return fit_demonstrations(stream, backbone.reader, backbone.layout, config)


def _answered(task: Task, config: RunConfig) -> tuple[Row, ...]:
    return task.dev if config.eval_split == "dev" else task.test


class _Rows:
    """The lengths of a configuration's rows."""

    def __init__(self, config: RunConfig, backbone: Backbone) -> None:
        self.reader = backbone.reader.with_padding(config.image_padding)
        self.lengths = Lengths(self.reader)
        self._config, self._layout = config, backbone.layout

    def count(self, rows: Sequence[Row], reporter: Reporter) -> None:
        reporter.start("counting tokens", total=len(rows))
        for row in rows:
            self.lengths(row)
            reporter.advance()

    def fits(self, row: Row) -> bool:
        """Whether it can be trained on."""
        return self._layout.fits(self.lengths(row).prompt, self.lengths(row).answer, self._config)


def _batches(stream: Stream, rows: _Rows, test: Sequence[Row], config: RunConfig, processes: int) -> Batches:
    arguments = arguments_of(config)

    def of_stage(name: str, tasks: int, trained: Sequence[Row]) -> Drawn:
        steps = _steps(len(trained), tasks, arguments, config, processes)
        return draw(name, trained, rows.lengths, arguments, steps, processes, config.seed)

    fitting = (row for task in stream for row in task.train if rows.fits(row))
    longest = max(fitting, key=lambda row: rows.lengths(row).total, default=None)
    return Batches(of_stage, rows.lengths, longest, test)


def _longest(found: Rehearsal, rows: _Rows) -> Batch | None:
    task, batch = found.longest
    return _batch(task, batch, lambda row: rows.lengths(row).total) if batch else None


def _longest_answered(stream: Stream, rows: _Rows, backbone: Backbone, config: RunConfig) -> tuple[list[Row], Batch]:
    """The rows of the batch with most tokens, padded ones included: those of like length are answered together."""

    def prompt(row: Row) -> int:
        return rows.lengths(row).prompt

    found: list[tuple[list[Row], Batch]] = []
    size = config.per_device_eval_batch_size
    for task in stream:
        fitting = [
            row for row in _answered(task, config) if backbone.layout.fits(prompt(row), config.max_new_tokens, config)
        ]
        fitting.sort(key=prompt)
        for start in range(0, len(fitting), size):
            chosen = fitting[start : start + size]
            found.append((chosen, _batch(task.name, chosen, prompt)))
    if not found:
        raise UserError(f"no prompt to be answered fits {backbone.layout.limit_text(config)}; raise it")
    return max(found, key=lambda batch: batch[1].tokens)


def _batch(task: str, rows: Sequence[Row], size: Callable[[Row], int]) -> Batch:
    longest = max(size(row) for row in rows)
    return Batch(task, len(rows), longest, len(rows) * longest)


def _task(task: Task, found: Rehearsal, rows: _Rows, eval_rows: int) -> TaskPlan:
    trained = [row for row in task.train if rows.fits(row)]
    placement = next((stage.placement for stage in found.stages if task.name in stage.tasks), None)
    return TaskPlan(
        name=task.name,
        train_rows=len(trained),
        left_out=len(task.train) - len(trained),
        tokens=sum(rows.lengths(row).total for row in trained),
        longest=max(rows.lengths(row).total for row in trained),
        image_rows=sum(bool(row.images) for row in trained),
        eval_rows=eval_rows,
        adapter=None if placement is None else placement.adapter,
        similarity=max(placement.scores.values()) if placement is not None and placement.scores else None,
    )


def _steps(rows: int, tasks: int, arguments: TrainingArguments, config: RunConfig, processes: int) -> int:
    """Optimizer steps of a stage."""
    limit = config.max_steps * tasks if config.max_steps > 0 else -1
    return optimizer_steps(rows, arguments, limit, processes)


def _stages(found: Rehearsal, config: RunConfig, processes: int, lengths: _Rows) -> tuple[StagePlan, ...]:
    arguments = arguments_of(config)

    def steps(stage: StageRehearsed) -> int:
        return _steps(len(stage.rows), len(stage.tasks), arguments, config, processes)

    per_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * processes

    def tokens(stage: StageRehearsed) -> int:
        mean = sum(lengths.lengths(row).total for row in stage.rows) / len(stage.rows)
        return round(mean * steps(stage) * per_step)

    return tuple(
        StagePlan(
            stage.tasks, stage.placement.adapter, stage.placement.is_new, len(stage.rows), steps(stage), tokens(stage)
        )
        for stage in found.stages
    )


def _flops(found: Rehearsal, stages: Sequence[StagePlan], config: RunConfig, processes: int) -> int:
    """Of all training.

    What a step does once is done by every process (docs/concepts/processes.md).
    """
    both = list(zip(stages, found.stages, strict=True))
    each = config.gradient_accumulation_steps
    return sum(stage.steps * processes * (each * part.flops + part.flops_once) for stage, part in both)


# --- memory


def _resident() -> int:
    """Bytes that this process holds: what the run's will hold without tensors, as it has gone through all of it."""
    gc.collect()
    give_back_freed_memory()
    return int(psutil.Process().memory_info().rss)


@dataclass(frozen=True)
class _Weights:
    """Of the base, in bytes but for the numbers."""

    numbers: dict[str, int]  # dtype → parameters
    all: int  # parameters and buffers
    layer: int  # the largest one
    outside: int  # in no layer: embeddings, vocabulary, projector
    depth: int  # layers of the language model


def _weights(backbone: Backbone) -> _Weights:
    model, numbers = backbone.model, Counter[str]()
    for weights in model.parameters():
        numbers[str(weights.dtype).removeprefix("torch.")] += weights.numel()
    layers = [layer for part in model.modules() if isinstance(part, torch.nn.ModuleList) for layer in part]
    inside = {weights for layer in layers for weights in layer.parameters()}
    return _Weights(
        dict(numbers),
        sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        max(sum(weights.nbytes for weights in layer.parameters()) for layer in layers),
        sum(weights.nbytes for weights in model.parameters() if weights not in inside),
        depth_of(model.config),
    )


def _rehearsed(
    config: RunConfig,
    backbone: Backbone,
    stream: Stream,
    batches: Batches,
    rows: _Rows,
    device: str,
    processes: int,
    reporter: Reporter,
) -> tuple[Rehearsal, str]:
    """The run's bytes, and how they were found."""

    def go(model: Backbone) -> Rehearsal:
        def begun(stage: str) -> None:
            reporter.start(f"rehearsing {stage}", total=None)

        return rehearse(config, model, list(stream), batches, rows.fits, device, processes, begun)

    try:
        return go(backbone), _REHEARSED
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    reporter.done(f"  note: {config.model} cannot be rehearsed without numbers ({reason}); measuring small real models")
    depth = depth_of(AutoConfig.from_pretrained(place(config.model)))
    first, second = (go(outline(config, device, depth=layers)) for layers in _DEPTHS)
    how = (
        f"measured: the run's own code on real models of {_DEPTHS[0]} and {_DEPTHS[1]} layers at full width, on the "
        f"CPU, extrapolated to {depth} layers, since it cannot be rehearsed without numbers ({reason})"
    )
    return deeper(first, second, (depth - _DEPTHS[1]) / (_DEPTHS[1] - _DEPTHS[0])), how


def _devices(
    gpus: int | None, found: Rehearsal, method: Combined, weights: _Weights, config: RunConfig
) -> Devices | None:
    if gpus is None or not found.training:
        return None
    if gpus == 1:
        return Devices(1, Moment.of(found.training), None)
    trained = FP32 * found.trained
    shared = {part: size // gpus if part in SHARDED else size for part, size in found.training.items()}
    gathered = {GATHERED: 2 * (weights.layer + trained // weights.depth) + weights.outside}
    seeing = [{bool(row.images) for row in stage.rows} for stage in found.stages]
    works_sharded = (
        config.early_stopping_patience is None
        and all(leaf.works_sharded() for leaf in method.leaves())
        and all(len(kinds) < 2 for kinds in seeing)  # check_sharded_rows
    )
    return Devices(
        gpus,
        Moment.of({**found.training, BUCKETS: trained}),
        Moment.of({**shared, **gathered}) if works_sharded else None,
    )


def _evaluating(found: Rehearsal, config: RunConfig) -> dict[str, int]:
    """With early stopping answers are given while a task is learned."""
    if config.early_stopping_patience is None:
        return dict(found.evaluating)
    return {
        **{part: found.training[part] for part in (OPTIMIZER, METHOD) if part in found.training},
        **found.evaluating,
    }


def _disk(
    found: Rehearsal, stages: Sequence[StagePlan], config: RunConfig, weights: _Weights, init: _Init | None
) -> Disk:
    # while one is written the one before is there, and with early stopping that of the best epoch
    checkpoints = 2 if any(stage.steps > config.save_steps for stage in stages) else 0
    if config.early_stopping_patience is not None:
        checkpoints = 3
    own = count_disk(found, found.training.get(METHOD, 0), checkpoints)
    if init is None:
        return own
    before = count_disk(init.found, 0, 2 if init.plan.stage.steps > config.save_steps else 0)
    return replace(
        own, init=weights.all + before.history + before.pool, checkpoints=max(own.checkpoints, before.checkpoints)
    )


def _notes(config: RunConfig, method: Combined, stream: Stream, rows: _Rows, gpus: int | None) -> Iterator[str]:
    for leaf in method.leaves():
        if type(leaf) in _UNKNOWN:
            yield _UNKNOWN[type(leaf)]
    if any(task.has_images for task in stream):
        assert isinstance(rows.reader, ImageReader)
        number = rows.reader.tokens_of_any_image
        yield "tokens of an image depend on its size" if number is None else f"an image takes {number} tokens"
    if config.early_stopping_patience is not None:
        yield "early stopping: steps and time are the most that there can be, without the scores of the dev rows"
    if gpus is not None and gpus > 1:
        yield _SEVERAL
