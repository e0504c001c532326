"""A run folder, read and checked: the only place of the report that opens a file of a run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from lcia.errors import UserError
from lcia.metrics import accuracy_metrics
from lcia.report.statistics import bootstrap_matrices, percentile_interval
from lcia.stream.sources import stated_options

RESULTS = "results.json"
TRAINING_LOG = "training_log.jsonl"
PREDICTIONS = "predictions"
CONFIG = "config.yaml"
CODEBOOK = "codebook.json"
_SAME_SCORE = 0.01  # percentage points: results.json may be rounded


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _Record(BaseModel):
    """Read-only; unknown keys are left out, and a null where something is optional counts as absent."""

    model_config = ConfigDict(frozen=True, extra="ignore", coerce_numbers_to_str=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls_of_optional_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        required = {name for name, field in cls.model_fields.items() if field.is_required()}
        return {key: value for key, value in values.items() if value is not None or key in required}


class Routing(_Record):
    accuracy: float | None = None
    oracle_avg_acc: float | None = None
    base_model_answers: int | None = None
    confusion: dict[str, dict[str, int]] = Field(default_factory=dict)  # task → {group, "" the base model: requests}


class Averaging(_Record):
    """What `ema` holds: how often the rule fell back, and the weight each task's start still has."""

    fallback_fraction: float | None = None
    retained_mass: dict[str, float | None] = Field(default_factory=dict)


class Cost(_Record):
    train_s: float | None = None
    eval_s: float | None = None
    evaluations_run: int | None = None
    evaluations_reused: int | None = None
    peak_memory_mib: float | None = None
    trained_parameters: int | None = None  # of the largest adapter that a task trains
    stored_parameters: int | None = None  # of all adapters at the end
    # what some methods need beside training one adapter; a method that needs none of it names none
    numbers_stored: float | None = None
    examples_stored: float | None = None
    adapters_stored: float | None = None  # beyond the trained one, active for every request
    extra_forward_rows: float | None = None
    extra_backward_rows: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_number_of_parameters(cls, values: Any) -> Any:
        """Older runs wrote one number, that of all adapters at the end, under the name of the trained ones."""
        if isinstance(values, dict) and "trained_parameters" in values and "stored_parameters" not in values:
            return {**values, "trained_parameters": None, "stored_parameters": values["trained_parameters"]}
        return values


class Step(_Record):
    """One logged training step; the averaging columns are absent where nothing is averaged."""

    task: str
    step: int
    total_steps: int | None = None
    loss: float | None = None
    learning_rate: float | None = None
    examples_per_s: float | None = None
    beta_p10: float | None = None
    beta_p50: float | None = None
    beta_p90: float | None = None
    fallback_fraction: float | None = None
    retained_mass: float | None = None


class Prediction(_Record):
    """One answered test row; `score` is in [0, 1]."""

    id: str
    prompt: str
    prediction: str
    reference: Annotated[tuple[str, ...], BeforeValidator(_as_list)]
    score: float
    group: str | None = None
    images: tuple[str, ...] = ()  # absolute paths


class NoScores(Exception):
    """Why a cell of the matrix has no score per test row that could be used."""


@dataclass(frozen=True)
class LeftOut:
    """A path that was given and holds no finished run."""

    path: Path
    why: str

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


