"""A run without its numbers: each stage is opened, begun and closed by the method's own code, its bytes counted.

Each stage makes a step on each of a few typical micro-batches. Behind all of them the largest of the run are trained
on, in the last stage and in the last that went on with an adapter: then all adapters are there, and all that the
method carries.

Shapes: N answer tokens, V vocabulary.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import EncoderDecoderCache, Trainer, TrainingArguments

from lcia.adapters import Pool
from lcia.backbone import Backbone, answer_logits
from lcia.config import RunConfig
from lcia.evaluation import Decoding, generate_answers
from lcia.methods import Combined, Method, Placement, Training, build_method
from lcia.methods.memory import EpisodicMemory
from lcia.planning.flops import Flops
from lcia.planning.lengths import Length
from lcia.planning.live import Bytes, LiveBytes
from lcia.planning.parts import ACTIVATIONS, ADAPTERS, BASE, CACHE, GRADIENTS, LOGITS, METHOD, OPTIMIZER
from lcia.planning.zeros import floats_are_zero
from lcia.session import make_pool
from lcia.stream import Row, Task

_STEPS = 100  # of a task, for methods that spread their work over them
_DECODED = 4  # tokens that are generated; from the second on, each one more takes the same


@dataclass(frozen=True)
class StageRehearsed:
    """One stage: what is learned together, and where."""

    tasks: tuple[str, ...]
    placement: Placement
    rows: tuple[Row, ...]  # trained on: those of the tasks, and what the method adds
    state: int  # bytes that the method carries on after it
    flops: int  # floating-point operations of a micro-batch's passes, on average
    flops_once: int  # of a step behind its micro-batches' passes: agem's reference gradient


@dataclass
class Rehearsal:
    """What a run makes and holds, in bytes where nothing else is said."""

    stages: list[StageRehearsed] = field(default_factory=list)
    adapters: dict[str, int] = field(default_factory=dict)  # adapter → its trained numbers
    projector: int = 0  # of these, the projector's
    optimizer: int = 0  # states of the optimizer, for one adapter
    training: Bytes = field(default_factory=dict)  # all parts, when their sum is largest
    longest: tuple[str, tuple[Row, ...]] = "", ()  # the micro-batch with most tokens, padded ones included; its stage
    closing: Bytes = field(default_factory=dict)  # the same, when a task is closed
    evaluating: Bytes = field(default_factory=dict)

    @property
    def trained(self) -> int:
        """Numbers of one adapter, the largest."""
        return max(self.adapters.values(), default=0)


@dataclass(frozen=True)
class Drawn:
    """Micro-batches of a stage."""

    largest: tuple[tuple[Row, ...], ...]  # with most tokens, padded ones included; most of their own; most to learn
    typical: tuple[tuple[Row, ...], ...]  # with chances in proportion to their tokens, padded ones included
    padded: float  # of these tokens a micro-batch has so many on average


@dataclass(frozen=True)
class Batches:
    """The rows that go through the model."""

    draw: Callable[[str, int, Sequence[Row]], Drawn]  # of a stage: its name, how many tasks it has, its rows
    length: Callable[[Row], Length]
    longest: Row | None  # of all that are trained on; None: there are none
    test: Sequence[Row]  # answered together; none where nothing is measured


def arguments_of(config: RunConfig) -> TrainingArguments:
    """The trainer's, which reports to nobody."""
    values = {"report_to": "none", **config.training_arguments()}
    return TrainingArguments(output_dir=config.output_dir, **values)


def rehearse(
    config: RunConfig,
    backbone: Backbone,
    tasks: Sequence[Task],
    batches: Batches,
    fits: Callable[[Row], bool],
    device: str,
    processes: int = 1,
    on_stage: Callable[[str], None] = lambda name: None,
) -> Rehearsal:
    """Go through the run.

    Args:
        backbone: on `meta`, or a real one on the CPU.
        fits: whether a training row is within the run's lengths; others are left out.
        device: cpu | cuda, where the run would be.
        processes: of a training.
        on_stage: is told of every stage that begins.
    """
    on_meta = backbone.model.device.type == "meta"
    vocabulary = backbone.model.get_output_embeddings().weight.shape[0]
    with ExitStack() as modes, torch.random.fork_rng(devices=[]), _older_objects_aside():
        if on_meta:
            modes.enter_context(floats_are_zero(device))
        live = modes.enter_context(LiveBytes(lambda tensor: LOGITS if vocabulary in tensor.shape else None))
        live.add([*backbone.model.parameters(), *backbone.model.buffers()], BASE)
        return _Run(config, backbone, batches, fits, live, on_meta, processes).go(tasks, on_stage)


