"""The one interface of all methods. Its defaults are sequential fine-tuning of one adapter.

Order of the moments, for each task:

    open_task → feed → begin → (per step: penalty → [backward] → see_grads → [clip] → shape_grads
    → [optimizer step] → after_step) → close_task

A task may be interrupted: then it begins again with `begin` and goes on behind `load_progress`. With early stopping it
may go back to an earlier epoch: another `load_progress`, before `close_task`.

A method overrides the moments its equation needs and nothing else; the trainer names no method.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lcia.adapters import AdapterPool, Pool, stack_name
from lcia.grouping import Codebook, Match
from lcia.stream import Row, Task

if TYPE_CHECKING:
    from lcia.backbone import Backbone

SHARED = "shared"  # the adapter of methods that have only one


@dataclass(frozen=True)
class Placement:
    """Where a task is learned."""

    adapter: str
    is_new: bool  # nothing was learned in this adapter before
    start: str | None = None  # adapter whose weights a new one starts from; None = random A, zero B
    scores: dict[str, float] = field(default_factory=dict)  # similarity to every group there was
    beneath: Sequence[str] = ()  # adapters that stay active, frozen and summed with `adapter`, while it trains

    @property
    def group(self) -> str:
        """The name of all weights that were active while the task was learned."""
        return stack_name([*self.beneath, self.adapter])


@dataclass(frozen=True)
class Training:
    """What a method may look at while one task is learned."""

    task: Task
    placement: Placement
    rows: Sequence[Row]  # trained on
    parameters: Mapping[str, torch.nn.Parameter]  # the trained ones, by full name
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    total_steps: int  # optimizer steps of this task
    examples_per_gradient: int  # rows one gradient averages over
    first_step: int = 0  # steps taken before an interruption; `load_progress` follows when it is not 0


class Method:
    """Sequential fine-tuning: one adapter, trained task after task, nothing done against forgetting."""

    name: ClassVar[str] = "lora"
    published_learning_rate: ClassVar[float | None] = None  # where its source names one
    codebook: Codebook | None = None  # of methods that group tasks
    # lcia.methods.composition goes by these: no part may be idle, or be undone by another.
    idle_on_first_task: bool = False  # an adapter's first task is learned as without this part
    one_task_per_adapter: bool = False  # no adapter is ever trained on a second task
    measures_at_close: bool = False  # `close_task` needs the weights that the adapter keeps
    changes_at_close: bool = False  # `close_task` changes the weights

    @classmethod
    def works_sharded(cls) -> bool:
        """Whether it works where weights and gradients are spread over processes (FSDP2): if it never looks at them."""
        looking = ("make_pool", "begin", "penalty", "see_grads", "shape_grads", "after_step", "close_task")
        return all(getattr(cls, moment) is getattr(Method, moment) for moment in looking)

    def make_pool(self, backbone: Backbone, lora: dict[str, Any], seed: int) -> Pool:
        """What is trained, empty; nothing is changed in the model before the first adapter is added.

        Args:
            lora: r, lora_alpha, lora_dropout, target_modules.
            seed: of the random start of an adapter.

        Raises:
            UserError: the adapters do not fit the model or these settings.
        """
        return AdapterPool(backbone.model, lora, backbone.name, seed, backbone.projector)

    def attach(self, pool: Pool, backbone: Backbone) -> None:
        """Once per run, before anything is loaded or trained."""
        self.pool = pool
        self.backbone = backbone

    def schedule(self, tasks: Sequence[Task]) -> list[tuple[Task, ...]]:
        """The stages of training: tasks of one tuple are learned together."""
        return [(task,) for task in tasks]

    def open_task(self, task: Task) -> Placement | None:
        """Decide which adapter learns the task; None leaves it to the other parts of a composition."""
        return None

    def feed(self, rows: Sequence[Row], placement: Placement) -> Sequence[Row]:
        """The rows to train on, where `open_task` placed the task."""
        return rows

    def begin(self, training: Training) -> None:
        """The weights are those before the task, the optimizer is made, no step is taken."""

    def penalty(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """A scalar added to the loss; the trainer divides it by the micro-batches of the optimizer step.

        Args:
            batch: what `collate` made of the micro-batch; answer_logits (N, V), the logits of the training loss at its
                N answer tokens, with their graph; answer_tokens and rows, scalars, how many of each a micro-batch of
                this optimizer step has on average: a sum over tokens, or over rows, divided by it has the scale of the
                loss, and unequal micro-batches weigh what they hold.
        """
        return None

    def see_grads(self) -> None:
        """Gradients of one optimizer step are complete and not yet clipped."""

    def shape_grads(self) -> None:
        """Change the gradients (clipped) before the optimizer uses them."""

    def after_step(self) -> None:
        """After optimizer.step(), before gradients are zeroed."""

    def skipped_step(self) -> None:
        """Instead of `after_step`, where a gradient scaler found the gradients infinite: the weights did not move."""

    def close_task(self, task: Task) -> None:
        """Training is over; the adapter keeps the weights it has when this returns."""

    def route(self, requests: Sequence[Row]) -> list[Match] | None:
        """The group that answers each request, by what a user sends: never by its reference answers."""
        return None

    def log(self) -> dict[str, float]:
        """Numbers for the training log, after a step."""
        return {}

    def report(self) -> dict[str, Any]:
        """What a closed task adds to results.json under `ema`; empty when the method does not average."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the method carries to the next task: tensors, and JSON values under names without one."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""

    def adapters_changed(self, origin: Mapping[str, str]) -> None:
        """Groups were renamed, merged or split by hand: {adapter there is now: the one whose weights it took over}.

        What a method keeps per adapter follows; adapters that are nobody's origin are gone.
        """

    def save_progress(self, folder: Path) -> None:
        """Write into a checkpoint inside a task what `begin` cannot make again; θ and the optimizer are there."""

    def load_progress(self, folder: Path) -> None:
        """After `begin`, with the weights of the checkpoint in place: take back what `save_progress` wrote.

        Of an interrupted task; or later in a task that goes back to its best epoch, where what was written takes the
        place of what there is by then. Counted costs stay: those passes were made.
        """

    def cost(self) -> dict[str, float]:
        """What the closed task cost beside training one adapter.

        Names in use: examples_stored (rows kept by now), numbers_stored (tensor elements kept by now beside the
        adapters), adapters_stored (kept by now and active for every request), extra_forward_rows and
        extra_backward_rows (rows passed through the model beyond training's own, for this task).
        """
        return {}

    def routing_cost(self) -> dict[str, float]:
        """What `route` has cost in this process so far, in the names of `cost`: each row of the matrix is billed for
        what its requests add.
        """
        return {}


