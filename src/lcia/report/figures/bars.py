"""Horizontal bars, one a method: final scores, metrics, cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lcia.report.compare import METRICS, Arena, Estimate, Interval, Series
from lcia.report.figures.layout import ceiling, panel_columns, panel_title, panels, styled
from lcia.report.figures.theme import FAINT, INK, RULE, fitted, hue
from lcia.report.tables import cost_text

_ROW_IN = 0.21  # height of a bar with the room around it
_COSTS = {
    "train_s": "training time",
    "eval_s": "evaluation time",
    "peak_memory_mib": "peak memory",
    "trained_parameters": "trained parameters",
    "stored_parameters": "stored parameters",
}


@dataclass(frozen=True)
class _Panel:
    title: str
    values: Sequence[Estimate | None]  # one a series
    texts: Sequence[str]
    intervals: Sequence[Interval | None]
    top: float | None = None  # of the axis; None: the longest bar


@styled
def final_bars(arena: Arena) -> Figure:
    """Every task's score after the last one, one bar a method, with the 95 % interval over seeds."""
    n_tasks, top = len(arena.tasks), ceiling(arena.series)
    found = []
    for i, task in enumerate(arena.tasks):
        values = [one.cell(n_tasks, i) for one in arena.series]
        intervals = [None if value is None else value.interval for value in values]
        found.append(_Panel(f"{i + 1} {task}", values, _scores(values), intervals, top))
    return _draw(arena.series, found, panel_columns(n_tasks))


@styled
def metric_bars(arena: Arena) -> Figure:
    """Avg.ACC, Forgetting and New.ACC, one bar a method, with its 95 % interval (see `Series.interval`)."""
    found = []
    for metric in METRICS[:3]:
        values = [one.metric(metric.key) for one in arena.series]
        direction = "higher" if metric.higher_is_better else "lower"
        intervals = [one.interval(metric.key) for one in arena.series]
        found.append(_Panel(f"{metric.name}, {direction} is better", values, _scores(values), intervals))
    return _draw(arena.series, found, len(found))


@styled
def cost_bars(arena: Arena) -> Figure:
    """Training and evaluation time, peak memory, trained and stored parameters: one bar a method, mean over seeds."""
    found = []
    for key, title in _COSTS.items():
        values = [one.cost(key) for one in arena.series]
        texts = ["" if value is None else cost_text(key, value.mean) for value in values]
        found.append(_Panel(title, values, texts, [None] * len(values)))
    return _draw(arena.series, found, len(found))


def _scores(values: Sequence[Estimate | None]) -> list[str]:
    return ["" if value is None else f"{value.mean:.1f}" for value in values]


def _draw(series: Sequence[Series], found: Sequence[_Panel], columns: int) -> Figure:
    """The panels in rows; the methods' names stand at the left of each row only."""
    figure, axes = panels(len(found), columns, 0.42 + _ROW_IN * max(len(series), 2))
    for number, (panel, axis) in enumerate(zip(found, axes, strict=True)):
        _bars(axis, panel, series, named=number % columns == 0, title=panel_title(panel.title, columns))
    return figure


def _bars(axis: Axes, panel: _Panel, series: Sequence[Series], named: bool, title: str) -> None:
    """The first series on top, each with its number behind the bar; absent values say so."""
    axis.set_title(title)
    axis.set_yticks(range(len(series)), [fitted(one.label, 26) for one in series] if named else [""] * len(series))
    axis.set_ylim(max(len(series), 2) - 0.4, -0.6)
    axis.set_xticks([])
    axis.grid(visible=False)
    axis.tick_params(axis="y", length=0)
    axis.spines["bottom"].set_visible(False)
    axis.spines["left"].set_visible(False)
    axis.axvline(0, color=RULE, lw=1)
    ends = [0.0]
    for row, (value, interval) in enumerate(zip(panel.values, panel.intervals, strict=True)):
        if value is None:
            axis.text(0, row, " –", va="center", color=FAINT, fontsize=7.5)
            continue
        low, high = (value.mean, value.mean) if interval is None else (interval.low, interval.high)
        axis.barh(row, value.mean, height=0.66, color=hue(row), alpha=0.85, lw=0)
        if high > low:  # a whisker from end to end: a bootstrap interval need not hold the value itself
            axis.errorbar((low + high) / 2, row, xerr=(high - low) / 2, color=INK, lw=1, capsize=2, fmt="none")
        end = max(0.0, value.mean, high)
        axis.annotate(panel.texts[row], (end, row), (4, 0), textcoords="offset points", va="center", fontsize=7.5)
        ends += [end, min(0.0, value.mean, low)]
    low, high = min(ends), max(panel.top or 0.0, *ends)
    span = (high - low) or 1.0
    axis.set_xlim(low - 0.02 * span, high + 0.28 * span)  # room for the number behind the longest bar
