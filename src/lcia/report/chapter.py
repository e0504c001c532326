"""What the page shows about one arena, section by section; page.html says how."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from lcia.report import figures
from lcia.report.compare import (
    COSTS,
    METHOD_COSTS,
    Arena,
    OverOrders,
    Series,
    differing_settings,
    estimate,
    pareto_front,
)
from lcia.report.examples import TaskExamples, collect_examples
from lcia.report.gallery import Gallery
from lcia.report.heat import HeatTable, confusion_heat, groups_heat, matrix_heat
from lcia.report.load import Run
from lcia.report.significance import Scope
from lcia.report.summary import summary, verdicts
from lcia.report.tables import (
    COST_NAMES,
    NOT_RECORDED,
    Grid,
    cost_grid,
    estimate_text,
    final_scores_grid,
    interval_words,
    metric_text,
    metrics_grid,
    orders_grid,
    significance_grid,
    significance_notes,
)

_UNFOLDED_COURSES = 3  # training figures; of more, only those with a β are open


@dataclass(frozen=True)
class Metrics:
    grid: Grid
    references: frozenset[int]  # rows of methods measured only before and after the stream
    bars: Markup
    several_seeds: bool
    intervals: tuple[str, ...]  # what they are
    notes: tuple[str, ...]  # rows that did not count and intervals that are missing, which a reader must know of


@dataclass(frozen=True)
class Significance:
    reference: str
    grid: Grid
    verdicts: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Orders:
    """The methods over several orders of one stream's tasks."""

    title: str
    orders: tuple[tuple[int | None, tuple[str, ...]], ...]  # number and tasks of each
    grid: Grid
    intervals: tuple[str, ...]  # of the single orders
    significance: Significance | None


@dataclass(frozen=True)
class Matrices:
    tables: tuple[HeatTable, ...]
    top: float  # the score of the strongest colour


@dataclass(frozen=True)
class FinalScores:
    grid: Grid
    bars: Markup
    radar: Markup | None  # None: too few tasks, or no scores


@dataclass(frozen=True)
class Grouping:
    """One assignment of tasks to groups, and the methods that have it."""

    labels: tuple[str, ...]
    text: str
    table: HeatTable | None


@dataclass(frozen=True)
class Routed:
    """Where the test inputs of each task were sent, and the methods that sent them so."""

    labels: tuple[str, ...]
    seeds: int  # whose requests are added up
    table: HeatTable


@dataclass(frozen=True)
class Cost:
    grid: Grid
    bars: Markup | None
    pareto: Markup | None
    fronts: tuple[str, ...]  # in words
    own_costs: bool  # a method names costs of its own


@dataclass(frozen=True)
class Course:
    label: str
    figure: Markup
    averages: bool


@dataclass(frozen=True)
class Training:
    courses: tuple[Course, ...]
    notes: tuple[str, ...]  # who has no course, or no β, and why
    averaging: Grid | None

    @property
    def folded(self) -> bool:
        return len(self.courses) > _UNFOLDED_COURSES


@dataclass(frozen=True)
class Origin:
    """Where the numbers come from."""

    runs: Grid
    differing: Grid | None  # settings, beside the method, that may explain a difference
    versions: Grid | None
    configs: tuple[tuple[str, str], ...]  # of each series' first run


@dataclass(frozen=True)
class Chapter:
    id: str
    arena: Arena
    sentences: tuple[str, ...]
    metrics: Metrics
    significance: Significance | None  # None: nothing to compare with
    matrices: Matrices
    over_time: Markup
    final: FinalScores
    groupings: tuple[Grouping, ...]
    routing: Grid | None
    confusions: tuple[Routed, ...]
    training: Training
    cost: Cost
    origin: Origin
    examples: list[TaskExamples] = field(default_factory=list)


