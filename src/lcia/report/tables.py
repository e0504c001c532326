"""Numbers as text: cells shared by the console, Markdown and the page."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from lcia.report.compare import METRICS, Arena, Estimate, Metric, Series, arrange
from lcia.report.load import Run

NOT_MEASURED = "–"
NOT_RECORDED = "not recorded"
_WIDE_STREAM = 8  # tasks; more, and the console's columns move together
_ROW_NAME_WIDTH = 26
_ROW_NAME_WIDTH_WIDE = 20  # so that 19 tasks fit 120 columns

COST_NAMES = {
    "train_s": "Training",
    "eval_s": "Evaluation",
    "evaluations_run": "Evaluations run",
    "evaluations_reused": "Evaluations reused",
    "peak_memory_mib": "Peak memory",
    "trained_parameters": "Trained parameters",
}


@dataclass(frozen=True)
class Grid:
    """A table of text. `best` holds the (row, column) cells that are the best of their column."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()


def duration(seconds: float) -> str:
    """`41 s`, `3 min 12 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count(number: float) -> str:
    """`4.9 M`: three digits are enough to compare."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def cost_text(key: str, value: float) -> str:
    if key.endswith("_s"):
        return duration(value)
    if key.endswith("_mib"):
        return f"{value / 1024:.1f} GiB" if value >= 10240 else f"{value:.0f} MiB"
    return count(value)


def estimate_text(found: Estimate | None, n_runs: int = 1, digits: int = 2) -> str:
    """`61.23 ± 3.40`; says so where only some of the runs measured it."""
    if found is None:
        return NOT_MEASURED
    text = f"{found.mean:.{digits}f}"
    if found.half_width is not None:
        text += f" ± {found.half_width:.{digits}f}"
    return text if found.n == n_runs else f"{text} ({found.n} of {n_runs} seeds)"


def _best_rows(series: Sequence[Series], metric: Metric) -> set[int]:
    """Rows with the best value among the methods that learn task after task; none if all are equal."""
    sign = 1 if metric.higher_is_better else -1
    values = {
        row: sign * found.mean
        for row, one in enumerate(series)
        if not one.is_reference and (found := one.metric(metric.key)) is not None
    }
    top = max(values.values(), default=math.nan)
    best = {row for row, value in values.items() if value == top}
    return best if len(best) < len(values) else set()


def metrics_grid(arena: Arena) -> Grid:
    """One row a series: method, seeds, the five metrics."""
    rows = tuple(
        (
            one.label,
            ", ".join(map(str, one.seeds)),
            *(estimate_text(one.metric(metric.key), len(one.runs)) for metric in METRICS),
        )
        for one in arena.series
    )
    best = frozenset(
        (row, column) for column, metric in enumerate(METRICS, start=2) for row in _best_rows(arena.series, metric)
    )
    return Grid(("Method", "Seeds", *(metric.name for metric in METRICS)), rows, best)


def cost_grid(arena: Arena) -> Grid:
    """One row a series: what it cost, as the mean over its runs."""
    rows = []
    for one in arena.series:
        found = [(key, one.cost(key)) for key in COST_NAMES]
        rows.append((one.label, *(NOT_RECORDED if e is None else cost_text(key, e.mean) for key, e in found)))
    return Grid(("Method", *COST_NAMES.values()), tuple(rows))


def final_scores_grid(arena: Arena) -> Grid:
    """One row a task, one column a series: the score after the last task."""
    n_tasks = len(arena.tasks)
    rows = tuple(
        (
            f"{i + 1} {task}",
            *(estimate_text(one.cell(n_tasks, i), len(one.runs), digits=1) for one in arena.series),
        )
        for i, task in enumerate(arena.tasks)
    )
    return Grid(("Task", *(one.label for one in arena.series)), rows)


def row_names(tasks: Sequence[str]) -> list[str]:
    """What happened before each row of the matrix."""
    return ["before training", *(f"after {i} {task}" for i, task in enumerate(tasks, start=1))]


def _console(title: str) -> Table:
    return Table(title=Text(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False)


def comparison_table(runs: Sequence[Run]) -> Table:
    """For the console: one row a series; the best of each column in bold."""
    arenas = arrange(runs)
    table = _console(arenas[0].title if len(arenas) == 1 else "Comparison")
    table.add_column("Method", overflow="fold")
    table.add_column("Seeds", overflow="fold")
    for metric in METRICS:
        table.add_column(metric.name, justify="right", no_wrap=True)
    table.add_column("Training", justify="right", no_wrap=True)
    for arena in arenas:
        if len(arenas) > 1:
            table.add_section()
            table.add_row(Text(arena.title, style="italic"))
        grid = metrics_grid(arena)
        for number, (row, one) in enumerate(zip(grid.rows, arena.series, strict=True)):
            cells = [Text(cell, "bold" if (number, i) in grid.best else "") for i, cell in enumerate(row)]
            cost = one.cost("train_s")
            table.add_row(*cells, NOT_RECORDED if cost is None else duration(cost.mean))
    return table


def matrix_table(run: Run) -> Table:
    """For the console: the accuracy matrix of one run, percent; `–` was not measured."""
    table = _console(f"{run.method}, seed {run.seed}: score in percent")
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


def _markdown_cell(text: str) -> str:
    return " ".join(html.escape(text, quote=False).replace("|", r"\|").split())


def markdown(grid: Grid) -> str:
    """A pipe table: text to the left, numbers to the right, the best of a column in bold."""
    n_text = 2 if grid.columns[1:2] == ("Seeds",) else 1
    marks = [":--" if i < n_text else "--:" for i in range(len(grid.columns))]
    lines = [[_markdown_cell(name) for name in grid.columns], marks]
    for number, row in enumerate(grid.rows):
        cells = [_markdown_cell(cell) for cell in row]
        lines.append([f"**{cell}**" if (number, i) in grid.best else cell for i, cell in enumerate(cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def comparison_markdown(runs: Sequence[Run]) -> str:
    """The metrics of all runs as Markdown tables, one an arena."""
    parts = []
    for arena in arrange(runs):
        parts.append(f"**{_markdown_cell(arena.title)}**, {len(arena.tasks)} tasks\n\n{markdown(metrics_grid(arena))}")
    return "\n\n".join(parts) + "\n\nPercent; mean ± half width of the 95 % t-interval over seeds.\n"
