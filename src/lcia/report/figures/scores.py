"""Each task's score while the later ones are learned."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lcia.report.compare import Arena, Series
from lcia.report.figures.layout import (
    ceiling,
    half_width,
    legend,
    legend_rows,
    panel_columns,
    panel_title,
    panels,
    spread,
    styled,
)
from lcia.report.figures.theme import FAINT, drawable, hue, line_look

FEW_LINES = 6  # whose names still fit beside a panel
_SHORT = 16  # characters of such a name
_LABEL_GAP = 0.11  # of a panel's height, between two labels


@styled
def scores_over_time(arena: Arena) -> Figure:
    """Each task's score after every stage, one line a method; dotted: the task itself was just learned."""
    series, n_tasks = arena.series, len(arena.tasks)
    direct = len(series) <= FEW_LINES and max(len(one.label) for one in series) <= _SHORT
    columns = panel_columns(n_tasks)
    figure, axes = panels(n_tasks, columns, 1.9, top_in=0.3 if direct else 0.3 + 0.2 * legend_rows(series))
    top = ceiling(series)
    for column, (axis, task) in enumerate(zip(axes, arena.tasks, strict=True)):
        axis.set_title(panel_title(f"{column + 1} {task}", columns))
        axis.axvline(column + 1, color=FAINT, linestyle="dotted", linewidth=1)
        for number, one in enumerate(series):
            _score_line(axis, one, column, number, few=len(series) <= FEW_LINES)
        axis.set(ylim=(0, top), xlim=(-0.15, n_tasks + 0.15), xticks=_stages(n_tasks))
        if direct:
            _label_ends(axis, series, column, top)
        if column % columns == 0:
            axis.set_ylabel("score, %")
        if column + columns >= n_tasks:
            axis.set_xlabel("tasks learned")
    if not direct:
        legend(figure, series)
    return figure


def _stages(n_tasks: int) -> list[int]:
    """At most nine ticks from 0 to T, both included."""
    step = math.ceil(n_tasks / 7)
    ticks = list(range(0, n_tasks - step // 2, step))
    return [*ticks, n_tasks]


def _score_line(axis: Axes, series: Series, column: int, number: int, few: bool) -> None:
    """The measured scores of one task; a method measured only at the end is a level line up to its mark."""
    scores = series.matrix[:, column]
    stages = [int(stage) for stage in np.flatnonzero(np.isfinite(scores))]
    if not stages:
        return
    if series.is_reference:
        stages = stages[-1:]
        axis.axhline(scores[stages[-1]], color=hue(number), linewidth=1, linestyle=(0, (6, 3)))
    # among many lines, marks at every stage would hide each other
    look = line_look(number) | ({} if few else {"markevery": [-1], "linewidth": 1.2})
    axis.plot(stages, scores[stages], **look, clip_on=False, zorder=3 + number / 100)
    halves = np.array([half_width(series.cell(stage, column)) for stage in stages])
    if few and halves.any():
        low, high = scores[stages] - halves, scores[stages] + halves
        axis.fill_between(stages, low, high, color=hue(number), alpha=0.15, lw=0)


def _label_ends(axis: Axes, series: Sequence[Series], column: int, top: float) -> None:
    """Each line's name beside its right end, moved apart where names would overlap."""
    ends = []
    for number, one in enumerate(series):
        scores = one.matrix[:, column]
        measured = scores[np.isfinite(scores)]
        if measured.size:
            ends.append((float(measured[-1]) / top, number, one.label))
    if not ends:
        axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color=FAINT)
        return
    heights = spread([height for height, _, _ in ends], gap=_LABEL_GAP)
    for height, (_, number, label) in zip(heights, ends, strict=True):
        axis.text(
            1.02,
            height,
            drawable(label),
            transform=axis.transAxes,
            color=hue(number),
            va="center",
            fontsize=8,
        )
