"""The report as one HTML file that needs no network, with the figures as PNG files beside it."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from lcia.errors import UserError
from lcia.report import figures
from lcia.report.compare import COSTS, METRICS, Arena, Series, arrange, differing_settings, estimate
from lcia.report.load import Prediction, Run
from lcia.report.summary import summary
from lcia.report.tables import (
    NOT_MEASURED,
    NOT_RECORDED,
    Grid,
    cost_grid,
    estimate_text,
    final_scores_grid,
    metrics_grid,
    row_names,
)

EXAMPLES_PER_TASK = 3
_UNFOLDED_COURSES = 3  # training figures; of more, only those with a β are open
_SHOWN_CHARACTERS = 600  # of a prompt or an answer; the rest stays in predictions/


@dataclass(frozen=True)
class Cell:
    """One cell of a heat-map table: its text, how strong its colour is (None: no value), and a mark."""

    text: str
    strength: float | None = None
    mark: str = ""  # CSS class
    hint: str = ""


@dataclass(frozen=True)
class HeatTable:
    """A table whose cells are coloured by their value."""

    title: str
    corner: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


class Gallery:
    """Puts figures on the page as SVG and into a folder as PNG."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self._folder, self._prefix = folder, prefix

    def keep(self, name: str, figure: Figure) -> str:
        """Only the PNG file: for figures that the page shows as tables. Returns the name it got."""
        name = self._prefix + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        self._folder.mkdir(parents=True, exist_ok=True)
        figures.save_png(figure, self._folder / f"{name}.png")
        return name

    def hang(self, name: str, figure: Figure, caption: str) -> Markup:
        """A <figure> element.

        Args:
            name: of the PNG file, unique within the chapter.
            caption: one sentence that says what is shown; the figure's text for those who do not see it.
        """
        name = self.keep(name, figure)
        escaped = html.escape(caption)
        drawing = figures.svg(figure, name).replace("<svg ", f'<svg role="img" aria-label="{escaped}" ', 1)
        width = f"{figure.get_figwidth() / figures.WIDTH_IN:.0%}"
        return Markup(  # the drawing is ours, the caption is escaped above
            f'<figure style="--width:{width}"><div class="drawing">{drawing}</div>'
            f"<figcaption>{escaped}</figcaption></figure>"
        )


# -- accuracy matrices and groups as tables


def _matrix_table(series: Series, top: float) -> HeatTable:
    n_tasks = len(series.tasks)
    rows = []
    for row, name in enumerate(row_names(series.tasks)):
        if series.is_reference and 0 < row < n_tasks:
            if row == 1:  # one line stands for all that were not measured
                rows.append((f"after 1 to {n_tasks - 1}", (Cell("", hint="not measured"),) * n_tasks))
            continue
        rows.append((name, tuple(_score_cell(series, row, column, top) for column in range(n_tasks))))
    columns = tuple(f"{i} {task}" for i, task in enumerate(series.tasks, start=1))
    return HeatTable(series.title, "", columns, tuple(rows))


def _score_cell(series: Series, row: int, column: int, top: float) -> Cell:
    found = series.cell(row, column)
    if found is None:
        return Cell("", hint="not measured")
    hint = f"{series.tasks[column]}: {estimate_text(found, len(series.runs))} %"
    learned = row == column + 1 and not series.is_reference
    return Cell(f"{found.mean:.1f}", found.mean / top, "learned" if learned else "", hint)


def _group_table(run: Run) -> HeatTable:
    groups = figures.group_order(run)
    rows = []
    for i, task in enumerate(run.tasks, start=1):
        joined = run.groups.get(task)
        cells = tuple(_similarity_cell(run, task, group, group == joined) for group in groups)
        rows.append((f"{i} {task}", cells))
    return HeatTable("", "task", tuple(groups), tuple(rows))


def _similarity_cell(run: Run, task: str, group: str, joined: bool) -> Cell:
    score = run.group_scores.get(task, {}).get(group)
    if score is None:
        return Cell("new", None, "joined") if joined else Cell("", hint="did not exist yet")
    return Cell(f"{score:.2f}{' ✓' if joined else ''}", score, "joined" if joined else "")


