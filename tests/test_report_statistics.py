"""The statistics of the report against oracles written from the definitions, in plain loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lcia.metrics import accuracy_metrics
from lcia.report.statistics import (
    RESAMPLES,
    SIGN_FLIPS,
    bootstrap_matrices,
    holm,
    non_dominated,
    paired_t_test,
    percentile_interval,
    sign_flip_test,
    t_factor,
    t_half_width,
)
from lcia.seeds import stable_seed

P_VALUES = st.lists(st.floats(0, 1), max_size=8)

# -- Holm


def test_holm_by_hand() -> None:
    # sorted 0.01 0.02 0.03 0.04 times 4 3 2 1 = 0.04 0.06 0.06 0.04, and none smaller than the one before it
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06], abs=1e-15)
    assert holm([0.6, 0.4]) == pytest.approx([0.8, 0.8], abs=1e-15)
    assert holm([0.9, 0.7]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@given(P_VALUES, st.floats(0.001, 0.999))
def test_holm_rejects_what_its_step_down_procedure_rejects(p_values: list[float], alpha: float) -> None:
    """Holm's own form: go up through the sorted p, stop at the first p_(k) > α / (m − k + 1)."""
    m = len(p_values)
    rejected: set[int] = set()
    for k, i in enumerate(sorted(range(m), key=lambda i: p_values[i]), start=1):
        if p_values[i] * (m - k + 1) > alpha:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(p_values)) if p <= alpha} == rejected


@given(P_VALUES)
def test_holm_lies_between_raw_and_bonferroni(p_values: list[float]) -> None:
    for raw, corrected in zip(p_values, holm(p_values), strict=True):
        assert raw <= corrected <= min(1.0, raw * len(p_values))


# -- t


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), min_size=2, max_size=9))
def test_paired_t_test_is_scipys(pairs: list[tuple[int, int]]) -> None:
    first, second = [float(a) for a, _ in pairs], [float(b) for _, b in pairs]
    differences = [a - b for a, b in zip(first, second, strict=True)]
    found = paired_t_test(differences)
    if len(set(differences)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(float(stats.ttest_rel(first, second).pvalue), abs=1e-12)


def test_paired_t_test_by_hand() -> None:
    # two values 1 and 3: t = 2 / (√2 / √2) = 2 with one degree of freedom, whose distribution is Cauchy's
    assert paired_t_test([1.0, 3.0]) == pytest.approx(1 - 2 / math.pi * math.atan(2), abs=1e-12)
    assert paired_t_test([4.0]) is None
    assert paired_t_test([0.3, 0.1 + 0.2]) is None  # equal but for rounding


def test_two_values_need_an_enormous_difference() -> None:
    assert t_factor(2) == pytest.approx(math.tan(0.475 * math.pi), abs=1e-9)  # 12.7
    assert t_half_width([1.0]) is None


# -- sign flips


def flipped(contributions: Sequence[float]) -> float:
    """All sign patterns, one by one."""
    observed = abs(math.fsum(contributions))
    patterns = list(itertools.product((-1, 1), repeat=len(contributions)))
    hits = sum(
        abs(math.fsum(sign * c for sign, c in zip(signs, contributions, strict=True))) >= observed - 1e-9
        for signs in patterns
    )
    return hits / len(patterns)


@settings(max_examples=40)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8))
def test_few_contributions_try_all_patterns(values: list[int]) -> None:
    contributions = [value / 7 for value in values]
    assert sign_flip_test(contributions) == pytest.approx(flipped(contributions), abs=1e-12)


def test_a_difference_of_nothing_is_the_weakest_there_is() -> None:
    """The sum of these is 0 but for rounding: every pattern is as strong."""
    assert sign_flip_test([-2 / 7, -3 / 7, 2 / 7, 3 / 7]) == 1.0


def test_many_contributions_are_drawn_near_the_binomial_answer() -> None:
    """60 rows differ, 40 one way: P(|2 X − 60| ≥ 20) for X of 60 fair coins."""
    contributions = [1.0] * 40 + [-1.0] * 20 + [0.0] * 140
    exact = 2 * float(stats.binom.sf(39, 60, 0.5))
    found = sign_flip_test(contributions)
    assert found == pytest.approx(exact, abs=4 * math.sqrt(exact / SIGN_FLIPS))
    assert found == sign_flip_test(contributions)
    assert sign_flip_test([1.0] * 40) == 1 / (SIGN_FLIPS + 1)  # never 0: the observed pattern counts


def test_no_disagreement_is_no_evidence() -> None:
    assert sign_flip_test([0.0, 0.0]) == sign_flip_test([]) == 1.0


