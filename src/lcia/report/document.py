"""A comparison as one JSON document: every number of the tables, unrounded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lcia.report.compare import COSTS, METRICS, PARETO_COSTS, Arena, Estimate, OverOrders, Series, pareto_front
from lcia.report.load import LeftOut, Run
from lcia.report.significance import Contrast, Scope, compare_runs
from lcia.report.statistics import CONFIDENCE


def comparison_json(
    runs: Sequence[Run], against: str | None = None, left_out: Sequence[LeftOut] = ()
) -> dict[str, Any]:
    """One JSON document: per arena and series, each metric as mean, interval, n and the values; tests; fronts.

    Args:
        against: see `lcia.report.compare_runs`.
        left_out: what was given beside the runs, see `lcia.report.load_runs`.
    """
    found = compare_runs(runs, against)
    return {
        "confidence": CONFIDENCE,
        "runs_compared": len(runs),
        "runs_left_out": [{"path": str(one.path), "why": one.why} for one in left_out],
        "comparisons": [_arena_json(*pair) for pair in zip(found.arenas, found.scopes, strict=True)],
        "over_orders": [_orders_json(*pair) for pair in zip(found.orders, found.order_scopes, strict=True)],
    }


def _arena_json(arena: Arena, scope: Scope) -> dict[str, Any]:
    return {
        "title": arena.title,
        "stream": arena.stream,
        "model": arena.model,
        "eval_split": arena.eval_split,
        "tasks": list(arena.tasks),
        "series": [_series_json(series) for series in arena.series],
        "not_dominated": {key: pareto_front(arena.series, key) for key in PARETO_COSTS},
        "against": scope.reference,
        "significance": [_contrast_json(one) for one in scope.contrasts],
    }


def _orders_json(found: OverOrders, scope: Scope) -> dict[str, Any]:
    return {
        "title": found.title,
        "orders": [list(arena.tasks) for arena in found.arenas],
        "series": [
            {
                "label": label,
                "metrics": {
                    metric.key: {
                        "per_order": [_estimate_json(one) for one in found.per_order(label, metric.key)],
                        "over_orders": _estimate_json(found.metric(label, metric.key)),
                    }
                    for metric in METRICS
                },
            }
            for label in found.labels
        ],
        "against": scope.reference,
        "significance": [_contrast_json(one) for one in scope.contrasts],
    }


def _series_json(series: Series) -> dict[str, Any]:
    return {
        "label": series.label,
        "method": series.method,
        "seeds": list(series.seeds),
        "runs": [str(run.path) for run in series.runs],
        "metrics": {metric.key: _metric_json(series, metric.key) for metric in METRICS},
        "no_row_interval": series.no_row_interval or None,
        "cost": {key: _estimate_json(series.cost(key)) for key in COSTS},
        "routing": {
            key: _estimate_json(series.routing(key)) for key in ("accuracy", "oracle_avg_acc", "base_model_answers")
        },
        "confusion": [run.routing.confusion for run in series.runs],
        "matrix": [[None if math.isnan(value) else value for value in row] for row in series.matrix.tolist()],
    }


def _metric_json(series: Series, key: str) -> dict[str, Any] | None:
    found = _estimate_json(series.metric(key))
    if found is None:
        return None
    intervals = {"interval": series.interval(key), "row_interval": series.row_interval(key)}
    return {**found, **{name: None if one is None else asdict(one) for name, one in intervals.items()}}


def _estimate_json(found: Estimate | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"mean": found.mean, "half_width": found.half_width, "n": found.n, "values": list(found.values)}


def _contrast_json(contrast: Contrast) -> dict[str, Any]:
    return {**asdict(contrast), "difference": _estimate_json(contrast.difference)}
