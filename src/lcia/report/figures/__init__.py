"""The figures: pure functions from the runs to a matplotlib Figure. Each docstring says what is shown."""

from __future__ import annotations

from lcia.report.figures.bars import cost_bars, final_bars, metric_bars
from lcia.report.figures.groups import (
    BASE_MODEL,
    Confusion,
    answers_for,
    group_order,
    group_similarities,
    routed_groups,
    routing_confusion,
    similarity,
)
from lcia.report.figures.layout import WIDTH_IN, ceiling
from lcia.report.figures.matrices import SIDE_BY_SIDE, matrices
from lcia.report.figures.pareto import pareto, recorded_costs
from lcia.report.figures.radar import MIN_RADAR_TASKS, SHARED_RADAR, radar
from lcia.report.figures.scores import FEW_LINES, scores_over_time
from lcia.report.figures.theme import COLOURS, HEAT_ALPHA, save_png, svg
from lcia.report.figures.training import training_course

__all__ = [
    "BASE_MODEL",
    "COLOURS",
    "FEW_LINES",
    "HEAT_ALPHA",
    "MIN_RADAR_TASKS",
    "SHARED_RADAR",
    "SIDE_BY_SIDE",
    "WIDTH_IN",
    "Confusion",
    "answers_for",
    "ceiling",
    "cost_bars",
    "final_bars",
    "group_order",
    "group_similarities",
    "matrices",
    "metric_bars",
    "pareto",
    "radar",
    "recorded_costs",
    "routed_groups",
    "routing_confusion",
    "save_png",
    "scores_over_time",
    "similarity",
    "svg",
    "training_course",
]