class Combined(Method):
    """Several parts as one method: each moment is passed on to every part in order."""

    name = "combined"

    def __init__(self, parts: Sequence[Method]) -> None:
        self.parts = list(parts)
        self.codebook = next((part.codebook for part in self.parts if part.codebook is not None), None)
        self.idle_on_first_task = any(part.idle_on_first_task for part in self.parts)
        self.one_task_per_adapter = any(part.one_task_per_adapter for part in self.parts)
        self.measures_at_close = any(part.measures_at_close for part in self.parts)
        self.changes_at_close = any(part.changes_at_close for part in self.parts)

    def attach(self, pool: Pool, backbone: Backbone) -> None:
        super().attach(pool, backbone)
        for part in self.parts:
            part.attach(pool, backbone)

    def leaves(self) -> list[Method]:
        """The parts, and the parts of parts that are themselves composed."""
        return [leaf for part in self.parts for leaf in (part.leaves() if isinstance(part, Combined) else [part])]

    def with_own_pool(self) -> list[Method]:
        """The parts that train something else than LoRA adapters; `build_method` allows one."""
        return [leaf for leaf in self.leaves() if type(leaf).make_pool is not Method.make_pool]

    def make_pool(self, backbone: Backbone, lora: dict[str, Any], seed: int) -> Pool:
        """That of the part which trains something else than LoRA adapters."""
        own = self.with_own_pool()
        return own[0].make_pool(backbone, lora, seed) if own else super().make_pool(backbone, lora, seed)

    def schedule(self, tasks: Sequence[Task]) -> list[tuple[Task, ...]]:
        plain = super().schedule(tasks)
        changed = [stages for part in self.parts if (stages := part.schedule(tasks)) != plain]
        return changed[0] if changed else plain

    def open_task(self, task: Task) -> Placement:
        """The first part that decides wins; else everything is learned in the one shared adapter."""
        decided = [placement for part in self.parts if (placement := part.open_task(task)) is not None]
        return decided[0] if decided else Placement(SHARED, is_new=SHARED not in self.pool.names)

    def feed(self, rows: Sequence[Row], placement: Placement) -> Sequence[Row]:
        for part in self.parts:
            rows = part.feed(rows, placement)
        return rows

    def begin(self, training: Training) -> None:
        for part in self.parts:
            part.begin(training)

    def penalty(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        terms = [term for part in self.parts if (term := part.penalty(batch)) is not None]
        return torch.stack(terms).sum() if terms else None

    def see_grads(self) -> None:
        for part in self.parts:
            part.see_grads()

    def shape_grads(self) -> None:
        for part in self.parts:
            part.shape_grads()

    def after_step(self) -> None:
        for part in self.parts:
            part.after_step()

    def skipped_step(self) -> None:
        for part in self.parts:
            part.skipped_step()

    def close_task(self, task: Task) -> None:
        for part in self.parts:
            part.close_task(task)

    def route(self, requests: Sequence[Row]) -> list[Match]:
        """The first part that routes; else the shared adapter, or the base model before it exists."""
        routed = [matches for part in self.parts if (matches := part.route(requests)) is not None]
        if routed:
            return routed[0]
        group = SHARED if SHARED in self.pool.names else None
        return [Match(group, 1.0, {})] * len(requests)

    def log(self) -> dict[str, float]:
        return {key: value for part in self.parts for key, value in part.log().items()}

    def report(self) -> dict[str, Any]:
        return {key: value for part in self.parts for key, value in part.report().items()}

    def state_dict(self) -> dict[str, Any]:
        return {f"{i}.{key}": value for i, part in enumerate(self.parts) for key, value in part.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for i, part in enumerate(self.parts):
            mine = f"{i}."
            part.load_state_dict({key[len(mine) :]: value for key, value in state.items() if key.startswith(mine)})

    def adapters_changed(self, origin: Mapping[str, str]) -> None:
        for part in self.parts:
            part.adapters_changed(origin)

    def save_progress(self, folder: Path) -> None:
        for part in self.parts:
            part.save_progress(folder)

    def load_progress(self, folder: Path) -> None:
        for part in self.parts:
            part.load_progress(folder)

    def cost(self) -> dict[str, float]:
        return _added(part.cost() for part in self.parts)

    def routing_cost(self) -> dict[str, float]:
        return _added(part.routing_cost() for part in self.parts)


def _added(costs: Iterable[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for cost in costs:
        for key, value in cost.items():
            total[key] = total.get(key, 0) + value
    return total
