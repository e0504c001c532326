"""Which runs may be compared, and what their numbers say together.

Runs of one stream, model, task order and evaluation split form an arena: only there is a comparison fair.
Inside an arena, runs that differ in nothing but the seed form a series, and give a mean with an interval.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from lcia.report.load import Cost, Run

CONFIDENCE = 0.95
# Configuration that names the run or its machinery, and not what is learned.
_NEUTRAL_SETTINGS = frozenset(
    {"logging_steps", "model", "output_dir", "per_device_eval_batch_size", "report_to", "run_name"}
    | {"seed", "stream", "tasks"}
)


@dataclass(frozen=True)
class Metric:
    """One number of `results.json`'s `metrics`, and which direction is good."""

    key: str
    name: str
    higher_is_better: bool
    meaning: str


METRICS = (
    Metric("avg_acc", "Avg.ACC", True, "mean score over all tasks after the last one"),
    Metric("forgetting", "Forgetting", False, "points lost since the best earlier score, mean over earlier tasks"),
    Metric("new_acc", "New.ACC", True, "mean score on each task just after learning it"),
    Metric("bwt", "BWT", True, "final score less the score just after learning, mean over earlier tasks"),
    Metric("fwt", "FWT", True, "mean score on each task just before learning it"),
)
COSTS = tuple(Cost.model_fields)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its 95 % t-interval, mean ± half_width; one seed has no interval."""

    values: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.values)

    @cached_property
    def mean(self) -> float:
        return math.fsum(self.values) / self.n

    @cached_property
    def half_width(self) -> float | None:
        """t(0.975, n − 1) · s / √n, with s the standard deviation over n − 1."""
        if self.n < 2:
            return None
        quantile = float(stdtrit(self.n - 1, 0.5 + CONFIDENCE / 2))
        return quantile * float(np.std(self.values, ddof=1)) / math.sqrt(self.n)


def estimate(values: Iterable[float | None]) -> Estimate | None:
    """Over the measured values; None where nothing was measured."""
    measured = tuple(value for value in values if value is not None)
    return Estimate(measured) if measured else None


@dataclass(frozen=True)
class Series:
    """Runs that differ in the seed only, and the name they share in tables and figures."""

    label: str
    runs: tuple[Run, ...]

    @property
    def title(self) -> str:
        """The label, and over how many seeds a mean is taken."""
        return self.label if len(self.runs) == 1 else f"{self.label}, mean of {len(self.runs)} seeds"

    @property
    def method(self) -> str:
        return self.runs[0].method

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.runs[0].tasks

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)

    def metric(self, key: str) -> Estimate | None:
        return estimate(run.metrics.get(key) for run in self.runs)

    def cost(self, key: str) -> Estimate | None:
        return estimate(getattr(run.cost, key) for run in self.runs)

    def cell(self, row: int, column: int) -> Estimate | None:
        """Score on task `column` after `row` tasks."""
        return estimate(run.matrix[row][column] for run in self.runs)

    @cached_property
    def matrix(self) -> NDArray[np.float64]:
        """(T + 1, T) mean over seeds, NaN where no seed measured."""
        n_tasks = len(self.tasks)
        cells = [[self.cell(row, column) for column in range(n_tasks)] for row in range(n_tasks + 1)]
        return np.array([[math.nan if cell is None else cell.mean for cell in row] for row in cells])

    @property
    def is_reference(self) -> bool:
        """Whether it was measured only before and after the whole stream, so that it cannot forget."""
        between = self.matrix[1:-1]
        return len(self.tasks) > 1 and bool(np.isnan(between).all()) and not np.isnan(self.matrix[-1]).all()


@dataclass(frozen=True)
class Arena:
    """The series that share stream, model, task order and the rows they are evaluated on."""

    stream: str | None
    model: str
    tasks: tuple[str, ...]
    series: tuple[Series, ...]
    eval_split: str | None = None
    order: int | None = None  # set where one stream appears in several orders

    @property
    def title(self) -> str:
        order = "" if self.order is None else f", order {self.order}"
        split = f", {self.eval_split} rows" if self.eval_split not in (None, "test") else ""
        model = Path(self.model).name if Path(self.model).is_absolute() else self.model
        return f"{self.stream or 'stream not recorded'}{order} on {model}{split}"

    @property
    def runs(self) -> tuple[Run, ...]:
        return tuple(run for series in self.series for run in series.runs)


def settings(run: Run) -> dict[str, str]:
    """The configuration that may change what is learned: dotted key → JSON."""
    flat: dict[str, str] = {}

    def flatten(prefix: str, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                flatten(f"{prefix}{key}.", value)
            else:
                flat[f"{prefix}{key}"] = json.dumps(value, default=str)

    flatten("", {key: value for key, value in run.config.items() if key not in _NEUTRAL_SETTINGS})
    flat.pop("method.name", None)
    if not isinstance(run.config.get("method"), list):
        flat.pop("method", None)  # results.json names it
    return flat


def differing_settings(series: Sequence[Series]) -> dict[str, list[str]]:
    """key → one value a series, for the keys that differ; empty where a run kept no configuration."""
    if not all(one.runs[0].config for one in series):
        return {}
    known = [settings(one.runs[0]) for one in series]
    keys = sorted({key for values in known for key in values})
    columns = {key: [values.get(key, "unset") for values in known] for key in keys}
    return {key: values for key, values in columns.items() if len(set(values)) > 1}


def _distinct_seeds(runs: Sequence[Run]) -> bool:
    return len({run.seed for run in runs}) == len(runs)


def _label_parts(own: Mapping[str, str], others: Sequence[Mapping[str, str]]) -> list[str]:
    """What tells these settings from those of the same method's other series, three at most."""
    keys = sorted({key for values in (own, *others) for key in values})
    telling = [key for key in keys if len({values.get(key) for values in (own, *others)}) > 1]
    return [f"{key.removeprefix('method.')}={own.get(key, 'unset')}" for key in telling[:3]]


