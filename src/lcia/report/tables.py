"""Numbers as text: cells shared by the console, Markdown and the page."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lcia.report.compare import METHOD_COSTS, METRICS, Arena, Estimate, Metric, OverOrders, Series
from lcia.report.load import Run
from lcia.report.significance import ALPHA, Scope, Test, compare_runs
from lcia.report.statistics import CONFIDENCE, RESAMPLES, SIGN_FLIPS, t_factor

NOT_MEASURED = "–"
NOT_RECORDED = "not recorded"
_FEW_REPEATS = 3  # of so many seeds or orders a t-test sees only very large differences
_LEAST_P = 0.0005  # less is 0.000 in print

COST_NAMES = {
    "train_s": "Training",
    "eval_s": "Evaluation",
    "evaluations_run": "Evaluations run",
    "evaluations_reused": "Evaluations reused",
    "peak_memory_mib": "Peak memory",
    "trained_parameters": "Trained parameters",
    "stored_parameters": "Stored parameters",
    "numbers_stored": "Numbers stored",
    "examples_stored": "Examples stored",
    "adapters_stored": "Adapters stored",
    "extra_forward_rows": "Extra rows forward",
    "extra_backward_rows": "Extra rows backward",
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


def estimate_text(found: Estimate | None, n_runs: int = 1, digits: int = 2, unit: str = "seeds") -> str:
    """`61.23 ± 3.40`; says so where only some of the seeds (orders) measured it."""
    if found is None:
        return NOT_MEASURED
    text = f"{found.mean:.{digits}f}"
    if found.half_width is not None:
        text += f" ± {found.half_width:.{digits}f}"
    return text if found.n == n_runs else f"{text} ({found.n} of {n_runs} {unit})"


def metric_text(series: Series, key: str) -> str:
    """`61.23 ± 3.40 [58.1, 64.4]`: over seeds, where there are several, and over test rows."""
    text, interval = estimate_text(series.metric(key), len(series.runs)), series.row_interval(key)
    return text if interval is None else f"{text} [{interval.low:.1f}, {interval.high:.1f}]"


def interval_words(series: Iterable[Series]) -> list[str]:
    """What the intervals in a table of these series are."""
    keys = [metric.key for metric in METRICS]
    series = list(series)
    words = []
    if any(interval.over == "seeds" for one in series for key in keys if (interval := one.interval(key))):
        words.append(f"± half width of the {100 * CONFIDENCE:g} % t-interval over seeds")
    if any(one.row_interval(key) for one in series for key in keys):
        words.append(
            f"[low, high]: {100 * CONFIDENCE:g} % bootstrap interval over test rows ({RESAMPLES:,} resamples, "
            "stratified by task, the same rows for all seeds), which says nothing about other seeds"
        )
    return words


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
            *(metric_text(one, metric.key) for metric in METRICS),
        )
        for one in arena.series
    )
    best = frozenset(
        (row, column) for column, metric in enumerate(METRICS, start=2) for row in _best_rows(arena.series, metric)
    )
    return Grid(("Method", "Seeds", *(metric.name for metric in METRICS)), rows, best)


def cost_grid(arena: Arena, keys: Sequence[str] = tuple(COST_NAMES)) -> Grid:
    """One row a series: what it cost, as the mean over its runs. A method's own costs only where a run names them."""
    keys = [key for key in keys if key not in METHOD_COSTS or any(one.cost(key) for one in arena.series)]
    rows = []
    for one in arena.series:
        cells = []
        for key in keys:
            found, absent = one.cost(key), NOT_MEASURED if key in METHOD_COSTS else NOT_RECORDED
            cells.append(absent if found is None else cost_text(key, found.mean))
        rows.append((one.label, *cells))
    return Grid(("Method", *(COST_NAMES[key] for key in keys)), tuple(rows))


def orders_grid(found: OverOrders) -> Grid:
    """One row a method: Avg.ACC in each order, over seeds; then Avg.ACC, Forgetting and New.ACC over the orders."""
    n_orders = len(found.arenas)
    rows = []
    for label in found.labels:
        in_orders = [arena.named(label) for arena in found.arenas]
        per_order = [NOT_MEASURED if one is None else metric_text(one, "avg_acc") for one in in_orders]
        over = [estimate_text(found.metric(label, metric.key), n_orders, unit="orders") for metric in METRICS[:3]]
        rows.append((label, *per_order, *over))
    orders = [f"Avg.ACC, order {arena.order}" for arena in found.arenas]
    names = [f"{metric.name}, all orders" for metric in METRICS[:3]]
    return Grid(("Method", *orders, *names), tuple(rows))


