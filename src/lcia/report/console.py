"""The tables of the console."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from lcia.report.compare import METHOD_COSTS, METRICS, Arena, arrange
from lcia.report.load import LeftOut, Run, left_out_title
from lcia.report.significance import compare_runs
from lcia.report.tables import (
    NOT_MEASURED,
    NOT_RECORDED,
    Grid,
    cost_grid,
    duration,
    interval_words,
    metrics_grid,
    orders_grid,
    row_names,
    significance_grid,
    significance_notes,
)

_WIDE_STREAM = 8  # tasks; more, and the console's columns move together
_COSTS = ("train_s", "peak_memory_mib", "trained_parameters", "stored_parameters", *METHOD_COSTS)
_ROW_NAME_WIDTH = 26
_ROW_NAME_WIDTH_WIDE = 20  # so that 19 tasks fit 120 columns


def _console(title: str) -> Table:
    return Table(
        title=Text(title),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        pad_edge=False,
        collapse_padding=True,
    )


def comparison_table(runs: Sequence[Run]) -> Table:
    """For the console: one row a series; the best of each column in bold."""
    return _metrics_table(arrange(runs))


def comparison_tables(
    runs: Sequence[Run], against: str | None = None, left_out: Sequence[LeftOut] = ()
) -> list[Table | Text]:
    """For the console: metrics; the orders together; tests against a reference; what the methods themselves cost; what
    was left out.

    Args:
        against: see `lcia.report.compare_runs`.
        left_out: what was given beside the runs, see `lcia.report.load_runs`.
    """
    found = compare_runs(runs, against)
    tables: list[Table | Text] = [_metrics_table([arena]) for arena in found.arenas]
    tables += [_grid_table(one.title, orders_grid(one)) for one in found.orders]
    tested = [scope for scope in found.all_scopes if scope.contrasts]
    contrasts = [_grid_table(f"{one.title}: against {one.reference}", significance_grid(one)) for one in tested]
    if tested:
        contrasts[-1].caption = Text("\n".join(significance_notes(tested)))
    tables += contrasts
    named = [arena for arena in found.arenas if any(one.cost(key) for one in arena.series for key in METHOD_COSTS)]
    tables += [_grid_table(f"{arena.title}: cost", cost_grid(arena, _COSTS)) for arena in named]
    if left_out:
        tables.append(Text("\n  ".join([left_out_title(runs, left_out), *map(str, left_out)])))
    return tables


def _metrics_table(arenas: Sequence[Arena]) -> Table:
    table = _console(arenas[0].title if len(arenas) == 1 else "Comparison")
    table.add_column("Method", overflow="fold")
    table.add_column("Seeds", overflow="fold")
    for metric in METRICS:
        table.add_column(metric.name, justify="right", min_width=len(metric.name), overflow="fold")
    table.add_column("Training", justify="right")
    for arena in arenas:
        if len(arenas) > 1:
            table.add_section()
            table.add_row(Text(arena.title, style="italic"))
        grid = metrics_grid(arena)
        for number, (row, one) in enumerate(zip(grid.rows, arena.series, strict=True)):
            cost = one.cost("train_s")
            table.add_row(*_row(grid, number, row), NOT_RECORDED if cost is None else duration(cost.mean))
    words = interval_words(one for arena in arenas for one in arena.series)
    table.caption = Text("; ".join(["percent", *words])) if words else None
    return table


def _row(grid: Grid, number: int, row: Sequence[str]) -> list[Text]:
    """The best of a column in bold; an interval stands below its value, or five of them would be too wide."""
    return [
        Text(re.sub(r" (?=[±\[(])", "\n", cell) if i else cell, "bold" if (number, i) in grid.best else "")
        for i, cell in enumerate(row)
    ]


def _grid_table(title: str, grid: Grid) -> Table:
    table = _console(title)
    for i, name in enumerate(grid.columns):
        table.add_column(Text(name), justify="right" if i else "left", overflow="fold")
    for number, row in enumerate(grid.rows):
        table.add_row(*_row(grid, number, row))
    return table


def matrix_table(run: Run) -> Table:
    """For the console: the accuracy matrix of one run, percent; `–` was not measured."""
    table = _console(f"{run.method}, seed {run.seed}: percent")
    wide = len(run.tasks) > _WIDE_STREAM
    table.padding = (0, 0 if wide else 1)
    table.add_column("", no_wrap=True, max_width=_ROW_NAME_WIDTH_WIDE if wide else _ROW_NAME_WIDTH)
    for number in range(1, len(run.tasks) + 1):  # the rows carry the names
        table.add_column(str(number), justify="right", no_wrap=True)
    last = len(run.tasks)
    for number, (name, row) in enumerate(zip(row_names(run.tasks), run.matrix, strict=True)):
        cells = [NOT_MEASURED if value is None else f"{value:.1f}" for value in row]
        table.add_row(Text(name), *cells, style="bold" if number == last else "")
    return table
