"""Pure functions on the accuracy matrix of a continual run.

`A[j][i]` is the score on task i after training task j; row 0 is before any training, so a stream of T tasks
has T + 1 rows and T columns. A cell that was not measured is NaN or None.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float64]


def accuracy_metrics(matrix: Any) -> dict[str, float | None]:
    """Summaries of how a stream was learned and forgotten, in the unit of the matrix.

    With tasks and rows counted from 1, and row 0 before training (arXiv 2410.10868, App. L, M):

        avg_acc    = mean_i A[T][i]
        forgetting = mean_{i<T} (max_{i<=j<=T-1} A[j][i] - A[T][i])
        new_acc    = mean_i A[i][i]
        bwt        = mean_{i<T} (A[T][i] - A[i][i])
        fwt        = mean_{i>=2} A[i-1][i]

    Each mean runs over the terms whose cells were measured (the maximum over the measured rows), and is None
    where there is no such term: forgetting of a single task, bwt of a matrix without a diagonal.

    Args:
        matrix: (T+1, T) array, or rows of numbers, NaN or None.

    Raises:
        ValueError: the shape is not (T+1, T) with T >= 1, or a cell is infinite or not a number.
    """
    scores = _scores(matrix)  # (T+1, T)
    tasks = scores.shape[1]
    last = scores[tasks]  # (T,) after the last task
    learned = scores[1:].diagonal()  # (T,) each task when it was new
    ahead = scores.diagonal()[1:]  # (T-1,) tasks 2..T just before they were learned
    return {
        "avg_acc": _mean(last),
        "forgetting": _mean(_forgetting(scores)),
        "new_acc": _mean(learned),
        "bwt": _mean(last[:-1] - learned[:-1]),
        "fwt": _mean(ahead),
    }


def forgetting_by_task(matrix: Any) -> list[float | None]:
    """max_{i<=j<=T-1} A[j][i] - A[T][i] for tasks 1..T-1, None where a cell is missing; `accuracy_metrics`' terms."""
    return [None if np.isnan(term) else term for term in _forgetting(_scores(matrix))]


def _forgetting(scores: Scores) -> list[float]:
    tasks = scores.shape[1]
    return [_largest(scores[i + 1 : tasks, i]) - float(scores[tasks, i]) for i in range(tasks - 1)]


def _scores(matrix: Any) -> Scores:
    try:
        scores = np.array(matrix, dtype=np.float64)  # None becomes NaN
    except (TypeError, ValueError) as error:
        raise ValueError(f"matrix must be (T+1, T) rows of numbers, NaN or None: {error}") from error
    if scores.ndim != 2 or scores.shape[1] < 1 or scores.shape[0] != scores.shape[1] + 1:
        raise ValueError(f"matrix must be (T+1, T) with T >= 1 tasks; got shape {scores.shape}")
    if np.isinf(scores).any():
        row, column = np.argwhere(np.isinf(scores))[0]
        raise ValueError(f"matrix of shape {scores.shape} has an infinite cell at row {row}, task {column + 1}")
    return scores


def _largest(cells: Scores) -> float:
    measured = cells[~np.isnan(cells)]
    return float(measured.max()) if measured.size else float("nan")


def _mean(terms: Iterable[float]) -> float | None:
    measured = [float(term) for term in terms if not np.isnan(term)]
    return float(np.mean(measured)) if measured else None
