"""Tables for the page whose cells are coloured by their value: accuracy matrices and groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lcia.report.compare import Series
from lcia.report.figures import BASE_MODEL, HEAT_ALPHA, Confusion, answers_for, group_order, routed_groups, similarity
from lcia.report.load import Run
from lcia.report.tables import estimate_text, row_names


@dataclass(frozen=True)
class Cell:
    """`strength` in [0, 1] colours it, None means there is no value; `mark` is a CSS class."""

    text: str
    strength: float | None = None
    mark: str = ""
    hint: str = ""

    @property
    def percentage(self) -> str:
        """How much of the heat colour is mixed in."""
        return f"{100 * HEAT_ALPHA * min(1.0, max(0.0, self.strength or 0.0)):.1f}%"


@dataclass(frozen=True)
class HeatTable:
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def matrix_heat(series: Series, top: float) -> HeatTable:
    """The accuracy matrix, mean over seeds.

    Args:
        top: the score of the strongest colour.
    """
    n_tasks = len(series.tasks)
    rows = []
    for row, name in enumerate(row_names(series.tasks)):
        if series.is_reference and 0 < row < n_tasks:
            if row == 1:  # one line stands for all that were not measured
                rows.append((f"after 1 to {n_tasks - 1}", (Cell("", hint="not measured"),) * n_tasks))
            continue
        rows.append((name, tuple(_score(series, row, column, top) for column in range(n_tasks))))
    columns = tuple(f"{i} {task}" for i, task in enumerate(series.tasks, start=1))
    return HeatTable(series.title, columns, tuple(rows))


def _score(series: Series, row: int, column: int, top: float) -> Cell:
    found = series.cell(row, column)
    if found is None:
        return Cell("", hint="not measured")
    learned = row == column + 1 and not series.is_reference
    hint = f"{series.tasks[column]}: {estimate_text(found, len(series.runs))} %"
    return Cell(f"{found.mean:.1f}", found.mean / top, "learned" if learned else "", hint)


def groups_heat(run: Run) -> HeatTable:
    """Similarity of each task's instructions to every group that existed when it came."""
    groups = group_order(run)
    rows = tuple(
        (f"{i} {task}", tuple(_similarity(run, task, group) for group in groups))
        for i, task in enumerate(run.tasks, start=1)
    )
    return HeatTable("", tuple(groups), rows)


def _similarity(run: Run, task: str, group: str) -> Cell:
    score, joined = similarity(run, task, group), run.groups.get(task) == group
    mark = "joined" if joined else ""
    if math.isnan(score):
        return Cell("new", None, mark) if joined else Cell("", hint="did not exist yet")
    return Cell(f"{score:.2f}{' ✓' if joined else ''}", score, mark)


def confusion_heat(run: Run, confusion: Confusion) -> HeatTable:
    """How many test inputs of each task were sent to which group; framed: the task's own group."""
    groups = routed_groups(run, confusion)
    rows = tuple(
        (f"{i} {task}", tuple(_sent(confusion.get(task, {}), group, run.groups.get(task)) for group in groups))
        for i, task in enumerate(run.tasks, start=1)
    )
    return HeatTable("", tuple(group or BASE_MODEL for group in groups), rows)


def _sent(counts: Mapping[str, int], group: str, own: str | None) -> Cell:
    n, total = counts.get(group, 0), sum(counts.values())
    if not total:
        return Cell("", hint="not measured")
    return Cell(str(n), n / total, "joined" if answers_for(group, own) else "", f"{n} of {total}")