# -- sections


def _matrices(arena: Arena, gallery: Gallery) -> dict[str, Any]:
    top = figures.ceiling(arena.series)
    if len(arena.tasks) <= figures.SIDE_BY_SIDE and len(arena.series) <= figures.SIDE_BY_SIDE:
        gallery.keep("matrices", figures.matrices(arena.series, top))
    else:  # too large for one picture
        for one in arena.series:
            gallery.keep(f"matrix {one.label}", figures.matrices([one], top))
    return {"tables": [_matrix_table(one, top) for one in arena.series], "top": top}


def _groupings(arena: Arena, gallery: Gallery) -> list[dict[str, Any]]:
    """Each distinct assignment once, with the series it belongs to."""
    distinct: dict[str, dict[str, Any]] = {}
    for one in arena.series:
        for run in one.runs:
            key = repr((run.groups, run.group_scores, run.threshold))
            entry = distinct.setdefault(key, {"run": run, "labels": []})
            if one.label not in entry["labels"]:
                entry["labels"].append(one.label)
    groupings = []
    for entry in distinct.values():
        run, name = entry["run"], ", ".join(entry["labels"])
        grouping: dict[str, Any] = {"name": name, "table": None, "text": _grouping_text(run)}
        if any(run.group_scores.get(task) for task in run.tasks):
            grouping["table"] = _group_table(run)
            gallery.keep(f"groups {entry['labels'][0]}", figures.group_similarities(run))
        groupings.append(grouping)
    return groupings


def _grouping_text(run: Run) -> str:
    groups = figures.group_order(run)
    if not groups:
        return "no groups recorded."
    if not any(run.group_scores.get(task) for task in run.tasks):
        shared = "one set of weights for all tasks" if len(groups) == 1 else f"{len(groups)} sets of weights"
        return f"{shared}; no similarities recorded."
    threshold = NOT_RECORDED if run.threshold is None else f"{run.threshold:g}"
    return (
        f"{len(groups)} group{'' if len(groups) == 1 else 's'} for {len(run.tasks)} tasks. "
        f"A task joins (✓) the most similar group from a similarity of {threshold}; below, it founds a new one."
    )


def _routing_grid(arena: Arena) -> Grid | None:
    """How often a test input found its own group, and the Avg.ACC if it always had."""
    rows = []
    for one in arena.series:
        n = len(one.runs)
        found = [
            estimate(getattr(run.routing, key) for run in one.runs)
            for key in ("accuracy", "oracle_avg_acc", "base_model_answers")
        ]
        if any(found):
            avg = estimate_text(one.metric("avg_acc"), n)
            cells = [NOT_RECORDED if value is None else estimate_text(value, n) for value in found[:2]]
            answers = NOT_RECORDED if found[2] is None else f"{found[2].mean:g}"
            rows.append((one.label, cells[0], avg, cells[1], answers))
    columns = ("Method", "Routed to the own group, %", "Avg.ACC", "Avg.ACC with perfect routing")
    return Grid((*columns, "Answers by the base model"), tuple(rows)) if rows else None


def _averaging_grid(arena: Arena) -> Grid | None:
    """Fallback fraction and retained mass: one column a series that averages."""
    averaging = [one for one in arena.series if any(run.ema.retained_mass for run in one.runs)]
    if not averaging:
        return None
    stages = list(
        dict.fromkeys(task for one in averaging for run in one.runs for task in run.ema.retained_mass)
    )
    shares = [estimate(run.ema.fallback_fraction for run in one.runs) for one in averaging]
    rows = [("fallback fraction, all tasks", *(_or_none(share, 3) for share in shares))]
    for stage in stages:
        masses = [estimate(run.ema.retained_mass.get(stage) for run in one.runs) for one in averaging]
        rows.append((f"retained mass, {stage}", *(_or_none(mass, 3) for mass in masses)))
    return Grid(("", *(one.label for one in averaging)), tuple(rows))


def _or_none(found: Any, digits: int) -> str:
    return NOT_MEASURED if found is None else estimate_text(found, found.n, digits)


