"""Prompts with demonstrations, made to fit: the stream does not know what a token is, a model does."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from lcia.backbone.layout import Layout, Limits
from lcia.backbone.reader import Reader
from lcia.stream import Row, Stream, Task


def fit_demonstrations(stream: Stream, reader: Reader, layout: Layout, limits: Limits) -> Stream:
    """The stream with as many demonstrations in each prompt as leave room for an answer, and a note where some went.

    They go from the last one on, as in Super-NI. What is too long without any is left to whoever uses the row. No row
    of the result has optional parts.
    """
    notes = list(stream.notes)
    tasks = []
    for task in stream:
        left: Counter[int] = Counter()  # demonstrations left in prompts that lost some → prompts

        def fit(row: Row, left: Counter[int] = left) -> Row:
            wanted = len(row.demonstrations)
            for count in range(wanted, 0, -1):
                shorter = row.with_demonstrations(count)
                if layout.fits(len(reader.encode(shorter).prompt), limits.max_new_tokens, limits):
                    break
            else:
                count, shorter = 0, row.with_demonstrations(0)
            left[count] += count < wanted
            return shorter

        train, dev, test = (tuple(map(fit, rows)) for rows in (task.train, task.dev, task.test))
        tasks.append(replace(task, train=train, dev=dev, test=test))
        notes += _notes(task, left)
    return Stream(stream.name, tuple(tasks), tuple(notes))


def _notes(task: Task, left: Counter[int]) -> list[str]:
    if not left.total():
        return []
    total = len(task.train) + len(task.dev) + len(task.test)
    counts = ", ".join(f"{left[count]} keep {count}" for count in sorted(left, reverse=True) if left[count])
    return [f"{task.name}: demonstrations dropped to fit in {left.total()} of {total} prompts: {counts}"]
