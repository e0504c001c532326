"""Data sets that the library `datasets` reads: of the hub, or what its `save_to_disk` wrote."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lcia.errors import UserError
from lcia.stream.formats import Draft, Faults, Place, read_records
from lcia.stream.task_source import PositionalSplit, TaskSource

SUPER_NI_COLUMNS = ("task_name", "definition", "inputs", "targets")
_BATCH = 10_000  # rows whose task is looked at together

Piece = tuple[str, list[int], Any]  # name of the part, numbers of the rows in it, from 1, and the rows: a Dataset


def load_data_set(name: str) -> dict[str | None, Any]:
    """{split: Dataset}; the split is None where there are none.

    Args:
        name: a hub id, or a folder that `save_to_disk` wrote.

    Raises:
        UserError: it cannot be loaded.
    """
    # imported here: only these sources need it, and it loads for seconds
    import datasets

    try:
        loaded = datasets.load_from_disk(name) if Path(name).is_dir() else datasets.load_dataset(name)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"data set {name!r} cannot be loaded, from a folder or from the hub: {error}") from error
    return dict(loaded) if isinstance(loaded, Mapping) else {None: loaded}


def super_ni_tasks(name: str, tasks: Sequence[str], split: PositionalSplit) -> dict[str, TaskSource]:
    """Those of the tasks that a mirror of Super-NaturalInstructions has: one data set, whose rows name their task.

    The data set's own splits are of tasks, not of rows: all are looked at, and each task's rows are split anew.

    Args:
        name: see `load_data_set`.
        split: of a task's instances, in the order of the data set.

    Raises:
        UserError: it cannot be loaded, or lacks a column.
    """
    pieces: dict[str, list[Piece]] = {task: [] for task in tasks}
    for part, rows in load_data_set(name).items():
        for column in SUPER_NI_COLUMNS:
            if column not in rows.column_names:
                raise UserError(
                    f"data set {name!r}: no column {column!r} (there are {', '.join(rows.column_names)}); a mirror of "
                    f"Super-NaturalInstructions has {', '.join(SUPER_NI_COLUMNS)}, and may have id"
                )
        of_task = rows.select_columns("task_name")
        numbers: dict[str, list[int]] = {}
        for batch in range(0, len(rows), _BATCH):
            for i, task in enumerate(of_task[batch : batch + _BATCH]["task_name"], start=batch):
                if task in pieces:
                    numbers.setdefault(task, []).append(i)
        for task, found in numbers.items():
            pieces[task].append((str(part or "data"), [i + 1 for i in found], rows.select(found)))
    return {
        task: TaskSource(task, ((Path(name), None),), split=split, reader=partial(_read_task, name, found))
        for task, found in pieces.items()
        if found
    }


def _read_task(
    name: str, pieces: Sequence[Piece], path: Path, split: str | None, faults: Faults, notes: list[str]
) -> list[Draft]:
    return read_records(_instances(name, pieces, faults), faults)


def _instances(name: str, pieces: Sequence[Piece], faults: Faults) -> Iterator[Place]:
    """The rows of one id (of one input, where there are no ids) as one row that holds all their targets."""
    merged: dict[Any, tuple[str, int, dict[str, Any]]] = {}
    for part, numbers, rows in pieces:
        for number, row in zip(numbers, rows, strict=True):
            source = f"{name}/{part}:row {number}"
            targets = row["targets"] if isinstance(row["targets"], list) else [row["targets"]]
            record = {"id": row.get("id"), "input": row["inputs"], "instruction": row["definition"], "output": targets}
            first, _, known = merged.setdefault(row.get("id") or row["inputs"], (source, number, record))
            if known is record:
                continue
            if (known["input"], known["instruction"]) != (record["input"], record["instruction"]):
                faults.add(UserError(f"{source}: the id {record['id']!r} is that of another input, at {first}"))
                continue
            known["output"] += [target for target in targets if target not in known["output"]]
    yield from merged.values()