def _training(arena: Arena, gallery: Gallery) -> dict[str, Any]:
    """The training course of each series' first seed, and who has none, or no β, and why."""
    courses, silent, plain, notes = [], [], [], []
    for one in arena.series:
        run = one.runs[0]
        if run.unreadable_steps:
            notes.append(f"{one.label}: {run.unreadable_steps} lines of the training log could not be read.")
        if not run.steps:
            silent.append(one.label)
            continue
        caption = f"{one.label}, seed {run.seed}: {_course_caption(run)}"
        drawn = gallery.hang(f"training {one.label}", figures.training_course(run), caption)
        courses.append({"name": one.label, "figure": drawn, "averages": run.averages})
        if not run.averages:
            plain.append(one.label)
    if plain:
        notes.append(
            f"No weights are averaged, so there is no β and no fallback to show: {', '.join(plain)}."
        )
    if silent:
        notes.append(
            f"No training log, because nothing was trained or the log was not kept: {', '.join(silent)}."
        )
    return {"courses": courses, "notes": notes, "folded": len(courses) > _UNFOLDED_COURSES}


def _course_caption(run: Run) -> str:
    if not run.averages:
        return "loss over the steps of all tasks."
    return (
        "loss; β (line: median over tensors, band: 10th to 90th percentile; hatched: nothing averaged); "
        "share of (tensor, step) pairs that took the fallback."
    )


def _examples(arena: Arena) -> list[dict[str, Any]]:
    """A few test rows per task with every method's final answer (each series' first seed)."""
    shown = []
    for task in arena.tasks:
        answers = {one.label: one.runs[0].predictions(task) for one in arena.series}
        answers = {label: predictions for label, predictions in answers.items() if predictions}
        rows = [_example(task_id, answers) for task_id in _telling_rows(list(answers.values()))]
        shown.append({"task": task, "scorer": arena.runs[0].scorers.get(task), "rows": rows})
    return shown if any(task["rows"] for task in shown) else []


def _telling_rows(predictions: Sequence[dict[str, Prediction]]) -> list[str]:
    """Ids of rows that all have answered: those on which right and wrong differ first, else in file order."""
    if not predictions:
        return []
    common = [i for i in predictions[0] if all(i in other for other in predictions)]
    agreed = {i: len({found[i].score for found in predictions}) == 1 for i in common}
    return sorted(common, key=lambda i: agreed[i])[:EXAMPLES_PER_TASK]


def _example(row: str, answers: dict[str, dict[str, Prediction]]) -> dict[str, Any]:
    first = next(iter(answers.values()))[row]
    return {
        "id": row,
        "prompt": _shortened(first.prompt),
        "reference": [_shortened(text) for text in first.reference],
        "answers": [
            {"label": label, "text": _shortened(found[row].prediction), "group": found[row].group}
            | _verdict(found[row].score)
            for label, found in answers.items()
        ],
    }


def _verdict(score: float) -> dict[str, str]:
    if score >= 1:
        return {"verdict": "right", "kind": "right"}
    if score <= 0:
        return {"verdict": "wrong", "kind": "wrong"}
    return {"verdict": f"partly, {score:.2f}", "kind": "partly"}


def _shortened(text: str) -> str:
    left = len(text) - _SHOWN_CHARACTERS
    return text if left <= 0 else f"{text[:_SHOWN_CHARACTERS]} … ({left} more characters)"


def _notes(arena: Arena) -> list[str]:
    """What a reader must know to trust the numbers."""
    notes = []
    for one in arena.series:
        for run in one.runs:
            where = f"{one.label}, seed {run.seed}"
            for task, rows in run.left_out.items():
                if rows:
                    notes.append(f"{where}: {rows} training rows of {task} were too long and left out.")
            for task, rows in run.too_long.items():
                if rows:
                    notes.append(f"{where}: {rows} test rows of {task} were too long and count as wrong.")
    return notes


def _versions_grid(arena: Arena) -> Grid | None:
    packages = list(dict.fromkeys(name for run in arena.runs for name in run.versions))
    if not packages:
        return None
    rows = []
    for name in packages:
        found = dict.fromkeys(run.versions.get(name) or NOT_RECORDED for run in arena.runs)
        rows.append((name, ", ".join(found)))
    return Grid(("Package", "Version"), tuple(rows))


