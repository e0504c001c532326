"""Final scores as a radar: the paper's Figure 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes
from numpy.typing import NDArray

from lcia.report.compare import Arena, Series
from lcia.report.figures.layout import WIDTH_IN, ceiling, legend, styled
from lcia.report.figures.theme import FAINT, RULE, fitted, hue, line_look, new_figure

MIN_RADAR_TASKS = 3  # fewer enclose no area
SHARED_RADAR = 4  # methods; more would hide each other
_COLUMNS = 5


@styled
def radar(arena: Arena) -> Figure:
    """Final scores, one axis a task.

    Up to four methods share one radar; more get one each, before the best score of any method in grey.
    """
    series = arena.series
    if len(series) <= SHARED_RADAR:
        figure = new_figure(WIDTH_IN * 0.62, 4.6)
        _radar(_polar(figure, 1, 1, 1), arena, list(enumerate(series)), named=True)
        legend(figure, series)
        return figure
    rows = math.ceil(len(series) / _COLUMNS)
    columns = math.ceil(len(series) / rows)
    figure = new_figure(WIDTH_IN, (WIDTH_IN / columns + 0.25) * rows)
    for number, one in enumerate(series):
        axis = _polar(figure, rows, columns, number + 1)
        _radar(axis, arena, [(number, one)], named=False)
        axis.set_title(fitted(one.label, 110 // columns, lines=2), loc="center", pad=10)
    return figure


def _polar(figure: Figure, rows: int, columns: int, place: int) -> PolarAxes:
    return cast(PolarAxes, figure.add_subplot(rows, columns, place, projection="polar"))


def _radar(axis: PolarAxes, arena: Arena, members: Sequence[tuple[int, Series]], named: bool) -> None:
    """One radar; without names the axes carry the tasks' numbers."""
    n_tasks, top = len(arena.tasks), ceiling(arena.series)
    angles = np.linspace(0, 2 * np.pi, n_tasks, endpoint=False)
    axis.set_theta_offset(np.pi / 2)
    axis.set_theta_direction(-1)
    axis.set(ylim=(0, top), yticks=[top / 2, top], yticklabels=[])
    axis.spines["polar"].set(color=RULE)
    axis.grid(visible=True, axis="both", color=RULE)
    names = [fitted(f"{i} {task}", 18, lines=2) if named else str(i) for i, task in enumerate(arena.tasks, start=1)]
    axis.set_xticks(angles, names)
    axis.tick_params(axis="x", pad=2 if named else -3, labelsize=8 if named else 6.5)
    if named:
        for label, angle in zip(axis.get_xticklabels(), angles, strict=True):
            side = math.sin(angle)
            label.set_horizontalalignment("center" if abs(side) < 0.2 else "left" if side > 0 else "right")
    else:
        best = np.max([_final(one) for one in arena.series], axis=0)
        axis.fill(angles, best, color=FAINT, alpha=0.18, lw=0)
    for number, one in members:
        scores = _final(one)
        closed = np.append(angles, angles[0]), np.append(scores, scores[0])
        axis.plot(*closed, **line_look(number), markersize=3.5 if named else 2.5, clip_on=False)
        axis.fill(*closed, color=hue(number), alpha=0.08, lw=0)


def _final(series: Series) -> NDArray[np.float64]:
    """(T,) the last row; what was not measured lies at the centre."""
    return np.nan_to_num(series.matrix[-1], nan=0.0)