@contextmanager
def _older_objects_aside() -> Iterator[None]:
    """Collecting garbage looks only at what was made inside: among all objects of the libraries it takes a third of a
    second each time.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class _Run:
    def __init__(
        self,
        config: RunConfig,
        backbone: Backbone,
        batches: Batches,
        fits: Callable[[Row], bool],
        live: LiveBytes,
        on_meta: bool,
        processes: int,
    ) -> None:
        self.processes = processes
        self.config, self.backbone, self.batches, self.fits = config, backbone, batches, fits
        self.live, self.on_meta = live, on_meta
        self.arguments = arguments_of(config)
        with live.part(ADAPTERS):
            self.pool: Pool = make_pool(config, backbone)
        self.method: Combined = build_method(config.method_parts())
        self.method.attach(self.pool, backbone)
        self.found = Rehearsal()
        self._largest: list[tuple[int, tuple[Row, ...]]] = [(0, ())] * 3  # of all stages, as in Drawn

    @contextmanager
    def _made_here(self) -> Iterator[None]:
        """New weights lie where the model does."""
        with torch.device("meta" if self.on_meta else "cpu"):
            yield

    def go(self, tasks: Sequence[Task], on_stage: Callable[[str], None]) -> Rehearsal:
        learned: list[tuple[Task, Placement]] = []
        for stage in self.method.schedule(tasks):
            task = stage[0] if len(stage) == 1 else _joined(stage)
            on_stage(task.name)
            learned.append((task, self._learn(task, [member.name for member in stage])))
        if self.batches.test:
            on_stage("answers")
            self._evaluate()
        found, heaviest = self.found, learned[-1:]
        if heaviest and heaviest[0][1].is_new:
            heaviest += [one for one in learned if not one[1].is_new][-1:]
        for task, placement in heaviest:
            on_stage(f"{task.name}, the longest batch")
            for rows in dict.fromkeys(rows for _, rows in self._largest):
                found.training = _larger(found.training, self._train(task, placement, rows))
        return found

    # --- learning

    def _learn(self, task: Task, names: Sequence[str]) -> Placement:
        """One stage, with a step on each typical micro-batch."""
        live, found, method = self.live, self.found, self.method
        with live.part(METHOD):
            placement = method.open_task(self._lean(task))
        if placement.is_new:
            with live.part(ADAPTERS), self._made_here():
                self.pool.add(placement.adapter, start=placement.start)
        rows = tuple(row for row in method.feed(task.train, placement) if self.fits(row))
        drawn = self.batches.draw("+".join(names), len(names), rows)
        self._remember("+".join(names), drawn)
        with self._begun(task, placement, rows) as (parameters, optimizer):
            passes, once = zip(*(self._step(batch, parameters, optimizer) for batch in drawn.typical), strict=True)
            found.optimizer = max(found.optimizer, live.now.get(OPTIMIZER, 0))
        del optimizer
        own = self.pool.projector_parameters(placement.adapter)
        found.projector = sum(weights.numel() for name, weights in parameters.items() if name in own)
        found.adapters[placement.adapter] = sum(weights.numel() for weights in parameters.values())
        self._close(task)
        state = [value for value in method.state_dict().values() if isinstance(value, torch.Tensor)]
        size = sum(value.nbytes for value in state)
        shares = [flops / self._padded(batch) for flops, batch in zip(passes, drawn.typical, strict=True)]
        flops = round(drawn.padded * sum(shares) / len(shares))
        found.stages.append(StageRehearsed(tuple(names), placement, rows, size, flops, max(once)))
        return placement

    def _remember(self, name: str, drawn: Drawn) -> None:
        """The micro-batches of a stage, where they are larger than those of all stages before."""
        _, own, answers = ([self.batches.length(row) for row in rows] for rows in drawn.largest)
        prompts = [self.backbone.reader.encode(row).prompt for row in drawn.largest[1]]
        columns = zip(*prompts, strict=False)
        shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))  # passed once (packing.py)
        sizes = (
            self._padded(drawn.largest[0]),
            sum(length.total for length in own) - (len(prompts) - 1) * shared,
            sum(length.answer for length in answers),
        )
        for i, (size, rows) in enumerate(zip(sizes, drawn.largest, strict=True)):
            if size > self._largest[i][0]:
                self._largest[i] = size, rows
                if i == 0:
                    self.found.longest = name, rows

    def _padded(self, rows: Sequence[Row]) -> int:
        """Tokens of a micro-batch, padded ones included."""
        return len(rows) * max(self.batches.length(row).total for row in rows)

    def _train(self, task: Task, placement: Placement, rows: Sequence[Row]) -> Bytes:
        """A stage again, behind all others: a step on one of the largest batches, when the optimizer has its states."""
        with self._begun(task, placement, rows) as (parameters, optimizer):
            with self.live.part(OPTIMIZER):
                for weights in parameters.values():
                    weights.grad = torch.zeros_like(weights)
                optimizer.step()
                optimizer.zero_grad()
            gc.collect()
            self.live.forget_peak()
            self._step(rows, parameters, optimizer)
        return dict(self.live.at_peak)

    @property
    def _micro_batches(self) -> int:
        """Of a rehearsed step."""
        return int(min(2, self.arguments.gradient_accumulation_steps))

    @contextmanager
    def _begun(
        self, task: Task, placement: Placement, rows: Sequence[Row]
    ) -> Iterator[tuple[dict[str, torch.nn.Parameter], torch.optim.Optimizer]]:
        parameters = self.pool.train_only(placement.adapter, placement.beneath)
        kind, options = Trainer.get_optimizer_cls_and_kwargs(self.arguments)
        options = {key: value for key, value in options.items() if key != "fused"}  # a kernel, and none of `meta`
        optimizer = kind(list(parameters.values()), **options)
        for leaf in self.method.leaves():
            training = Training(
                self._seen_by(leaf, task),
                placement,
                rows if isinstance(leaf, EpisodicMemory) else self._longest_row,
                parameters,
                self.pool.model,
                optimizer,
                total_steps=_STEPS,
                examples_per_gradient=min(self.arguments.per_device_train_batch_size, len(rows))
                * self.arguments.gradient_accumulation_steps
                * self.processes,
            )
            with self.live.part(METHOD):
                leaf.begin(training)
        self.pool.model.train()
        if self.arguments.activation_checkpointing:
            self.pool.model.activation_checkpointing_enable(self.arguments.activation_checkpointing_kwargs)
        yield parameters, optimizer
        self.pool.model.eval()
        optimizer.zero_grad()

    def _seen_by(self, leaf: Method, task: Task) -> Task:
        """The task; of its rows one, where they only pass through the model, one at a time: the longest of all."""
        return task if isinstance(leaf, EpisodicMemory) else self._lean(task)

    def _lean(self, task: Task) -> Task:
        return replace(task, train=self._longest_row)

    @property
    def _longest_row(self) -> tuple[Row, ...]:
        return () if self.batches.longest is None else (self.batches.longest,)

    def _step(
        self, rows: Sequence[Row], parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> tuple[int, int]:
        """One optimizer step, as lcia.training makes it; of several micro-batches, two.

        Returns the floating-point operations of a micro-batch's passes, and of what comes behind all of them.
        """
        live, model, reader, settings = self.live, self.pool.model, self.backbone.reader, self.arguments
        batch = reader.collate([reader.encode(row) for row in rows])
        batch = {name: values.to(self.backbone.model.device) for name, values in batch.items()}

        def kept(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            live.move(parameter.grad, GRADIENTS)

        hooks = [weights.register_post_accumulate_grad_hook(kept) for weights in parameters.values()]
        with live.part(ACTIVATIONS), Flops() as passes:
            for _ in range(self._micro_batches):
                logits, targets = answer_logits(model, batch)  # (N, V), (N,)
                loss = cross_entropy(logits, targets, reduction="sum") / len(targets)
                answer_tokens = torch.tensor(float(len(targets)), device=logits.device)
                sizes: dict[str, Any] = {"answer_tokens": answer_tokens, "rows": len(batch["labels"])}
                penalty = self.method.penalty({**batch, "answer_logits": logits, **sizes})
                (loss if penalty is None else loss + penalty).backward()
                del logits, loss, penalty
        with Flops() as once:
            with live.part(ACTIVATIONS):
                self.method.see_grads()
                if settings.max_grad_norm > 0:
                    torch.nn.utils.clip_grad_norm_(parameters.values(), settings.max_grad_norm)
                self.method.shape_grads()
            with live.part(OPTIMIZER):
                optimizer.step()
            with live.part(METHOD):
                self.method.after_step()
        optimizer.zero_grad()
        for hook in hooks:
            hook.remove()
        return passes.total // self._micro_batches, once.total

    def _close(self, task: Task) -> None:
        live = self.live
        live.forget_peak()
        with live.part(METHOD):
            for leaf in self.method.leaves():
                leaf.close_task(self._seen_by(leaf, task))
        self.found.closing = _larger(self.found.closing, dict(live.at_peak))

    # --- answering

    def _evaluate(self) -> None:
        """The longest batch is routed and answered; each pass through the model is looked at by itself."""
        live, model, config = self.live, self.backbone.model, self.config
        rows = self.batches.test
        tokens = min(_DECODED, config.max_new_tokens)
        prompts = [self.backbone.reader.encode_prompt(row) for row in rows]
        passes: list[Bytes] = []

        def passed(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            passes.append(_with_cache(live.at_peak, output.past_key_values))
            live.forget_peak()

        gc.collect()
        live.forget_peak()
        with live.part(ACTIVATIONS), torch.no_grad():
            group = self.method.route(rows)[0].group
            routing = dict(live.at_peak)
            live.forget_peak()
            hook = model.register_forward_hook(passed)
            decoding = Decoding(tokens, len(rows), config.max_length)
            generate_answers(self.pool, self.backbone.reader, [group] * len(rows), prompts, decoding)
            hook.remove()
        if tokens == _DECODED:
            passes.append(_extrapolated(passes[-2], passes[-1], config.max_new_tokens - _DECODED))
        self.found.evaluating = max([*passes, routing], key=lambda parts: sum(parts.values()))


def deeper(first: Rehearsal, second: Rehearsal, more: float) -> Rehearsal:
    """What `more` layers add to the second, when each adds as much as the second has over the first."""

    def line(one: Bytes, other: Bytes) -> Bytes:
        return _extrapolated(one, other, more)

    names = ("projector", "optimizer")
    numbers = line({name: getattr(first, name) for name in names}, {name: getattr(second, name) for name in names})
    states = []
    for early, late in zip(first.stages, second.stages, strict=True):
        counts = ("state", "flops", "flops_once")
        sizes = line(*({name: getattr(one, name) for name in counts} for one in (early, late)))
        states.append(replace(late, state=sizes["state"], flops=sizes["flops"], flops_once=sizes["flops_once"]))
    return Rehearsal(
        stages=states,
        adapters=line(first.adapters, second.adapters),
        projector=numbers["projector"],
        optimizer=numbers["optimizer"],
        training=line(first.training, second.training),
        longest=second.longest,
        closing=line(first.closing, second.closing),
        evaluating=line(first.evaluating, second.evaluating),
    )


def _larger(one: Bytes, other: Bytes) -> Bytes:
    return other if sum(other.values()) > sum(one.values()) else one


def _extrapolated(first: Bytes, second: Bytes, more: float) -> Bytes:
    """`more` steps behind the second, each as far as from the first to it."""
    parts = {**first, **second}
    return {part: round(second.get(part, 0) + more * (second.get(part, 0) - first.get(part, 0))) for part in parts}


def _with_cache(parts: Bytes, cache: Any) -> Bytes:
    """The parts, with keys and values out of the activations."""
    caches = (
        [cache.self_attention_cache, cache.cross_attention_cache] if isinstance(cache, EncoderDecoderCache) else [cache]
    )
    tensors = [
        tensor
        for one in caches
        if one is not None
        for layer in one.layers
        for tensor in (layer.keys, layer.values)
        if tensor is not None
    ]
    known = min(sum(tensor.nbytes for tensor in tensors), parts.get(ACTIVATIONS, 0))
    return {**parts, ACTIVATIONS: parts.get(ACTIVATIONS, 0) - known, CACHE: known}


def _joined(stage: Sequence[Task]) -> Task:
    """Tasks that are learned together, as one."""
    instructions = tuple(dict.fromkeys(text for task in stage for text in task.instructions))
    return replace(
        stage[0], name="all", instructions=instructions, train=tuple(r for task in stage for r in task.train)
    )