def _runs_grid(arena: Arena) -> Grid:
    rows = [
        (one.label, str(run.seed), str(run.path), run.date or NOT_RECORDED)
        for one in arena.series
        for run in one.runs
    ]
    return Grid(("Method", "Seed", "Folder", "Date"), tuple(rows))


def _settings_grid(arena: Arena) -> Grid | None:
    """The settings that are not the same in all series: what, beside the method, may explain a difference."""
    differing = differing_settings(arena.series)
    if not differing:
        return None
    rows = tuple((key, *values) for key, values in differing.items())
    return Grid(("Setting", *(one.label for one in arena.series)), rows)


def _chapter(arena: Arena, number: int, gallery: Gallery) -> dict[str, Any]:
    """Everything the template shows about one arena."""
    n_tasks = len(arena.tasks)
    has_scores = any(any(score is not None for score in run.final_scores) for run in arena.runs)
    has_costs = any(one.cost(key) for one in arena.series for key in COSTS)
    several = any(len(one.runs) > 1 for one in arena.series)
    whiskers = " Whiskers: 95 % t-interval over seeds." if several else ""
    bands = (
        " Bands: 95 % t-interval over seeds." if several and len(arena.series) <= figures.FEW_LINES else ""
    )
    return {
        "id": row,
        "prompt": _shortened(first.prompt),
        "reference": [_shortened(text) for text in first.reference],
        "answers": [
            {"label": label, "text": _shortened(found[row].prediction), "group": found[row].group}
            | _verdict(found[row].score)
            for label, found in answers.items()
        ],
    }


def _verdict(score: float) -> dict[str, str]:
    if score >= 1:
        return {"verdict": "right", "kind": "right"}
    if score <= 0:
        return {"verdict": "wrong", "kind": "wrong"}
    return {"verdict": f"partly, {score:.2f}", "kind": "partly"}


def _shortened(text: str) -> str:
    left = len(text) - _SHOWN_CHARACTERS
    return text if left <= 0 else f"{text[:_SHOWN_CHARACTERS]} … ({left} more characters)"


def _notes(arena: Arena) -> list[str]:
    """What a reader must know to trust the numbers."""
    notes = []
    for one in arena.series:
        for run in one.runs:
            where = f"{one.label}, seed {run.seed}"
            for task, rows in run.left_out.items():
                if rows:
                    notes.append(f"{where}: {rows} training rows of {task} were too long and left out.")
            for task, rows in run.too_long.items():
                if rows:
                    notes.append(f"{where}: {rows} test rows of {task} were too long and count as wrong.")
    return notes


def _versions_grid(arena: Arena) -> Grid | None:
    packages = list(dict.fromkeys(name for run in arena.runs for name in run.versions))
    if not packages:
        return None
    rows = []
    for name in packages:
        found = dict.fromkeys(run.versions.get(name) or NOT_RECORDED for run in arena.runs)
        rows.append((name, ", ".join(found)))
    return Grid(("Package", "Version"), tuple(rows))


def _runs_grid(arena: Arena) -> Grid:
    rows = [
        (one.label, str(run.seed), str(run.path), run.date or NOT_RECORDED)
        for one in arena.series
        for run in one.runs
    ]
    return Grid(("Method", "Seed", "Folder", "Date"), tuple(rows))


def _settings_grid(arena: Arena) -> Grid | None:
    """The settings that are not the same in all series: what, beside the method, may explain a difference."""
    differing = differing_settings(arena.series)
    if not differing:
        return None
    rows = tuple((key, *values) for key, values in differing.items())
    return Grid(("Setting", *(one.label for one in arena.series)), rows)


