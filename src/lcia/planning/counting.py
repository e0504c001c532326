"""What follows from the stages of a run by counting: optimizer steps, evaluations, bytes on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import TrainingArguments

from lcia.planning.rehearsal import Rehearsal, StageRehearsed

FP32 = 4  # bytes


def optimizer_steps(rows: int, arguments: TrainingArguments, max_steps: int, processes: int) -> int:
    """Of one stage, as transformers.Trainer counts them.

    Args:
        max_steps: of this stage; -1 = num_train_epochs decides.
        processes: among which the rows are shared.
    """
    if max_steps > 0:
        return max_steps
    size = arguments.per_device_train_batch_size
    batches = rows // size if arguments.dataloader_drop_last else math.ceil(rows / size)
    each = batches // processes if arguments.dataloader_drop_last else math.ceil(batches / processes)
    per_epoch = max(math.ceil(each / arguments.gradient_accumulation_steps), 1)
    return math.ceil(arguments.num_train_epochs * per_epoch)


@dataclass(frozen=True)
class Evaluations:
    """Cells of the matrix."""

    cells: int
    reusable: int  # at most so many of them repeat an earlier cell: same weights, same prompts


def count_evaluations(tasks: Sequence[str], stages: Sequence[StageRehearsed], answers_change: bool) -> Evaluations:
    """The cells that a run measures, and how many of them cannot differ from the cell above.

    A cell repeats the one above it where its task had been learned by then and the stage in between trained another
    adapter. At most: it is reused only if all its requests are sent to its task's own adapter.

    Args:
        answers_change: every stage changes what answers all requests, as where adapters are summed.
    """
    count = len(tasks)
    if not stages:
        return Evaluations(2 * count, count)  # the base model answers the last row too
    if len(stages) != count:
        return Evaluations(2 * count, 0)
    cells, reusable = count, 0
    learned: dict[str, str] = {}  # task → adapter
    for row, stage in enumerate(stages, start=1):
        cells += min(row + 1, count)
        if not answers_change:
            reusable += sum(adapter != stage.placement.adapter for adapter in learned.values())
        learned |= dict.fromkeys(stage.tasks, stage.placement.adapter)
    return Evaluations(cells, reusable)


@dataclass(frozen=True)
class Disk:
    """Bytes of a run folder: weights and states; tables, logs and predictions are not counted."""

    pool: int  # a copy of what is last in history
    history: int
    checkpoints: int  # at most, while a task is learned
    init: int = 0  # of an Init stage: the merged base, and the adapter that was merged, in history and pool


def count_disk(found: Rehearsal, method: int, checkpoints: int) -> Disk:
    """See `Disk`.

    Args:
        method: bytes that the method holds while a task is learned.
        checkpoints: that there are at once, while a task is learned.
    """

    def files(adapter: str) -> int:
        return FP32 * (found.adapters[adapter] + found.projector)  # the projector has a second file of its own

    history = sum(files(stage.placement.adapter) + stage.state for stage in found.stages)
    one = FP32 * found.trained + found.optimizer + method
    return Disk(
        pool=sum(files(adapter) for adapter in found.adapters),
        history=history,
        checkpoints=checkpoints * one,
    )
