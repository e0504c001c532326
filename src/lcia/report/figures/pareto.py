"""What a method's score costs: Avg.ACC against training time, trained and stored parameters, stored examples."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lcia.report.compare import PARETO_COSTS, Arena, Series, cost_of, pareto_front
from lcia.report.figures.layout import legend, legend_rows, panels, styled
from lcia.report.figures.theme import FAINT, INK, PAPER, hue, line_look
from lcia.report.tables import cost_text

_COLUMNS = 4
_TITLES = {
    "train_s": "training time",
    "trained_parameters": "trained parameters",
    "stored_parameters": "stored parameters",
    "examples_stored": "examples stored",
}


def recorded_costs(arena: Arena) -> list[str]:
    """The costs that any run names."""
    return [key for key in PARETO_COSTS if any(one.cost(key) for one in arena.series)]


@styled
def pareto(arena: Arena) -> Figure:
    """Avg.ACC against each cost, one mark a method.

    Filled and joined by a line: no other method has at least the Avg.ACC for at most the cost. Grey ring: measured
    only after the whole stream, and not in the contest.
    """
    keys = recorded_costs(arena)
    figure, axes = panels(len(keys), _COLUMNS, 2.6, top_in=0.3 + 0.2 * legend_rows(arena.series))
    for number, (key, axis) in enumerate(zip(keys, axes, strict=True)):
        _panel(axis, arena.series, key)
        axis.set_title(_TITLES[key])
        if number == 0:
            axis.set_ylabel("Avg.ACC, %")
    legend(figure, arena.series)
    return figure


def _panel(axis: Axes, series: Sequence[Series], key: str) -> None:
    front = pareto_front(series, key)
    stairs = []
    for number, one in enumerate(series):
        cost, score = cost_of(one, key), one.metric("avg_acc")
        if cost is None or score is None:
            continue
        best = one.label in front
        if best:
            stairs.append((cost, score.mean))
        axis.plot(
            cost,
            score.mean,
            marker=line_look(number)["marker"],
            markersize=7,
            color=hue(number),
            markerfacecolor=hue(number) if best else PAPER,
            markeredgewidth=1.4,
            linestyle="none",
            zorder=3,
        )
        if one.is_reference:
            axis.plot(cost, score.mean, marker="o", markersize=13, color=FAINT, fillstyle="none", linestyle="none")
    stairs.sort()
    if len(stairs) > 1:
        # what can be had for a cost: the score of the dearest method up to it
        axis.step(*zip(*stairs, strict=True), where="post", color=INK, linewidth=0.9, zorder=2)
    axis.margins(0.12)
    axis.xaxis.set_major_locator(MaxNLocator(3))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: cost_text(key, value) if value >= 0 else ""))
