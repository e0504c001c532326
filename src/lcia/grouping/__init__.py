"""Which group of weights a task trains, and which group answers a request."""

from __future__ import annotations

from lcia.grouping.codebook import Codebook, Match, group_tasks
from lcia.grouping.explain import Explanation, ThresholdRange, explain, threshold_ranges
from lcia.grouping.reduction import REDUCTIONS
from lcia.grouping.router import Router, load_routes, save_routes
from lcia.grouping.similarity import SIMILARITIES

__all__ = [
    "REDUCTIONS",
    "SIMILARITIES",
    "Codebook",
    "Explanation",
    "Match",
    "Router",
    "ThresholdRange",
    "explain",
    "group_tasks",
    "load_routes",
    "save_routes",
    "threshold_ranges",
]
