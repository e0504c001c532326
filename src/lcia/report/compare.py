"""Which runs may be compared, and what their numbers say together.

Runs of one stream, model, task order and evaluation split form an arena: only there is a comparison fair. A stream with
other options, or whose tasks have other scorers, is another one.
Inside an arena, runs that differ in nothing but the seed form a series, and give a mean with an interval.
Arenas that differ in nothing but the order of the tasks are also looked at together, method by method.
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

from lcia.report.load import Bootstrap, Cost, Run
from lcia.report.statistics import non_dominated, t_half_width

# Configuration that names the run or its machinery, and not what is learned.
_NEUTRAL_SETTINGS = frozenset(
    {"logging_steps", "model", "output_dir", "per_device_eval_batch_size", "report_to", "run_name"}
    | {"seed", "stream", "tasks"}
)


_QUOTE = '"'  # of JSON text: labels go without


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
PARETO_COSTS = ("train_s", "trained_parameters", "stored_parameters", "examples_stored")
METHOD_COSTS = ("numbers_stored", "examples_stored", "adapters_stored", "extra_forward_rows", "extra_backward_rows")


@dataclass(frozen=True)
class Interval:
    """A 95 % interval, and what would have to be different for the value to move inside it."""

    low: float
    high: float
    over: str  # "seeds": t-interval; "test rows": bootstrap


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
        return t_half_width(self.values)

    @property
    def interval(self) -> Interval | None:
        half = self.half_width
        return None if half is None else Interval(self.mean - half, self.mean + half, "seeds")


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

    def interval(self, key: str) -> Interval | None:
        """Of a metric: over seeds where there are several, else over the one run's test rows."""
        if len(self.runs) == 1:
            return self.row_interval(key)
        mean = self.metric(key)
        return None if mean is None else mean.interval

    def row_interval(self, key: str) -> Interval | None:
        """Of a metric's mean over seeds, over test rows."""
        found = self.bootstrap.intervals.get(key)
        return None if found is None else Interval(*found, "test rows")

    @property
    def no_row_interval(self) -> str:
        """Why there is no interval over test rows; empty where there is, or nothing was measured."""
        return "" if self.metric("avg_acc") is None else self.bootstrap.missing

    @cached_property
    def bootstrap(self) -> Bootstrap:
        """Of the mean over seeds: in each resample all seeds have the same test rows. It knows of no other seed."""
        found = [run.bootstrap for run in self.runs]
        if len(found) == 1:
            return found[0]
        for run, one in zip(self.runs, found, strict=True):
            if one.missing:
                return Bootstrap(missing=f"seed {run.seed}: {one.missing}")
        if len({one.rows for one in found}) > 1:
            return Bootstrap(missing="its seeds did not answer the same test rows")
        draws = {key: [one.draws[key] for one in found if key in one.draws] for one in found for key in one.draws}
        return Bootstrap({key: np.mean(values, axis=0) for key, values in draws.items()}, found[0].rows)

    def cost(self, key: str) -> Estimate | None:
        return estimate(getattr(run.cost, key) for run in self.runs)

    def routing(self, key: str) -> Estimate | None:
        return estimate(getattr(run.routing, key) for run in self.runs)

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
    selection: int | None = None  # set where different tasks of one stream appear
    data: tuple[str, ...] = ()  # key=value of each option, or scorer, in which one stream's runs on these tasks differ

    @property
    def title(self) -> str:
        return self._title("" if self.order is None else f", order {self.order}")

    @property
    def title_without_order(self) -> str:
        return self._title("")

    def _title(self, order: str) -> str:
        data = "".join(f", {part}" for part in self.data)
        selection = "" if self.selection is None else f", selection {self.selection}"
        split = f", {self.eval_split} rows" if self.eval_split not in (None, "test") else ""
        model = Path(self.model).name if Path(self.model).is_absolute() else self.model
        return f"{self.stream or 'stream not recorded'}{data}{selection}{order} on {model}{split}"

    def named(self, label: str) -> Series | None:
        return next((one for one in self.series if one.label == label), None)

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

    # null is every such key's default: a run from before the key was there has the same setting
    flatten("", {key: value for key, value in run.config.items() if key not in _NEUTRAL_SETTINGS and value is not None})
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


def _repeats_a_seed(runs: Sequence[Run]) -> bool:
    return len({(run.tasks, run.seed) for run in runs}) < len(runs)


def _label_parts(own: Mapping[str, str], others: Sequence[Mapping[str, str]]) -> list[str]:
    """What tells these settings from the others, three at most."""
    known = sorted({key for values in (own, *others) for key in values})
    telling = [key for key in known if len({values.get(key) for values in (own, *others)}) > 1]
    keys = [key for key in telling if key in own] or telling
    return [f"{key.removeprefix('method.')}={own.get(key, 'unset').strip(_QUOTE)}" for key in keys[:3]]


def _by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """label → runs that differ in seed and order only; a seed that appears twice is no second sample."""
    alike: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        alike.setdefault((run.method, json.dumps(settings(run), sort_keys=True)), []).append(run)
    of_method: dict[str, list[dict[str, str]]] = {}
    for (method, _), members in alike.items():
        of_method.setdefault(method, []).append(settings(members[0]))

    named: list[tuple[str, list[Run]]] = []
    for (method, _), members in alike.items():
        parts = _label_parts(settings(members[0]), of_method[method])
        if _repeats_a_seed(members):
            named += [(_label(method, [*parts, run.path.name]), [run]) for run in members]
        else:
            named.append((_label(method, parts), members))
    labels = [label for label, _ in named]
    return {
        label if labels.count(label) == 1 else f"{label} #{number}": members
        for number, (label, members) in enumerate(named, start=1)
    }