def build_chapter(arena: Arena, scope: Scope, number: int, gallery: Gallery) -> Chapter:
    """Compute everything and draw every figure."""
    return Chapter(
        id=f"c{number}",
        arena=arena,
        sentences=tuple(summary(arena)),
        metrics=_metrics(arena, gallery),
        significance=_significance(scope),
        matrices=_matrices(arena, gallery),
        over_time=_over_time(arena, gallery),
        final=_final_scores(arena, gallery),
        groupings=_groupings(arena, gallery),
        routing=_routing(arena),
        confusions=_confusions(arena, gallery),
        training=_training(arena, gallery),
        cost=_cost(arena, gallery),
        origin=_origin(arena),
        examples=collect_examples(arena),
    )


def build_orders(found: OverOrders, scope: Scope) -> Orders:
    """What a method does whatever comes first."""
    words = interval_words(one for arena in found.arenas for one in arena.series)
    orders = tuple((arena.order, arena.tasks) for arena in found.arenas)
    return Orders(found.title, orders, orders_grid(found), tuple(words), _significance(scope))


def _significance(scope: Scope) -> Significance | None:
    if scope.reference is None or not scope.contrasts:
        return None
    return Significance(
        scope.reference, significance_grid(scope), tuple(verdicts(scope)), tuple(significance_notes([scope]))
    )


def _several_seeds(arena: Arena) -> bool:
    return any(len(one.runs) > 1 for one in arena.series)


def _interval(arena: Arena, mark: str) -> str:
    return f" {mark}: 95 % t-interval over seeds." if _several_seeds(arena) else ""


def _metrics(arena: Arena, gallery: Gallery) -> Metrics:
    words = interval_words(arena.series)
    whiskers = f" Whiskers: 95 % intervals, {_over(arena)}." if words else ""
    caption = f"Avg.ACC, Forgetting and New.ACC of each method.{whiskers}"
    missing = [
        f"{one.label}: no interval over test rows, {one.no_row_interval}."
        for one in arena.series
        if one.no_row_interval
    ]
    return Metrics(
        metrics_grid(arena),
        frozenset(row for row, one in enumerate(arena.series) if one.is_reference),
        gallery.hang("metrics", figures.metric_bars(arena), caption),
        _several_seeds(arena),
        tuple(words),
        (*missing, *(note for one in arena.series for run in one.runs for note in _lost_rows(one, run))),
    )


def _over(arena: Arena) -> str:
    """What the intervals of an arena are taken over."""
    found = [interval.over for one in arena.series if (interval := one.interval("avg_acc"))]
    if "test rows" not in found:
        return "over seeds"
    return "over seeds, or over the test rows of a single run" if "seeds" in found else "over the test rows of one run"


def _lost_rows(series: Series, run: Run) -> list[str]:
    where = f"{series.label}, seed {run.seed}"
    left_out = [
        f"{where}: {rows} training rows of {task} were too long and left out."
        for task, rows in run.left_out.items()
        if rows
    ]
    too_long = [
        f"{where}: {rows} test rows of {task} were too long and count as wrong."
        for task, rows in run.too_long.items()
        if rows
    ]
    return left_out + too_long


def _matrices(arena: Arena, gallery: Gallery) -> Matrices:
    top = figures.ceiling(arena.series)
    if max(len(arena.tasks), len(arena.series)) <= figures.SIDE_BY_SIDE:
        gallery.keep("matrices", figures.matrices(arena.series, top))
    else:  # too large for one picture
        for one in arena.series:
            gallery.keep(f"matrix {one.label}", figures.matrices([one], top))
    return Matrices(tuple(matrix_heat(one, top) for one in arena.series), top)


def _over_time(arena: Arena, gallery: Gallery) -> Markup:
    caption = f"Score after 0 to {len(arena.tasks)} learned tasks; dotted: the task itself has just been learned."
    if len(arena.series) <= figures.FEW_LINES:
        caption += _interval(arena, "Bands")
    return gallery.hang("scores over time", figures.scores_over_time(arena), caption)