def p_text(p: float | None) -> str:
    if p is None:
        return NOT_MEASURED
    return f"< {2 * _LEAST_P:g}" if p < _LEAST_P else f"{p:.3f}"


def significance_grid(scope: Scope) -> Grid:
    """One row a method: its Avg.ACC less the reference's, and p of both tests, raw and corrected."""
    rows = []
    for one in scope.contrasts:
        shown = NOT_MEASURED
        if one.difference is not None:
            half = one.difference.half_width
            shown = f"{one.difference.mean:+.2f}".replace("-", "−") + ("" if half is None else f" ± {half:.2f}")
        rows.append((one.label, shown, *_test_texts(one.repeats), *_test_texts(one.examples)))
    over = scope.over
    columns = (over.capitalize(), f"p, {over}", "Holm", "Test rows", "p, test rows", "Holm")
    return Grid(("Method", "Difference in Avg.ACC", *columns), tuple(rows))


def _test_texts(test: Test) -> tuple[str, str, str]:
    return str(test.n), p_text(test.p), p_text(test.corrected)


def significance_notes(scopes: Sequence[Scope]) -> list[str]:
    """How the tests are to be read, how weak they are, and which could not be made."""
    contrasts = [one for scope in scopes for one in scope.contrasts]
    if not contrasts:
        return []
    repeats, examples = max(one.repeats.family for one in contrasts), max(one.examples.family for one in contrasts)
    notes = [
        "p, seeds (or orders): paired t-test of no difference, against what another seed would change. p, test rows: "
        f"paired permutation test ({SIGN_FLIPS:,} sign flips), against what other test rows would change for these "
        "trained models. "
        f"Holm: corrected for all comparisons of all tables ({repeats} over seeds or orders, {examples} over test "
        f"rows); below {ALPHA:g} is significant."
    ]
    for scope in scopes:
        for n in sorted({one.repeats.n for one in scope.contrasts if one.repeats.p is not None}):
            if n <= _FEW_REPEATS:
                notes.append(
                    f"{scope.title}: {n} {scope.over} are few. Even uncorrected, p is below {ALPHA:g} only from "
                    f"{t_factor(n):.1f} standard errors on, so a large p says little."
                )
        untested: dict[str, list[str]] = {}
        for one in scope.contrasts:
            for over, test in ((scope.over, one.repeats), ("test rows", one.examples)):
                if test.missing:
                    untested.setdefault(f"no test over {over}, {test.missing}", []).append(one.label)
            if one.unshared_rows:
                notes.append(
                    f"{scope.title}: {one.label} and {one.reference} did not answer the same test rows; "
                    f"{one.unshared_rows} that only one of them answered are left out."
                )
        notes += [f"{scope.title}: {why}: {', '.join(labels)}." for why, labels in untested.items()]
    return notes


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


def comparison_markdown(runs: Sequence[Run], against: str | None = None) -> str:
    """The metrics of all runs, and the tests against a reference, as Markdown tables, one an arena.

    Args:
        against: see `lcia.report.compare_runs`.
    """
    found = compare_runs(runs, against)
    parts = [
        f"**{_markdown_cell(arena.title)}**, {len(arena.tasks)} tasks\n\n{markdown(metrics_grid(arena))}"
        for arena in found.arenas
    ]
    parts += [f"**{_markdown_cell(orders.title)}**\n\n{markdown(orders_grid(orders))}" for orders in found.orders]
    words = interval_words(one for arena in found.arenas for one in arena.series)
    parts.append("; ".join(["Percent", *words]) + ".")
    tested = [scope for scope in found.all_scopes if scope.contrasts]
    parts += [
        f"**{_markdown_cell(f'{one.title}: against {one.reference}')}**\n\n{markdown(significance_grid(one))}"
        for one in tested
    ]
    parts += [_markdown_cell(note) for note in significance_notes(tested)]
    return "\n\n".join(parts) + "\n"
