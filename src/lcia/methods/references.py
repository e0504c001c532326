"""The two references every table has: no training at all, and training on everything at once."""

from __future__ import annotations

from collections.abc import Sequence

from lcia.methods.base import Method
from lcia.stream import Task


class ZeroShot(Method):
    """No training: the base model answers everything (LCIA, Table 1)."""

    name = "zero_shot"
    one_task_per_adapter = True

    def schedule(self, tasks: Sequence[Task]) -> list[tuple[Task, ...]]:
        return []


class MultiTask(Method):
    """One adapter, all tasks at once, shuffled together: a reference, not a bound (LCIA, Table 1)."""

    name = "multi_task"
    one_task_per_adapter = True

    def schedule(self, tasks: Sequence[Task]) -> list[tuple[Task, ...]]:
        return [tuple(tasks)]
