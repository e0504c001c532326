"""Episodic memory: `memory` training rows of every learned task, for methods that look at them again later.

Rows are kept by the adapter that learned them: in a run with groups, a task meets rows of its own group only. Those of
other groups are answered by other weights, which training here does not touch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lcia.methods.base import Method, Training
from lcia.methods.options import count
from lcia.methods.passes import draw
from lcia.stream import Row, Task


def row_to_json(row: Row) -> dict[str, Any]:
    """A row as JSON values."""
    return {field.name: _lists(getattr(row, field.name)) for field in fields(row)}


def row_from_json(value: Mapping[str, Any]) -> Row:
    """The row that `row_to_json` gave."""
    return Row(**{name: _tuples(part) for name, part in value.items()})


def _lists(value: Any) -> Any:
    return [_lists(part) for part in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value


class EpisodicMemory(Method):
    """Keeps rows of each task when it is closed; what they are good for is up to the classes that build on it.

    Args:
        memory: rows kept of each task, a draw that depends on the task's name alone; null = all.
    """

    idle_on_first_task = True

    def __init__(self, *, memory: int | None = 10) -> None:
        self._size = count("memory", memory)
        self._memory: dict[str, dict[str, list[Row]]] = {}  # adapter → task → rows
        self._training: Training | None = None

    def remembered(self, adapter: str) -> list[Row]:
        """The rows kept of all tasks that `adapter` learned, oldest task first."""
        return [row for rows in self._memory.get(adapter, {}).values() for row in rows]

    def begin(self, training: Training) -> None:
        self._training = training

    def close_task(self, task: Task) -> None:
        assert self._training is not None
        # A row too long to be trained on is not worth a place; one fed from a memory belongs to another task.
        trained = set(self._training.rows)
        rows = [row for row in task.train if row in trained]
        learned = self._memory.setdefault(self._training.placement.adapter, {})
        learned[task.name] = draw(rows, self._size, task.name, "memory")
        self._training = None

    def state_dict(self) -> dict[str, Any]:
        return {
            "memory": {
                adapter: {task: [row_to_json(row) for row in rows] for task, rows in learned.items()}
                for adapter, learned in self._memory.items()
            }
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._memory = {
            adapter: {task: [row_from_json(row) for row in rows] for task, rows in learned.items()}
            for adapter, learned in state["memory"].items()
        }

    def adapters_changed(self, origin: Mapping[str, str]) -> None:
        known = self._memory
        self._memory = {name: dict(known[source]) for name, source in origin.items() if source in known}

    def cost(self) -> dict[str, float]:
        return {"examples_stored": sum(len(self.remembered(adapter)) for adapter in self._memory)}
