"""Is a method better than the reference, or was it chance? Paired tests, corrected for their number.

Two questions, each with its own test and its own Holm correction over all comparisons of the table:

- over seeds (over orders where orders are compared): is it more than what another seed changes? Paired t-test.
- over test rows: for these trained models, is it more than what other test rows change? Paired permutation test.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lcia.errors import UserError, did_you_mean
from lcia.report.compare import Arena, Estimate, OverOrders, Series, arrange, estimate, over_orders
from lcia.report.load import NoScores, Run
from lcia.report.statistics import holm, paired_t_test, sign_flip_test

ALPHA = 0.05


@dataclass(frozen=True)
class Test:
    """p of "no difference", both sides; `missing` says why there is none."""

    n: int  # seeds, orders, or test rows
    p: float | None = None
    corrected: float | None = None  # by Holm
    family: int = 0  # tests that were corrected together, over all tables
    missing: str = ""


@dataclass(frozen=True)
class Contrast:
    """A method's Avg.ACC less the reference's."""

    label: str
    reference: str
    difference: Estimate | None  # points, over the seeds (orders) that both have
    repeats: Test  # over seeds (orders)
    examples: Test  # over test rows
    unshared_rows: int = 0  # answered by only one of the two, and left out of `examples`
    examples_difference: float | None = None  # points, over the test rows that both have answered


@dataclass(frozen=True)
class Scope:
    """The contrasts inside one arena, or over several that differ in the order of their tasks."""

    title: str
    over: str  # "seeds" or "orders"
    reference: str | None  # None: it has no run here
    contrasts: tuple[Contrast, ...]


@dataclass(frozen=True)
class Comparison:
    """Everything that is compared: `scopes` follow `arenas`, `order_scopes` follow `orders`."""

    arenas: tuple[Arena, ...]
    orders: tuple[OverOrders, ...]
    scopes: tuple[Scope, ...]
    order_scopes: tuple[Scope, ...]

    @property
    def all_scopes(self) -> tuple[Scope, ...]:
        return self.scopes + self.order_scopes


@dataclass(frozen=True)
class _Pair:
    """Runs of a method and of the reference with one seed and one order."""

    run: Run
    reference: Run
    difference: float  # of Avg.ACC


def compare_runs(runs: Sequence[Run], against: str | None = None) -> Comparison:
    """Arrange the runs and test every method against a reference.

    Args:
        against: the reference's label, or its method where that has one series; None: the first series.

    Raises:
        UserError: no runs, or `against` names no series, or several.
    """
    if not runs:
        raise UserError("no runs to compare: name at least one run folder")
    arenas = arrange(runs)
    orders = over_orders(arenas)
    if against is not None and not any(_reference(_methods([arena]), against) for arena in arenas):
        raise UserError(f"--against: no run of {against!r} here. {did_you_mean(against, _methods(arenas))}")
    scopes = [_scope(arena.title, "seeds", [arena], against) for arena in arenas]
    scopes += [_scope(one.title, "orders", one.arenas, against) for one in orders]
    scopes = _corrected(scopes)
    return Comparison(tuple(arenas), tuple(orders), tuple(scopes[: len(arenas)]), tuple(scopes[len(arenas) :]))


def _methods(arenas: Sequence[Arena]) -> dict[str, str]:
    """label → method of every series."""
    return {one.label: one.method for arena in arenas for one in arena.series}


def _reference(methods: Mapping[str, str], against: str | None) -> str | None:
    """The label that `against` means."""
    if against is None:
        return next(iter(methods))
    if against in methods:
        return against
    found = [label for label, method in methods.items() if method == against]
    if len(found) > 1:
        raise UserError(f"--against: {against!r} has several series; name one: {', '.join(map(repr, found))}")
    return found[0] if found else None


def _scope(title: str, over: str, arenas: Sequence[Arena], against: str | None) -> Scope:
    methods = _methods(arenas)
    reference = _reference(methods, against)
    contrasts = []
    for label in methods:
        if reference is None or label == reference:
            continue
        per_arena = [_pairs(arena.named(label), arena.named(reference)) for arena in arenas]
        # what the t-test takes for one independent value: the pair of one seed, or all pairs of one order
        repeats = [[pair] for pair in per_arena[0]] if over == "seeds" else [pairs for pairs in per_arena if pairs]
        means = [math.fsum(pair.difference for pair in pairs) / len(pairs) for pairs in repeats]
        examples, unshared, on_rows = _over_test_rows(repeats)
        repeated = _over_repeats(means, over)
        contrasts.append(Contrast(label, reference, estimate(means), repeated, examples, unshared, on_rows))
    return Scope(title, over, reference, tuple(contrasts))


def _pairs(series: Series | None, reference: Series | None) -> list[_Pair]:
    """One a seed that both have and in which both were measured on all tasks."""
    if series is None or reference is None:
        return []
    theirs = {run.seed: run for run in reference.runs}
    pairs = []
    for run in series.runs:
        other = theirs.get(run.seed)
        mine, its = run.metrics.get("avg_acc"), None if other is None else other.metrics.get("avg_acc")
        if other is not None and mine is not None and its is not None:
            pairs.append(_Pair(run, other, mine - its))
    return pairs


def _over_repeats(differences: Sequence[float], over: str) -> Test:
    n = len(differences)
    if n < 2:
        return Test(n, missing=f"{'no' if n == 0 else 'only one'} {over.removesuffix('s')} in common")
    p = paired_t_test(differences)
    return Test(n, p, missing="" if p is not None else f"the difference is the same in all {over}")


def _over_test_rows(repeats: Sequence[Sequence[_Pair]]) -> tuple[Test, int, float | None]:
    """The test, how many rows only one of the two methods answered, and the difference over the others.

    A row's contribution is its share in the difference of Avg.ACC: a mean over repeats, their pairs, tasks, and rows.
    """
    contributions: dict[tuple[str, str], float] = {}
    unshared: set[tuple[str, str]] = set()
    for pairs in repeats:
        for pair in pairs:
            try:
                mine, theirs = pair.run.final_example_scores, pair.reference.final_example_scores
            except NoScores as why:
                return Test(0, missing=str(why)), 0, None
            for task in pair.run.tasks:
                common = mine[task].keys() & theirs[task].keys()
                unshared |= {(task, row) for row in mine[task].keys() ^ theirs[task].keys()}
                if not common:
                    return Test(0, missing=f"no test row of {task} in common"), 0, None
                weight = 1 / (len(repeats) * len(pairs) * len(pair.run.tasks) * len(common))
                for row in sorted(common):
                    share = weight * (mine[task][row] - theirs[task][row])
                    contributions[task, row] = contributions.get((task, row), 0.0) + share
    if not contributions:
        return Test(0, missing="no run in common"), 0, None
    values = list(contributions.values())
    return Test(len(values), sign_flip_test(values)), len(unshared), math.fsum(values)


def _corrected(scopes: Sequence[Scope]) -> list[Scope]:
    """Holm over all comparisons of the table, the tests over seeds and orders apart from those over test rows."""
    contrasts = [one for scope in scopes for one in scope.contrasts]
    repeats = iter(_holm([one.repeats for one in contrasts]))
    examples = iter(_holm([one.examples for one in contrasts]))
    return [
        replace(
            scope,
            contrasts=tuple(replace(one, repeats=next(repeats), examples=next(examples)) for one in scope.contrasts),
        )
        for scope in scopes
    ]


def _holm(tests: Sequence[Test]) -> list[Test]:
    """A test that could not be made is none of the family."""
    p_values = [test.p for test in tests if test.p is not None]
    made = iter(holm(p_values))
    return [test if test.p is None else replace(test, corrected=next(made), family=len(p_values)) for test in tests]