@dataclass(frozen=True)
class Bootstrap:
    """Metrics over resampled test examples, or why there are none."""

    draws: dict[str, NDArray[np.float64]] = field(default_factory=dict)  # metric → (2000,)
    rows: tuple[tuple[str, ...], ...] = ()  # one a task: ids of its test rows, in the order in which they are drawn
    missing: str = ""

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Metric → (low, high), 95 %."""
        return {key: percentile_interval(values) for key, values in self.draws.items()}


class Results(_Record):
    """results.json. `matrix[j][i]`: percent on task i after j tasks, row 0 before training."""

    method: str
    model: str
    seed: int
    tasks: tuple[str, ...] = Field(min_length=1)
    matrix: tuple[tuple[float | None, ...], ...]  # (T + 1, T)
    metrics: dict[str, float | None]

    groups: dict[str, str | None] = Field(default_factory=dict)  # task → group
    group_scores: dict[str, dict[str, float | None]] = Field(default_factory=dict)  # task → {group: similarity}
    threshold: float | None = None
    scorers: dict[str, str] = Field(default_factory=dict)
    eval_split: str | None = None
    left_out: dict[str, int] = Field(default_factory=dict)  # task → training rows that do not fit
    too_long: dict[str, int] = Field(default_factory=dict)  # task → test rows that do not fit, counted as wrong
    date: str | None = None
    stream: str | None = None
    routing: Routing = Routing()
    ema: Averaging = Averaging()
    cost: Cost = Cost()
    versions: dict[str, str | None] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _matrix_fits_tasks(self) -> Results:
        n_tasks = len(self.tasks)
        shape = [len(row) for row in self.matrix]
        if shape != [n_tasks] * (n_tasks + 1):
            raise ValueError(
                f"key 'matrix': {n_tasks} tasks need {n_tasks + 1} rows of {n_tasks}, found rows of {shape}"
            )
        if len(set(self.tasks)) != n_tasks:
            raise ValueError("key 'tasks': two tasks have the same name")
        return self

    @property
    def final_scores(self) -> tuple[float | None, ...]:
        """(T,) the last row: every task after all tasks."""
        return self.matrix[-1]


class _Threshold(_Record):
    threshold: float | None = None


class Run(Results):
    """One run folder: results.json and what lies beside it."""

    path: Path
    steps: tuple[Step, ...] = ()  # of training_log.jsonl, in the order of the tasks
    unreadable_steps: int = 0  # lines of training_log.jsonl that a killed process left unfinished
    config_text: str | None = None
    config: dict[str, Any] = Field(default_factory=dict)

    @cached_property
    def stream_options(self) -> dict[str, str]:
        """What the configuration says of the stream's data, less where they lie and their order: option → JSON.

        How many test rows are drawn is among it: scores on others are of another test.

        Scorers are not among it: `scorers` has those in use, stated or not.
        """
        stream = self.config.get("stream")
        given: dict[str, Any] = {}
        if isinstance(stream, list):
            for task in stream:
                given |= {f"{key} of {task['name']}": task.get(key) for key in ("instruction", "examples")}
        else:
            options = stated_options(stream)  # defaults too: to state one is no other choice
            given = {key: value for key, value in options.items() if key not in ("name", "order", "path")}
        given["max_eval_examples"] = self.config.get("max_eval_examples")
        return {key: json.dumps(value, default=str) for key, value in given.items() if value is not None}

    @property
    def averages(self) -> bool:
        """Whether any logged step reports a β."""
        return any(step.beta_p50 is not None for step in self.steps)

    def predictions(self, task: str, row: int | None = None) -> dict[str, Prediction]:
        """id → prediction on the task's test rows; empty where the run kept none.

        Args:
            row: after so many tasks; None: after all.
        """
        path = self.path / PREDICTIONS / str(len(self.tasks) if row is None else row) / f"{task}.jsonl"
        if not path.is_file():
            return {}
        found = {}
        for number, values in _json_lines(path):
            if values is None:
                raise UserError(f"{path}:{number}: not valid JSON")
            prediction = _checked(Prediction, values, f"{path}:{number}")
            found[prediction.id] = prediction
        return found

    def example_scores(self, task: str, row: int | None = None) -> dict[str, float]:
        """id → percent of each test row, whose mean is this cell of the matrix.

        Raises:
            NoScores: no predictions were kept, or they are not those of the matrix.
        """
        row = len(self.tasks) if row is None else row
        where = f"{task} after {row} tasks"
        scores = {key: 100 * found.score for key, found in self.predictions(task, row).items()}
        if not scores:
            raise NoScores(f"no predictions of {where} were kept")
        recorded = self.matrix[row][self.tasks.index(task)]
        if recorded is None or abs(math.fsum(scores.values()) / len(scores) - recorded) > _SAME_SCORE:
            raise NoScores(f"the predictions of {where} do not give the score in {RESULTS}")
        return scores

    @cached_property
    def final_example_scores(self) -> dict[str, dict[str, float]]:
        """task → {id: percent} after all tasks; raises NoScores as `example_scores` does."""
        return {task: self.example_scores(task) for task in self.tasks}

    def _rows_by_stage(self) -> tuple[list[NDArray[np.float64]], tuple[tuple[str, ...], ...]]:
        """One (T + 1, n_i) array a task: percent of each test row after each stage, NaN where not measured; its ids."""
        arrays, rows = [], []
        for i, task in enumerate(self.tasks):
            cells = {
                row: self.example_scores(task, row)
                for row in range(len(self.matrix))
                if self.matrix[row][i] is not None
            }
            ids = sorted(next(iter(cells.values()), {"": math.nan}))
            if any(sorted(cell) != ids for cell in cells.values()):
                raise NoScores(f"not all stages tested the same rows of {task}")
            array = np.full((len(self.matrix), len(ids)), math.nan)
            for row, cell in cells.items():
                array[row] = [cell[key] for key in ids]
            arrays.append(array)
            rows.append(tuple(ids))
        return arrays, tuple(rows)

    @cached_property
    def bootstrap(self) -> Bootstrap:
        """The metrics over resampled test rows: what other test rows might have shown. They know of no other seed."""
        try:
            arrays, rows = self._rows_by_stage()
        except NoScores as why:
            return Bootstrap(missing=str(why))
        resampled = [accuracy_metrics(matrix) for matrix in bootstrap_matrices(arrays, self.tasks)]
        # a cell is measured in all resamples or in none, and so is a metric
        measured = [key for key, value in self.metrics.items() if None not in (value, resampled[0].get(key))]
        return Bootstrap({key: np.array([found[key] for found in resampled]) for key in measured}, rows)


_R = TypeVar("_R", bound=BaseModel)


def _checked(kind: type[_R], values: Any, where: str) -> _R:
    """The values as `kind`, or a UserError that names the place and the key."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected an object {{...}}, found {type(values).__name__}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise UserError(f"{where}: key {key!r} is missing") from None
        if not key:
            raise UserError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from None
        raise UserError(f"{where}: key {key!r}: {first['msg']}") from None


