"""What a stream holds, counted before anything is trained."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lcia.stream.scorers import answer_words
from lcia.stream.types import Row, Stream, Task

if TYPE_CHECKING:
    from rich.console import RenderableType

SHOWN_INSTRUCTIONS = 3  # of each task, in the printed form


@dataclass(frozen=True)
class Lengths:
    """Prompt and first answer together, over all rows of a task, in `unit`s.

    Without a tokenizer the unit is words (characters in scripts without spaces), and since the limit is in
    tokens, nothing is compared with it: `limit` and `over` are None.
    """

    unit: str  # tokens or words
    min: int
    median: float
    max: int
    limit: int | None
    over: int | None  # rows longer than the limit


@dataclass(frozen=True)
class TaskSummary:
    """One task. Two rows ask the same if their turns and images are equal."""

    name: str
    rows: dict[str, int]  # split: rows
    instructions: tuple[str, ...]  # the distinct ones of the training rows
    scorer: str
    image_rows: int
    lengths: Lengths
    test_rows_in_train: int  # test rows that ask what a training row asks
    dev_rows_in_train: int
    repeated: dict[str, int]  # split: rows that ask what an earlier row of the split asks
    group: str | None  # that it would join; None if not computed
    similarity: float | None


@dataclass(frozen=True)
class StreamSummary:
    """A stream in numbers; `as_dict()` is plain JSON, and rich can print it."""

    name: str
    tasks: tuple[TaskSummary, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "tasks": [_plain(task) for task in self.tasks], "notes": list(self.notes)}

    def __rich__(self) -> RenderableType:
        return _render(self)


def describe(
    stream: Stream,
    *,
    count_tokens: Callable[[Row], int] | None = None,
    max_length: int | None = None,
    groups: Mapping[str, tuple[str, float | None]] | None = None,
) -> StreamSummary:
    """Count what a stream holds.

    Args:
        stream: what was loaded.
        count_tokens: tokens of a row's prompt and first answer; None counts words instead.
        max_length: the limit in tokens.
        groups: task name: (group it would join, similarity to it).
    """
    joined = groups or {}
    tasks = (_summary(task, count_tokens, max_length, joined.get(task.name)) for task in stream)
    return StreamSummary(stream.name, tuple(tasks), stream.notes)


def _summary(
    task: Task,
    count_tokens: Callable[[Row], int] | None,
    max_length: int | None,
    joined: tuple[str, float | None] | None,
) -> TaskSummary:
    splits = {"train": task.train, "dev": task.dev, "test": task.test}
    rows = [row for split in splits.values() for row in split]
    lengths = [(count_tokens or _count_words)(row) for row in rows]
    limit = max_length if count_tokens is not None else None
    asked = {_question(row) for row in task.train}
    group, similarity = joined if joined is not None else (None, None)
    return TaskSummary(
        name=task.name,
        rows={name: len(split) for name, split in splits.items()},
        instructions=task.instructions,
        scorer=task.scorer,
        image_rows=sum(bool(row.images) for row in rows),
        lengths=Lengths(
            unit="words" if count_tokens is None else "tokens",
            min=min(lengths),
            median=float(statistics.median(lengths)),
            max=max(lengths),
            limit=limit,
            over=None if limit is None else sum(length > limit for length in lengths),
        ),
        test_rows_in_train=sum(_question(row) in asked for row in task.test),
        dev_rows_in_train=sum(_question(row) in asked for row in task.dev),
        repeated={name: _repeated(split) for name, split in splits.items()},
        group=group,
        similarity=None if similarity is None or not math.isfinite(similarity) else float(similarity),
    )


def _question(row: Row) -> tuple[object, ...]:
    return row.messages, row.images


def _repeated(rows: Sequence[Row]) -> int:
    return len(rows) - len({_question(row) for row in rows})


def _count_words(row: Row) -> int:
    return sum(answer_words(text) for _, text in row.messages) + answer_words(row.outputs[0])


def _plain(task: TaskSummary) -> dict[str, Any]:
    return {**asdict(task), "instructions": list(task.instructions)}


def _render(summary: StreamSummary) -> RenderableType:
    # rich is needed for printing only
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    first = summary.tasks[0].lengths
    limit = "" if first.limit is None else f" (limit {first.limit})"
    title = Text(f"stream {summary.name}: {len(summary.tasks)} tasks, lengths in {first.unit}{limit}")
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("task", overflow="fold", ratio=1)
    table.add_column("train/\ndev/test", justify="right", no_wrap=True)
    table.add_column("min/median\n/max", justify="right", no_wrap=True)
    table.add_column("over\nlimit", justify="right", no_wrap=True)
    table.add_column("test in\ntrain", justify="right", no_wrap=True)
    table.add_column("repeated\nin split", justify="right", no_wrap=True)
    table.add_column("group and\nsimilarity", overflow="fold", ratio=1)
    for task in summary.tasks:
        lengths = task.lengths
        near = "" if task.similarity is None else f" {task.similarity:.3f}"
        table.add_row(
            task.name,
            "/".join(str(count) for count in task.rows.values()),
            f"{lengths.min}/{lengths.median:g}/{lengths.max}",
            "-" if lengths.over is None else str(lengths.over),
            str(task.test_rows_in_train),
            str(sum(task.repeated.values())),
            "-" if task.group is None else f"{task.group}{near}",
        )
    # Text, not str: brackets in an instruction are no markup
    lines = [Text(f"{task.name} ({task.scorer}): {_instructions(task.instructions)}") for task in summary.tasks]
    notes = [Text(f"- {note}") for note in summary.notes]
    headed = [Text("notes", style="bold"), *notes] if notes else []
    return Group(table, Text("instructions (and scorer)", style="bold"), *lines, *headed)


def _instructions(instructions: Sequence[str]) -> str:
    shown = [repr(" ".join(text.split())) for text in instructions[:SHOWN_INSTRUCTIONS]]
    more = len(instructions) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