def _chapter(arena: Arena, number: int, gallery: Gallery) -> dict[str, Any]:
    """Everything the template shows about one arena."""
    n_tasks = len(arena.tasks)
    has_scores = any(any(score is not None for score in run.final_scores) for run in arena.runs)
    has_costs = any(one.cost(key) for one in arena.series for key in COSTS)
    seeds = (
        ""
        if all(len(one.runs) == 1 for one in arena.series)
        else " Whiskers and bands: 95 % t-interval over seeds."
    )
    return {
        "id": f"c{number}",
        "arena": arena,
        "sentences": summary(arena),
        "metrics": metrics_grid(arena),
        "references": {row for row, one in enumerate(arena.series) if one.is_reference},
        "metric_bars": gallery.hang(
            "metrics",
            figures.metric_bars(arena),
            f"Avg.ACC, Forgetting and New.ACC of each method.{whiskers}",
        ),
        "matrices": _matrices(arena, gallery),
        "over_time": gallery.hang(
            "scores over time",
            figures.scores_over_time(arena),
            f"Score after 0 to {n_tasks} learned tasks; dotted: the task itself has just been learned.{bands}",
        ),
        "radar": gallery.hang("radar", figures.radar(arena), _radar_caption(arena))
        if n_tasks >= figures.MIN_RADAR_TASKS and has_scores
        else None,
        "min_radar_tasks": figures.MIN_RADAR_TASKS,
        "final_bars": gallery.hang(
            "final scores",
            figures.final_bars(arena),
            f"Score on each task after the last one, percent.{whiskers}",
        ),
        "final": final_scores_grid(arena),
        "groupings": _groupings(arena, gallery),
        "routing": _routing_grid(arena),
        "training": _training(arena, gallery),
        "averaging": _averaging_grid(arena),
        "examples": _examples(arena),
        "cost_bars": gallery.hang("cost", figures.cost_bars(arena), "Cost, mean over seeds.")
        if has_costs
        else None,
        "cost": cost_grid(arena),
        "notes": _notes(arena),
        "versions": _versions_grid(arena),
        "runs": _runs_grid(arena),
        "settings": _settings_grid(arena),
        "several": several,
        "configs": [(one.title, one.runs[0].config_text) for one in arena.series],
    }


def _radar_caption(arena: Arena) -> str:
    top = figures.ceiling(arena.series)
    rings = f"rings at {top / 2:g} and {top:g} %"
    if len(arena.series) <= figures.SHARED_RADAR:
        return f"Final scores, one axis a task; {rings}."
    return f"Final scores, one axis a task, numbered as in the table; {rings}; grey: the best score of any method."


# -- the file


def _palette() -> Markup:
    """The colours as CSS variables, on light and on dark paper."""
    light = "".join(f"--{name}:{colours[0]};" for name, colours in figures.COLOURS.items())
    dark = "".join(f"--{name}:{colours[1]};" for name, colours in figures.COLOURS.items())
    return Markup(  # constants
        f":root{{{light}color-scheme:light}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}color-scheme:dark}}}}"
    )


def _percentage(strength: float) -> str:
    return f"{100 * min(1.0, max(0.0, strength)) * figures.HEAT_ALPHA:.1f}%"


def _soft(name: str) -> Markup:
    """The name, escaped, where a line may end after an underscore."""
    return Markup(html.escape(name).replace("_", "_<wbr>"))


def write_report(runs: Sequence[Run], out: Path | str) -> Path:
    """Write the HTML file, and the figures as PNG files into `figures/` beside it.

    Args:
        runs: one or more; what may be compared is compared (see lcia.report.compare).
        out: the HTML file, or a folder that shall hold report.html.

    Returns:
        The HTML file.
    """
    if not runs:
        raise UserError("no runs to report: name at least one run folder")
    out = Path(out)
    if out.is_dir():
        out = out / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    arenas = arrange(runs)
    chapters = []
    for number, arena in enumerate(arenas, start=1):
        gallery = Gallery(out.parent / "figures", prefix="" if len(arenas) == 1 else f"{number}-")
        chapters.append(_chapter(arena, number, gallery))
    environment = Environment(
        loader=PackageLoader("lcia.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percentage"] = _percentage
    environment.filters["soft"] = _soft
    text = environment.get_template("page.html").render(
        chapters=chapters, metrics=METRICS, palette=_palette(), not_recorded=NOT_RECORDED
    )
    partial = out.with_name(f".{out.name}.part")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, out)  # complete or absent
    return out
