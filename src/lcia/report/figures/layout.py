"""What the figures share: the style, panels, the legend, score axes, heat maps."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import ParamSpec

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from lcia.report.compare import Estimate, Series
from lcia.report.figures.theme import HEAT, HEAT_ALPHA, PAPER, fitted, line_look, new_figure, style

WIDTH_IN = 10.0
_LEGEND_CHARACTERS = 120  # of a line of the legend, handles included

P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw inside the report's style."""

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with style():
            return draw(*args, **kwargs)

    return drawn


def panel_columns(n_tasks: int) -> int:
    """Columns of small multiples with one panel a task."""
    return 3 if n_tasks <= 9 else 4


def panel_title(text: str, columns: int) -> str:
    """As much of the text as fits above a panel without reaching into the next one."""
    return fitted(text, 104 // columns)


def panels(n: int, columns: int, panel_height_in: float, top_in: float = 0.0) -> tuple[Figure, list[Axes]]:
    """n panels, row by row, on a figure of the page's width; few panels keep the width of many."""
    rows = math.ceil(n / columns)
    figure = new_figure(WIDTH_IN, rows * panel_height_in + top_in)
    figure.set_layout_engine("constrained", h_pad=0.07, w_pad=0.05)
    grid = figure.add_gridspec(rows, columns)
    return figure, [figure.add_subplot(grid[i // columns, i % columns]) for i in range(n)]


def legend_rows(series: Sequence[Series]) -> int:
    return math.ceil(len(series) / _legend_columns(series))


def _legend_columns(series: Sequence[Series]) -> int:
    longest = max(len(fitted(one.label, 40)) for one in series)
    return max(1, min(len(series), _LEGEND_CHARACTERS // (longest + 8)))


def legend(figure: Figure, series: Sequence[Series]) -> None:
    """Above the panels, in as many columns as the longest label allows."""
    # the space: matplotlib leaves out labels that begin with an underscore
    labels = [f" {fitted(one.label, 40)}" for one in series]
    handles = [Line2D([], [], **line_look(i)) for i in range(len(series))]
    figure.legend(handles, labels, loc="outside upper left", ncols=_legend_columns(series), handlelength=3)


def ceiling(series: Sequence[Series]) -> float:
    """The top of every score axis of an arena: the next ten above the largest score, 100 at most."""
    scores = np.concatenate([one.matrix.ravel() for one in series])
    largest = float(np.nanmax(scores, initial=0.0))
    return min(100.0, max(10.0, math.ceil(largest / 10) * 10))


def half_width(found: Estimate | None) -> float:
    return 0.0 if found is None or found.half_width is None else found.half_width


def spread(values: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Positions near the values, in their order, at least `gap` apart, inside [low, high] where they fit."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    positions = [0.0] * len(values)
    floor = low
    for i in order:
        positions[i] = max(values[i], floor)
        floor = positions[i] + gap
    roof = max(high, low + gap * (len(values) - 1))
    for i in reversed(order):
        positions[i] = min(positions[i], roof)
        roof = positions[i] - gap
    return positions


def _channels(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def heat_map(axis: Axes, values: NDArray[np.float64], top: float) -> None:
    """Coloured cells from 0 to `top`, the same shades as the page's tables; NaN stays blank.

    Args:
        values: (rows, columns).
    """
    strongest = [HEAT_ALPHA * a + (1 - HEAT_ALPHA) * b for a, b in zip(_channels(HEAT), _channels(PAPER), strict=True)]
    shades = LinearSegmentedColormap.from_list("heat", [_channels(PAPER), tuple(strongest)])
    axis.imshow(np.ma.masked_invalid(values), cmap=shades, vmin=0, vmax=top, aspect="auto")
    axis.grid(visible=False)
    axis.tick_params(length=0)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)


def slant_labels(axis: Axes) -> None:
    """Long names below the columns, each ending under its own column."""
    axis.tick_params(axis="x", labelrotation=40)
    for label in axis.get_xticklabels():
        label.set(horizontalalignment="right", rotation_mode="anchor")