# -- bootstrap


def plain_metrics(matrix: list[list[float]]) -> tuple[float, float, float]:
    """Avg.ACC, Forgetting and New.ACC as the definitions say."""
    tasks = len(matrix[0])
    avg_acc = sum(matrix[tasks]) / tasks
    new_acc = sum(matrix[i + 1][i] for i in range(tasks)) / tasks
    lost = [max(matrix[j][i] for j in range(i + 1, tasks)) - matrix[tasks][i] for i in range(tasks - 1)]
    return avg_acc, sum(lost) / len(lost), new_acc


def test_bootstrap_is_the_plain_loop() -> None:
    random = np.random.default_rng(5)
    names, sizes = ("a", "b"), (7, 11)
    scores = [random.integers(0, 2, (3, n)) * 100.0 for n in sizes]  # (T + 1, n_i)
    drawn = []
    for name, n in zip(names, sizes, strict=True):
        generator = np.random.default_rng(stable_seed(0, "bootstrap", name))
        drawn.append([generator.multinomial(n, [1 / n] * n) for _ in range(RESAMPLES)])
    expected = []
    for b in range(RESAMPLES):
        matrix = [[0.0, 0.0] for _ in range(3)]
        for i, n in enumerate(sizes):
            for row in range(3):
                sample = [scores[i][row][e] for e in range(n) for _ in range(drawn[i][b][e])]
                assert len(sample) == n
                matrix[row][i] = sum(sample) / n
        expected.append(plain_metrics(matrix))
    matrices = bootstrap_matrices(scores, names)
    found = [accuracy_metrics(matrix) for matrix in matrices]
    keys = ("avg_acc", "forgetting", "new_acc")
    np.testing.assert_allclose([[one[key] for key in keys] for one in found], expected, atol=1e-9)
    for i in range(3):
        ranked = sorted(values[i] for values in expected)
        place = 0.025 * (RESAMPLES - 1)  # between two values, the line between them
        low = ranked[int(place)] + (place - int(place)) * (ranked[int(place) + 1] - ranked[int(place)])
        assert percentile_interval([values[i] for values in expected])[0] == pytest.approx(low, abs=1e-9)


@pytest.mark.parametrize("right", [60, 200, 370])
def test_bootstrap_of_one_task_is_the_binomial_interval(right: int) -> None:
    n = 400
    scores = np.array([[math.nan] * n, [100.0] * right + [0.0] * (n - right)])  # (2, n)
    low, high = percentile_interval(list(bootstrap_matrices([scores], ["task"])[:, 1, 0]))
    expected = 100 * stats.binom.ppf([0.025, 0.975], n, right / n) / n
    assert (low, high) == pytest.approx(tuple(expected), abs=0.6)  # points; the interval is 7 to 10 wide


def test_bootstrap_keeps_pairs_and_strata_together() -> None:
    same = np.random.default_rng(0).integers(0, 2, 30) * 100.0
    scores = [np.array([same * math.nan, same, same]), np.array([same * math.nan, same * math.nan, same])]
    matrices = bootstrap_matrices(scores, ["a", "b"])
    assert (matrices[:, 1, 0] == matrices[:, 2, 0]).all()  # nothing was forgotten, in any resample
    assert np.isnan(matrices[:, 0]).all()
    assert np.isnan(matrices[:, 1, 1]).all()
    assert abs(np.corrcoef(matrices[:, 2, 0], matrices[:, 2, 1])[0, 1]) < 0.1  # two tasks are drawn apart
    again = bootstrap_matrices([scores[1], scores[0]], ["b", "a"])
    assert (again[:, 2, 0] == matrices[:, 2, 1]).all()  # a task's draw depends on its name alone


# -- fronts

GRID = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12)


@settings(max_examples=40)
@given(GRID)
def test_front_is_what_nothing_dominates(points: list[tuple[int, int]]) -> None:
    found = non_dominated([float(cost) for cost, _ in points], [float(score) for _, score in points])
    for i, (cost, score) in enumerate(points):
        beaten = False
        for other_cost, other_score in points:
            if other_cost <= cost and other_score >= score and (other_cost < cost or other_score > score):
                beaten = True
        assert found[i] is not beaten


@settings(max_examples=40)
@given(GRID.filter(bool))
def test_every_point_has_a_match_on_the_front(points: list[tuple[int, int]]) -> None:
    found = non_dominated([float(cost) for cost, _ in points], [float(score) for _, score in points])
    front = [point for point, best in zip(points, found, strict=True) if best]
    assert all(any(cost <= c and score >= s for cost, score in front) for c, s in points)
