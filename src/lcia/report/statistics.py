"""Intervals, tests and fronts: pure functions on numbers, which know nothing of runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit
from scipy.stats import permutation_test

from lcia.seeds import stable_seed

CONFIDENCE = 0.95
RESAMPLES = 2000  # of the bootstrap
SIGN_FLIPS = 9999  # of the permutation test
_AT_ONCE = 100  # resamples: of 100,000 examples all of them would be gigabytes
_NO_SPREAD = 1e-9  # of a score's size: less is what rounding leaves of equal numbers

Values = NDArray[np.float64]


def t_factor(n: int) -> float:
    """t(0.975, n − 1): how many standard errors the 95 % t-interval of n values reaches to each side."""
    return float(stdtrit(n - 1, 0.5 + CONFIDENCE / 2))


def t_half_width(values: Sequence[float]) -> float | None:
    """t(0.975, n − 1) · s / √n, with s the standard deviation over n − 1; None for fewer than two values."""
    if len(values) < 2:
        return None
    return t_factor(len(values)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def paired_t_test(differences: Sequence[float]) -> float | None:
    """p = 2 · P(T_{n−1} ≤ −|t|) with t = mean / (s / √n): that the mean difference is 0, both sides.

    None where t is not defined: fewer than two differences, or differences that are all equal.
    """
    n = len(differences)
    if n < 2:
        return None
    mean, spread = float(np.mean(differences)), float(np.std(differences, ddof=1))
    if spread <= _NO_SPREAD * max(1.0, abs(mean)):
        return None
    return float(2 * stdtr(n - 1, -abs(mean) / (spread / math.sqrt(n))))


def sign_flip_test(contributions: Sequence[float], *names: str) -> float:
    """p = P(|Σ ±c_e| ≥ |Σ c_e|): that examples favour neither of two methods, both sides.

    A paired permutation test: if the methods were alike, each example's difference could as well have had the other
    sign. All sign patterns are tried where there are at most 9,999, else 9,999 drawn ones, and (1 + hits) / (1 + 9,999)
    is returned.

    Args:
        contributions: what each example adds to the difference, c_e.
        names: seed the draw.
    """
    telling = np.array([c for c in contributions if c != 0.0])  # (E,) a zero has no sign
    if telling.size < 2:  # the only pattern and its mirror image are equally strong
        return 1.0
    telling /= np.abs(telling).max()

    def strength(signed: np.ndarray, axis: int) -> np.ndarray:
        # rounded: sums of the same numbers in other signs are equal but for their last digits, and must tie
        return np.round(np.abs(np.sum(signed, axis=axis)), 9)

    found = permutation_test(
        (telling,),
        strength,
        permutation_type="samples",
        alternative="greater",
        n_resamples=SIGN_FLIPS,
        vectorized=True,
        batch=max(1, min(500, 5_000_000 // telling.size)),  # what is in memory at once
        random_state=np.random.default_rng(stable_seed(0, "sign flips", *names)),
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """p̃_(i) = max_{j ≤ i} min(1, (m − j + 1) · p_(j)) for p_(1) ≤ … ≤ p_(m), in the order given (Holm 1979).

    All p̃ below α: the chance of even one false claim among the m is at most α, however the tests depend on each other.
    """
    m = len(p_values)
    corrected = [0.0] * m
    largest = 0.0
    for rank, i in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (m - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def bootstrap_matrices(scores: Sequence[Values], names: Sequence[str]) -> Values:
    """The accuracy matrix as it might have been with other test examples of the same tasks.

    Stratified by task: of a task's n examples, n are drawn with replacement, the same ones for all rows of the matrix,
    so that a score and the earlier score it is compared with stay a pair.

    Args:
        scores: one (T + 1, n_i) array a task, in percent: example e after j tasks; a row of NaN was not measured.
        names: one a task, which seeds its draw: methods tested on the same examples get the same draws.

    Returns:
        (2000, T + 1, T).
    """
    matrices = np.empty((RESAMPLES, len(scores) + 1, len(scores)))
    for i, (of_task, name) in enumerate(zip(scores, names, strict=True)):
        n = of_task.shape[1]
        random = np.random.default_rng(stable_seed(0, "bootstrap", name))
        for first in range(0, RESAMPLES, _AT_ONCE):
            some = min(_AT_ONCE, RESAMPLES - first)
            times = random.multinomial(n, np.full(n, 1 / n), size=some)  # (b, n) how often each example is drawn
            matrices[first : first + some, :, i] = times @ of_task.T / n
    return matrices


def percentile_interval(values: Sequence[float] | Values) -> tuple[float, float]:
    """The 2.5th and the 97.5th percentile."""
    low, high = np.quantile(values, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return float(low), float(high)


def non_dominated(costs: Sequence[float], scores: Sequence[float]) -> list[bool]:
    """Which points no other beats: none costs at most as much and scores at least as high, and is better in one."""
    points = list(zip(costs, scores, strict=True))
    return [
        not any(other != (cost, score) and other[0] <= cost and other[1] >= score for other in points)
        for cost, score in points
    ]