def _label(method: str, parts: Sequence[str]) -> str:
    return f"{method} ({', '.join(parts)})" if parts else method


def _series_of(tasks: tuple[str, ...], by_label: Mapping[str, Sequence[Run]]) -> tuple[Series, ...]:
    """The runs of one task order."""
    found = {label: [run for run in runs if run.tasks == tasks] for label, runs in by_label.items()}
    return tuple(Series(label, tuple(sorted(runs, key=lambda run: run.seed))) for label, runs in found.items() if runs)


_Field = tuple[str | None, str, frozenset[str], str | None, str]  # stream, model, tasks, split, its options and scorers


def _field(run: Run) -> _Field:
    data = json.dumps([run.stream_options, run.scorers], sort_keys=True)
    return run.stream, run.model, frozenset(run.tasks), run.eval_split, data


def _data_parts(run: Run, akin: Sequence[Run]) -> tuple[str, ...]:
    """What tells its data from those of others on the same tasks: the stream's options, and the scorers under these."""
    alike = [other for other in akin if other.stream_options == run.stream_options]
    options = _label_parts(run.stream_options, [other.stream_options for other in akin])
    return (*options, *_label_parts(_scorers(run), [_scorers(other) for other in alike]))


def _scorers(run: Run) -> dict[str, str]:
    return {f"scorer of {task}": scorer for task, scorer in run.scorers.items()}


def _place(item: Any, among: Iterable[Any]) -> int | None:
    """1 for the first distinct one; None where there is nothing to tell apart."""
    distinct = list(dict.fromkeys(among))
    return distinct.index(item) + 1 if len(distinct) > 1 else None


def arrange(runs: Sequence[Run]) -> list[Arena]:
    """The runs as arenas of series, both in the order in which they were given."""
    fields: dict[_Field, list[Run]] = {}
    for run in runs:
        fields.setdefault(_field(run), []).append(run)
    # labels are given per field, so that a method has the same one in every order
    labelled = {field: _by_label(members) for field, members in fields.items()}
    arenas: dict[tuple[_Field, tuple[str, ...]], Arena] = {}
    for run in runs:
        field = _field(run)
        if (field, run.tasks) in arenas:
            continue
        akin = [other for other in runs if (other.stream, other.model) == (run.stream, run.model)]
        on_these = [other for other in akin if set(other.tasks) == field[2]]
        order = _place(run.tasks, (other.tasks for other in on_these))
        selection = _place(field[2], (frozenset(other.tasks) for other in akin))
        series, data = _series_of(run.tasks, labelled[field]), _data_parts(run, on_these)
        arenas[field, run.tasks] = Arena(
            run.stream, run.model, run.tasks, series, run.eval_split, order, selection, data
        )
    return list(arenas.values())


@dataclass(frozen=True)
class OverOrders:
    """Arenas that differ only in the order of their tasks. The order is the sample: one value an order."""

    arenas: tuple[Arena, ...]

    @property
    def title(self) -> str:
        return f"{self.arenas[0].title_without_order}, over {len(self.arenas)} orders"

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(one.label for arena in self.arenas for one in arena.series))

    def per_order(self, label: str, key: str) -> list[Estimate | None]:
        """A metric over the seeds of each order."""
        found = [arena.named(label) for arena in self.arenas]
        return [None if one is None else one.metric(key) for one in found]

    def metric(self, label: str, key: str) -> Estimate | None:
        """Over the orders, each with the mean of its seeds: seeds of one order are not independent samples."""
        return estimate(None if found is None else found.mean for found in self.per_order(label, key))


def over_orders(arenas: Sequence[Arena]) -> list[OverOrders]:
    """The groups of two arenas or more."""
    fields: dict[_Field, list[Arena]] = {}
    for arena in arenas:
        fields.setdefault(_field(arena.runs[0]), []).append(arena)
    return [OverOrders(tuple(members)) for members in fields.values() if len(members) > 1]


def paired_difference(series: Series, baseline: Series, key: str) -> Estimate | None:
    """`series` less `baseline` on one metric, over the seeds that both have."""
    theirs = {run.seed: run.metrics.get(key) for run in baseline.runs}
    differences = []
    for run in series.runs:
        own, other = run.metrics.get(key), theirs.get(run.seed)
        if own is not None and other is not None:
            differences.append(own - other)
    return estimate(differences)


def cost_of(series: Series, key: str) -> float | None:
    """The mean over its runs; 0 where the method names no such cost of its own. None: not recorded."""
    found = series.cost(key)
    if found is not None:
        return found.mean
    return 0.0 if key in METHOD_COSTS else None


def pareto_front(series: Sequence[Series], key: str) -> list[str]:
    """Labels of the methods that no other beats in Avg.ACC and in this cost; empty where no run recorded it.

    Only methods that learn task after task are in the contest.
    """
    if not any(one.cost(key) for one in series):
        return []
    points = [
        (one.label, cost, score.mean)
        for one in series
        if not one.is_reference and (score := one.metric("avg_acc")) and (cost := cost_of(one, key)) is not None
    ]
    front = non_dominated([cost for _, cost, _ in points], [score for _, _, score in points])
    return [label for (label, _, _), is_on_front in zip(points, front, strict=True) if is_on_front]