def _final_scores(arena: Arena, gallery: Gallery) -> FinalScores:
    measured = any(score is not None for run in arena.runs for score in run.final_scores)
    drawn = None
    if measured and len(arena.tasks) >= figures.MIN_RADAR_TASKS:
        top = figures.ceiling(arena.series)
        caption = f"Final scores, one axis a task; rings at {top / 2:g} and {top:g} %"
        if len(arena.series) > figures.SHARED_RADAR:
            caption += "; tasks numbered as in the table; grey: the best score of any method"
        drawn = gallery.hang("radar", figures.radar(arena), f"{caption}.")
    caption = f"Score on each task after the last one, percent.{_interval(arena, 'Whiskers')}"
    bars = gallery.hang("final scores", figures.final_bars(arena), caption)
    return FinalScores(final_scores_grid(arena), bars, drawn)


def _groupings(arena: Arena, gallery: Gallery) -> tuple[Grouping, ...]:
    """Each distinct assignment once."""
    distinct: dict[str, tuple[Run, list[str]]] = {}
    for one in arena.series:
        for run in one.runs:
            key = repr((run.groups, run.group_scores, run.threshold))
            _, labels = distinct.setdefault(key, (run, []))
            if one.label not in labels:
                labels.append(one.label)
    groupings = []
    for run, labels in distinct.values():
        table = None
        if any(run.group_scores.get(task) for task in run.tasks):
            table = groups_heat(run)
            gallery.keep(f"groups {labels[0]}", figures.group_similarities(run))
        groupings.append(Grouping(tuple(labels), _grouping_text(run, table is not None), table))
    return tuple(groupings)


def _grouping_text(run: Run, compared: bool) -> str:
    groups = figures.group_order(run)
    if not groups:
        return "no groups recorded."
    if not compared:
        sets = "one set of weights for all tasks" if len(groups) == 1 else f"{len(groups)} sets of weights"
        return f"{sets}; no similarities recorded."
    threshold = NOT_RECORDED if run.threshold is None else f"{run.threshold:g}"
    return (
        f"{len(groups)} group{'' if len(groups) == 1 else 's'} for {len(run.tasks)} tasks. "
        f"A task joins (✓) the most similar group from a similarity of {threshold}, or founds one."
    )


def _routing(arena: Arena) -> Grid | None:
    """How often a test input found its own group, and the Avg.ACC if it always had."""
    rows = []
    for one in arena.series:
        accuracy, oracle, base = (one.routing(key) for key in ("accuracy", "oracle_avg_acc", "base_model_answers"))
        if accuracy or oracle or base:
            n = len(one.runs)
            shares = [NOT_RECORDED if found is None else estimate_text(found, n) for found in (accuracy, oracle)]
            average = metric_text(one, "avg_acc")
            rows.append((one.label, shares[0], average, shares[1], NOT_RECORDED if base is None else f"{base.mean:g}"))
    columns = (
        "Method",
        "Routed to the task's own group, %",
        "Avg.ACC",
        "Avg.ACC with perfect routing",
        "Answers by the base model",
    )
    return Grid(columns, tuple(rows)) if rows else None


def _confusions(arena: Arena, gallery: Gallery) -> tuple[Routed, ...]:
    """Each distinct one once, where there was more than one place to send a request to.

    The seeds of a series are added up where they put the tasks into the same groups.
    """
    distinct: dict[str, tuple[Run, dict[str, dict[str, int]], int, list[str]]] = {}
    for one in arena.series:
        alike: dict[str, list[Run]] = {}
        for run in one.runs:
            if run.routing.confusion:
                alike.setdefault(repr(run.groups), []).append(run)
        for groups, runs in alike.items():
            counts = _added([run.routing.confusion for run in runs])
            _, _, _, labels = distinct.setdefault(repr((groups, counts)), (runs[0], counts, len(runs), []))
            labels.append(one.label)
    confusions = []
    for run, counts, n_seeds, labels in distinct.values():
        table = confusion_heat(run, counts)
        if len(table.columns) > 1:
            gallery.keep(f"routing {labels[0]}", figures.routing_confusion(run, counts))
            confusions.append(Routed(tuple(labels), n_seeds, table))
    return tuple(confusions)


def _added(confusions: Sequence[figures.Confusion]) -> dict[str, dict[str, int]]:
    total: dict[str, dict[str, int]] = {}
    for confusion in confusions:
        for task, counts in confusion.items():
            row = total.setdefault(task, {})
            for group, n in counts.items():
                row[group] = row.get(group, 0) + n
    return total


