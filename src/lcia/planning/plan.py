"""What a run will need, without running it: parameters, memory, disk, steps, evaluations. Times only where measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, TrainingArguments

from lcia.backbone import Backbone, fit_demonstrations
from lcia.config import RunConfig
from lcia.errors import UserError
from lcia.methods import PGP, Combined, ContinualLLaVA, EProj, Method, build_method
from lcia.planning.counting import FP32, Disk, Evaluations, count_disk, count_evaluations, optimizer_steps
from lcia.planning.lengths import Length, Lengths
from lcia.planning.live import Bytes
from lcia.planning.outline import depth_of, outline, place
from lcia.planning.parts import BUCKETS, GATHERED, METHOD, PARTS, SHARDED
from lcia.planning.rehearsal import Batches, Rehearsal, StageRehearsed, deeper, rehearse
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
_SINGLE = (
    "lcia train is one process so far: under accelerate launch a second one is refused by the run folder's lock. "
    "What several devices would hold is computed, not tried"
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
    """The longest one."""

    task: str
    rows: int
    longest: int  # tokens of prompt and answer; of a batch to be answered, of the prompt
    tokens: int  # padded ones included


@dataclass(frozen=True)
class Devices:
    """Data parallel over several GPUs: what each of them holds."""

    gpus: int
    ddp: Moment  # the base is there on every one
    fsdp2: Moment  # weights, gradients and states are shared out; activations are everybody's own


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
    devices: Devices | None
    memory_gib: float | None  # of one device, as asked
    fits: bool | None
    disk: Disk
    tasks: tuple[TaskPlan, ...]
    stages: tuple[StagePlan, ...]
    evaluations: Evaluations
    measured: Measured | None
    notes: tuple[str, ...]

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    @property
    def peak(self) -> int:
        """Bytes of tensors on one device."""
        moments = [self.training, self.closing, self.evaluating, self.devices.ddp if self.devices else None]
        return max(moment.peak for moment in moments if moment is not None)

    @property
    def training_s(self) -> float | None:
        """At the rate that was measured; evaluation is not in it."""
        return None if self.measured is None else self.steps * self.measured.seconds_per_step

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "steps": self.steps, "peak": self.peak, "training_s": self.training_s}

    def __rich__(self) -> RenderableType:
        from lcia.planning.table import render

        return render(self)


def plan_run(
    config: RunConfig,
    reporter: Reporter,
    gpus: int | None = None,
    memory_gib: float | None = None,
    measure: int = 0,
) -> Plan:
    """Plan what `lcia train` would do; nothing is written, and no weights are read but by `measure`.

    Args:
        gpus: so many of them, each with the batch size of the configuration; None: this machine.
        memory_gib: of one device, to be compared with.
        measure: real optimizer steps to be timed on this machine; 0: no time is given.

    Raises:
        UserError: configuration, data or model that `lcia train` would refuse, or options that exclude each other.
    """
    if measure and gpus is not None:
        raise UserError("plan: --measure times this machine; leave out --gpus")
    device = "cuda" if gpus is not None or torch.cuda.is_available() else "cpu"
    backbone = outline(config, device)
    check_target_modules(backbone, config.lora_target_modules)
    stream = _stream(config, backbone)
    lengths = Lengths(backbone.reader)
    _count_tokens(stream, lengths, config, reporter)

    def fits(row: Row) -> bool:
        return backbone.layout.fits(lengths(row).prompt, lengths(row).answer, config)

    method = build_method(config.method_parts())
    train, train_batch = _longest_training(stream, method, lengths, fits, config)
    test, eval_batch = _longest_answered(stream, lengths, backbone, config)
    dtypes, base_bytes = _weights(backbone)
    layer = _largest_layer(backbone)
    batches = Batches(train, test)
    found, how = _rehearsed(config, backbone, stream, batches, fits, device, (gpus or 1) > 1, reporter)

    stages = _stages(found, config, gpus or 1)
    training = Moment.of(found.training) if found.training else None
    layer += FP32 * found.trained // depth_of(backbone.model.config)
    devices = None if gpus is None or training is None else _devices(gpus, training, FP32 * found.trained, layer)
    seconds = None
    if measure and stages:
        task = next(task for task in stream if task.name == stages[0].tasks[0])
        reporter.start(f"{measure} steps of {task.name}", total=None)
        seconds = measure_steps(config, task, [row for row in task.train if fits(row)], measure)
    checkpoints = any(stage.steps > config.save_steps for stage in stages)
    changes = any(stage.placement.beneath for stage in found.stages) or any(
        isinstance(leaf, ContinualLLaVA) for leaf in method.leaves()
    )
    plan = Plan(
        method=method_name(config),
        model=config.model,
        stream=stream.name,
        device=device,
        how=how,
        base_parameters=dtypes,
        base_bytes=base_bytes,
        lora=found.trained - found.projector,
        projector=found.projector,
        adapters={
            adapter: tuple(task for stage in stages if stage.adapter == adapter for task in stage.tasks)
            for adapter in found.adapters
        },
        training=training,
        gradients=FP32 * found.trained,
        closing=Moment.of(found.closing) if found.closing else None,
        evaluating=Moment.of(found.evaluating),
        train_batch=train_batch,
        eval_batch=eval_batch,
        devices=devices,
        memory_gib=memory_gib,
        fits=None,
        disk=count_disk(
            found, found.training.get(METHOD, 0), checkpoints, base_bytes if config.init_stream is not None else 0
        ),
        tasks=tuple(_task(task, found, lengths, fits, config) for task in stream),
        stages=stages,
        evaluations=count_evaluations([task.name for task in stream], found.stages, changes),
        measured=seconds,
        notes=tuple(_notes(config, method, stream, lengths, gpus)),
    )
    return plan if memory_gib is None else replace(plan, fits=plan.peak <= memory_gib * GIB)


# --- what is learned and answered


def _stream(config: RunConfig, backbone: Backbone) -> Stream:
    """As the run would read it; images are not opened."""
    stream = load_run_stream(config)
    rows = (row for task in stream for row in (*task.train, *task.dev, *task.test))
    shown = next((row for row in rows if row.images), None)
    if shown is not None and not backbone.layout.sees:
        raise UserError(f"{shown.source}: an image row, and model {config.model!r} reads text only")
    check_lengths(stream.tasks, backbone.reader, backbone.layout, config)
    return fit_demonstrations(stream, backbone.reader, backbone.layout, config)


def _answered(task: Task, config: RunConfig) -> tuple[Row, ...]:
    return task.dev if config.eval_split == "dev" else task.test


def _count_tokens(stream: Stream, lengths: Lengths, config: RunConfig, reporter: Reporter) -> None:
    rows = [row for task in stream for row in (*task.train, *_answered(task, config))]
    reporter.start("counting tokens", total=len(rows))
    for row in rows:
        lengths(row)
        reporter.advance()


def _longest_training(
    stream: Stream, method: Combined, lengths: Lengths, fits: Callable[[Row], bool], config: RunConfig
) -> tuple[list[Row], Batch | None]:
    """The rows of the micro-batch with most tokens, padded ones included."""
    found: list[tuple[list[Row], Batch]] = []
    for stage in method.schedule(list(stream)):
        rows = sorted(
            (row for task in stage for row in task.train if fits(row)), key=lambda row: lengths(row).total, reverse=True
        )[: config.per_device_train_batch_size]
        found.append((rows, _batch("+".join(task.name for task in stage), rows, lambda length: length.total, lengths)))
    return max(found, key=lambda batch: batch[1].tokens, default=([], None))


def _longest_answered(
    stream: Stream, lengths: Lengths, backbone: Backbone, config: RunConfig
) -> tuple[list[Row], Batch]:
    """The same of the batches that are answered together: rows of like length, the shortest first."""
    found: list[tuple[list[Row], Batch]] = []
    size = config.per_device_eval_batch_size
    for task in stream:
        fitting = (
            row
            for row in _answered(task, config)
            if backbone.layout.fits(lengths(row).prompt, config.max_new_tokens, config)
        )
        rows = sorted(fitting, key=lambda row: lengths(row).prompt)
        for start in range(0, len(rows), size):
            chosen = rows[start : start + size]
            found.append((chosen, _batch(task.name, chosen, lambda length: length.prompt, lengths)))
    if not found:
        raise UserError(f"no prompt to be answered fits {backbone.layout.limit_text(config)}; raise it")
    return max(found, key=lambda batch: batch[1].tokens)


def _batch(task: str, rows: Sequence[Row], size: Callable[[Length], int], lengths: Lengths) -> Batch:
    longest = max(size(lengths(row)) for row in rows)
    return Batch(task, len(rows), longest, len(rows) * longest)


def _task(task: Task, found: Rehearsal, lengths: Lengths, fits: Callable[[Row], bool], config: RunConfig) -> TaskPlan:
    rows = [row for row in task.train if fits(row)]
    placement = next((stage.placement for stage in found.stages if task.name in stage.tasks), None)
    return TaskPlan(
        name=task.name,
        train_rows=len(rows),
        left_out=len(task.train) - len(rows),
        tokens=sum(lengths(row).total for row in rows),
        longest=max(lengths(row).total for row in rows),
        image_rows=sum(bool(row.images) for row in rows),
        eval_rows=len(_answered(task, config)),
        adapter=None if placement is None else placement.adapter,
        similarity=max(placement.scores.values()) if placement is not None and placement.scores else None,
    )


def _stages(found: Rehearsal, config: RunConfig, processes: int) -> tuple[StagePlan, ...]:
    values = {"report_to": "none", **config.training_arguments()}
    arguments = TrainingArguments(output_dir=config.output_dir, **values)

    def steps(stage: StageRehearsed) -> int:
        limit = config.max_steps * len(stage.tasks) if config.max_steps > 0 else -1
        return optimizer_steps(len(stage.rows), arguments, limit, processes)

    return tuple(
        StagePlan(stage.tasks, stage.placement.adapter, stage.placement.is_new, len(stage.rows), steps(stage))
        for stage in found.stages
    )


# --- memory


def _weights(backbone: Backbone) -> tuple[dict[str, int], int]:
    """{dtype: parameters} of the model, and the bytes of parameters and buffers."""
    counted: Counter[str] = Counter()
    for weights in backbone.model.parameters():
        counted[str(weights.dtype).removeprefix("torch.")] += weights.numel()
    return dict(counted), sum(t.nbytes for t in (*backbone.model.parameters(), *backbone.model.buffers()))


def _largest_layer(backbone: Backbone) -> int:
    """Bytes."""
    lists = [module for module in backbone.model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(sum(weights.nbytes for weights in layer.parameters()) for layers in lists for layer in layers)


def _rehearsed(
    config: RunConfig,
    backbone: Backbone,
    stream: Stream,
    batches: Batches,
    fits: Callable[[Row], bool],
    device: str,
    several: bool,
    reporter: Reporter,
) -> tuple[Rehearsal, str]:
    """The run's bytes, and how they were found."""

    def go(model: Backbone) -> Rehearsal:
        def begun(stage: str) -> None:
            reporter.start(f"rehearsing {stage}", total=None)

        return rehearse(config, model, list(stream), batches, fits, device, several, begun)

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


def _devices(gpus: int, training: Moment, gradients: int, layer: int) -> Devices:
    """Args: gradients, layer: bytes."""
    buckets = {BUCKETS: gradients} if gpus > 1 else {}
    shared = {part: size // gpus if part in SHARDED else size for part, size in training.parts.items()}
    gathered = {GATHERED: 2 * layer} if gpus > 1 else {}
    return Devices(gpus, Moment.of({**training.parts, **buckets}), Moment.of({**shared, **gathered}))


def _notes(config: RunConfig, method: Combined, stream: Stream, lengths: Lengths, gpus: int | None) -> Iterator[str]:
    for leaf in method.leaves():
        if type(leaf) in _UNKNOWN:
            yield _UNKNOWN[type(leaf)]
    if any(task.has_images for task in stream):
        extra = lengths.tokens_of_any_image
        yield "tokens of an image depend on its size" if extra is None else f"an image takes {extra + 1} tokens"
    if config.init_stream is not None:
        yield "the Init stage before the stream is not planned, only the model it writes"
    if gpus is not None and gpus > 1:
        yield _SINGLE