def _parse(text: str) -> Any:
    """JSON where NaN and ±Infinity, which Python writes and JSON does not know, mean "no number"."""
    return json.loads(text, parse_constant=lambda _: None)


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line that is not blank; None for a line that is not JSON."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, _parse(line)
            except json.JSONDecodeError:
                yield number, None


def _read_steps(path: Path, tasks: tuple[str, ...]) -> tuple[tuple[Step, ...], int]:
    """The logged steps in the order of the tasks, and how many lines could not be read.

    A run that was killed leaves a broken line, and a resumed one logs steps again: the later entry counts.
    """
    if not path.is_file():
        return (), 0
    latest: dict[tuple[str, int], Step] = {}
    unreadable = 0
    for number, values in _json_lines(path):
        if values is None:
            unreadable += 1
            continue
        step = _checked(Step, values, f"{path}:{number}")
        latest[step.task, step.step] = step
    position = {task: i for i, task in enumerate(tasks)}
    # a joint method may log under a name that is no task of the stream: it comes last
    ordered = sorted(latest.values(), key=lambda step: (position.get(step.task, len(position)), step.step))
    return tuple(ordered), unreadable


def _read_config(path: Path) -> tuple[str | None, dict[str, Any]]:
    if not path.is_file():
        return None, {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    return text, values if isinstance(values, dict) else {}


def _codebook_threshold(path: Path) -> float | None:
    """The similarity from which a task joins a group; a method without grouping has none."""
    if not path.is_file():
        return None
    try:
        values = _parse(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON: line {error.lineno}: {error.msg}") from None
    return _checked(_Threshold, values, str(path)).threshold


def load_run(path: Path | str) -> Run:
    """Read a run folder.

    Args:
        path: the folder that holds results.json.

    Raises:
        UserError: results.json or one of its keys is missing or malformed; the message names file and key.
    """
    path = Path(path)
    results = path / RESULTS
    try:
        text = results.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no run here, {RESULTS} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{results}: cannot be read as UTF-8 text: {error}") from None
    try:
        values = _parse(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{results}: not valid JSON: line {error.lineno}: {error.msg}") from None
    checked = _checked(Results, values, str(results))
    if checked.threshold is None:
        checked = checked.model_copy(update={"threshold": _codebook_threshold(path / CODEBOOK)})
    steps, unreadable = _read_steps(path / TRAINING_LOG, checked.tasks)
    config_text, config = _read_config(path / CONFIG)
    return Run(
        **dict(checked),
        path=path,
        steps=steps,
        unreadable_steps=unreadable,
        config_text=config_text,
        config=config,
    )


def load_runs(paths: Sequence[Path | str]) -> tuple[list[Run], list[LeftOut]]:
    """The finished runs among `paths`, as a shell makes them of `runs/*`, and what is none.

    Raises:
        UserError: there is no finished run, a path does not exist, or a finished run is damaged (see `load_run`).
    """
    runs, left_out = [], []
    for path in map(Path, paths):
        why = _no_finished_run(path)
        if why is None:
            runs.append(load_run(path))
        else:
            left_out.append(LeftOut(path, why))
    if not runs:
        raise UserError(f"no finished run here: {'; '.join(map(str, left_out))}")
    return runs, left_out


def left_out_title(runs: Sequence[Run], left_out: Sequence[LeftOut]) -> str:
    """The sentence above a list of what was left out."""
    return f"Left out, because it is no finished run: {len(left_out)} of {len(runs) + len(left_out)} paths."


def _no_finished_run(path: Path) -> str | None:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if not path.is_dir():
        return "a file"
    if (path / RESULTS).is_file():
        return None
    if (path / CONFIG).is_file():
        return f"a run that is not finished (`lcia resume {path}` goes on with it)"
    return f"a folder of something else: neither {RESULTS} nor {CONFIG} in it"