def _form_series(runs: Sequence[Run]) -> tuple[Series, ...]:
    """Runs that differ in the seed only belong together; a seed that appears twice is no second sample."""
    alike: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        alike.setdefault((run.method, json.dumps(settings(run), sort_keys=True)), []).append(run)
    of_method: dict[str, list[dict[str, str]]] = {}
    for (method, _), members in alike.items():
        of_method.setdefault(method, []).append(settings(members[0]))

    named: list[tuple[str, tuple[Run, ...]]] = []
    for (method, _), members in alike.items():
        parts = _label_parts(settings(members[0]), of_method[method])
        if _distinct_seeds(members):
            named.append((_label(method, parts), tuple(sorted(members, key=lambda run: run.seed))))
        else:
            named += [(_label(method, [*parts, run.path.name]), (run,)) for run in members]
    labels = [label for label, _ in named]
    return tuple(
        Series(label if labels.count(label) == 1 else f"{label} #{number}", members)
        for number, (label, members) in enumerate(named, start=1)
    )


def _label(method: str, parts: Sequence[str]) -> str:
    return f"{method} ({', '.join(parts)})" if parts else method


def arrange(runs: Sequence[Run]) -> list[Arena]:
    """The runs as arenas of series, both in the order in which they were given."""
    places: dict[tuple[str | None, str, tuple[str, ...], str | None], list[Run]] = {}
    for run in runs:
        places.setdefault((run.stream, run.model, run.tasks, run.eval_split), []).append(run)
    arenas = []
    for (stream, model, tasks, split), members in places.items():
        orders = list(dict.fromkeys(place[2] for place in places if place[:2] == (stream, model)))
        order = orders.index(tasks) + 1 if len(orders) > 1 else None
        arenas.append(Arena(stream, model, tasks, _form_series(members), split, order))
    return arenas


def paired_difference(series: Series, baseline: Series, key: str) -> Estimate | None:
    """`series` less `baseline` on one metric, over the seeds that both have."""
    theirs = {run.seed: run.metrics.get(key) for run in baseline.runs}
    differences = []
    for run in series.runs:
        own, other = run.metrics.get(key), theirs.get(run.seed)
        if own is not None and other is not None:
            differences.append(own - other)
    return estimate(differences)


def _estimate_json(found: Estimate | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"mean": found.mean, "half_width": found.half_width, "n": found.n, "values": list(found.values)}


def _series_json(series: Series) -> dict[str, Any]:
    return {
        "label": series.label,
        "method": series.method,
        "seeds": list(series.seeds),
        "runs": [str(run.path) for run in series.runs],
        "metrics": {metric.key: _estimate_json(series.metric(metric.key)) for metric in METRICS},
        "cost": {key: _estimate_json(series.cost(key)) for key in COSTS},
        "matrix": [[None if math.isnan(value) else value for value in row] for row in series.matrix.tolist()],
    }


def comparison_json(runs: Sequence[Run]) -> dict[str, Any]:
    """One JSON document: per arena and series, each metric as mean, 95 % half width, n and the values."""
    return {
        "confidence": CONFIDENCE,
        "comparisons": [
            {
                "stream": arena.stream,
                "model": arena.model,
                "eval_split": arena.eval_split,
                "tasks": list(arena.tasks),
                "series": [_series_json(series) for series in arena.series],
            }
            for arena in arrange(runs)
        ],
    }
