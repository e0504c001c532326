"""The accuracy matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from lcia.report.compare import Series
from lcia.report.figures.layout import heat_map, panels, slant_labels, styled
from lcia.report.figures.theme import FAINT, INK, fitted

_CELL_IN = 0.28
SIDE_BY_SIDE = 8  # tasks; wider matrices stand below each other


@styled
def matrices(series: Sequence[Series], top: float) -> Figure:
    """Accuracy matrices side by side: row = tasks learned so far, column = task, dot = not measured.

    Args:
        top: the score of the strongest colour, the same for all matrices that are compared.
    """
    tasks = series[0].tasks
    n_tasks = len(tasks)
    columns = 2 if n_tasks <= SIDE_BY_SIDE else 1
    figure, axes = panels(len(series), columns, (n_tasks + 1) * _CELL_IN + 1.5)
    for axis, one in zip(axes, series, strict=True):
        heat_map(axis, one.matrix, top)
        axis.set_title(fitted(one.title, 60))
        axis.set_xticks(range(n_tasks), [fitted(f"{i} {task}", 18) for i, task in enumerate(tasks, start=1)])
        slant_labels(axis)
        axis.set_yticks(range(n_tasks + 1), ["before", *(f"after {i}" for i in range(1, n_tasks + 1))])
        for row, column in np.ndindex(one.matrix.shape):
            score = one.matrix[row, column]
            text, colour = ("·", FAINT) if math.isnan(score) else (f"{score:.1f}", INK)
            axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=7.5)
    return figure