def _cost(arena: Arena, gallery: Gallery) -> Cost:
    bars = drawn = None
    if any(one.cost(key) for one in arena.series for key in COSTS):
        bars = gallery.hang("cost", figures.cost_bars(arena), "Cost, mean over seeds.")
    keys = figures.recorded_costs(arena)
    fronts = [(COST_NAMES[key], pareto_front(arena.series, key)) for key in keys]
    if keys and len(arena.series) > 1:
        caption = (
            "Avg.ACC against cost, mean over seeds; up and to the left is better. Filled, joined by a line: no other "
            "method has at least the Avg.ACC for at most the cost. Grey ring: measured only after the whole stream, "
            "not in the contest."
        )
        drawn = gallery.hang("pareto", figures.pareto(arena), caption)
    return Cost(
        cost_grid(arena),
        bars,
        drawn,
        tuple(f"{name}: {', '.join(labels)}" for name, labels in fronts if labels),
        any(one.cost(key) for one in arena.series for key in METHOD_COSTS),
    )


def _training(arena: Arena, gallery: Gallery) -> Training:
    """The training course of each series' first seed."""
    courses, plain, silent, notes = [], [], [], []
    for one in arena.series:
        run = one.runs[0]
        if run.unreadable_steps:
            notes.append(f"{one.label}: {run.unreadable_steps} lines of the training log could not be read.")
        if not run.steps:
            silent.append(one.label)
            continue
        if not run.averages:
            plain.append(one.label)
        caption = f"{one.label}, seed {run.seed}: {_course_caption(run)}"
        drawn = gallery.hang(f"training {one.label}", figures.training_course(run), caption)
        courses.append(Course(one.label, drawn, run.averages))
    if plain:
        notes.append(f"No weights are averaged, so there is no β and no fallback to show: {', '.join(plain)}.")
    if silent:
        notes.append(f"No training log, because nothing was trained or it was not kept: {', '.join(silent)}.")
    return Training(tuple(courses), tuple(notes), _averaging(arena))


def _course_caption(run: Run) -> str:
    if not run.averages:
        return "loss over the steps of all tasks."
    return (
        "loss; β (line: median over tensors, band: 10th to 90th percentile; hatched: nothing averaged); "
        "share of (tensor, step) pairs that took the fallback."
    )


def _averaging(arena: Arena) -> Grid | None:
    """Fallback fraction and retained mass, one column a series that averages."""
    averaging = [one for one in arena.series if any(run.ema.retained_mass for run in one.runs)]
    if not averaging:
        return None
    shares = [estimate(run.ema.fallback_fraction for run in one.runs) for one in averaging]
    rows = [
        (
            "fallback fraction, all tasks",
            *(estimate_text(found, found.n if found else 1, 3) for found in shares),
        )
    ]
    for stage in dict.fromkeys(stage for one in averaging for run in one.runs for stage in run.ema.retained_mass):
        masses = [estimate(run.ema.retained_mass.get(stage) for run in one.runs) for one in averaging]
        rows.append(
            (
                f"retained mass, {stage}",
                *(estimate_text(found, found.n if found else 1, 3) for found in masses),
            )
        )
    return Grid(("", *(one.label for one in averaging)), tuple(rows))


def _origin(arena: Arena) -> Origin:
    runs = tuple(
        (one.label, str(run.seed), str(run.path), run.date or NOT_RECORDED) for one in arena.series for run in one.runs
    )
    differing = tuple((key, *values) for key, values in differing_settings(arena.series).items())
    packages = dict.fromkeys(name for run in arena.runs for name in run.versions)
    versions = tuple(
        (name, ", ".join(dict.fromkeys(run.versions.get(name) or NOT_RECORDED for run in arena.runs)))
        for name in packages
    )
    return Origin(
        Grid(("Method", "Seed", "Folder", "Date"), runs),
        Grid(("Setting", *(one.label for one in arena.series)), differing) if differing else None,
        Grid(("Package", "Version"), versions) if versions else None,
        tuple((one.title, one.runs[0].config_text or NOT_RECORDED) for one in arena.series),
    )
