"""`accuracy_metrics` against the paper's printed table, hand-made matrices, laws and a loop."""

from __future__ import annotations

import doctest
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcia.metrics import accuracy_metrics

PAPER = Path(__file__).parents[2] / "shared/paper/results.json"
NAN = math.nan
KEYS = {"avg_acc", "forgetting", "new_acc", "bwt", "fwt"}
laws = settings(deadline=None, derandomize=True, max_examples=150)


@pytest.mark.skipif(not PAPER.is_file(), reason=f"{PAPER.name} of the shared material is absent")
@pytest.mark.parametrize("beta", ["0.990", "0.991", "0.992"])
def test_table_7(beta: str) -> None:
    row = json.loads(PAPER.read_text())["table_7_fixed_ema"][beta]
    tasks = len(row["final"])
    matrix = np.full((tasks + 1, tasks), NAN)
    matrix[np.arange(1, tasks + 1), np.arange(tasks)] = row["new"]
    matrix[tasks] = row["final"]
    metrics = accuracy_metrics(matrix)
    for key in ("avg_acc", "forgetting", "new_acc"):
        assert metrics[key] == pytest.approx(row[key], abs=0.0051)
    assert metrics["bwt"] == pytest.approx(-row["forgetting"], abs=0.0051)
    assert metrics["fwt"] is None


def test_by_hand() -> None:
    matrix = [
        [1.0, 2.0, 3.0],  # before training
        [50.0, 10.0, None],
        [60.0, 70.0, 20.0],
        [40.0, 65.0, 80.0],
    ]
    assert accuracy_metrics(matrix) == {
        "avg_acc": pytest.approx((40 + 65 + 80) / 3),
        "forgetting": pytest.approx(((60 - 40) + (70 - 65)) / 2),  # task 1 was best after task 2
        "new_acc": pytest.approx((50 + 70 + 80) / 3),
        "bwt": pytest.approx(((40 - 50) + (65 - 70)) / 2),
        "fwt": pytest.approx((10 + 20) / 2),
    }


def test_holes_are_left_out_term_by_term() -> None:
    matrix = [
        [NAN, NAN, NAN, NAN],
        [NAN, 10.0, NAN, NAN],
        [60.0, NAN, NAN, NAN],
        [50.0, NAN, 30.0, NAN],
        [40.0, 65.0, NAN, 80.0],
    ]
    assert accuracy_metrics(matrix) == {
        "avg_acc": pytest.approx((40 + 65 + 80) / 3),
        "forgetting": pytest.approx(60 - 40),  # task 2 has no earlier score, task 3 no last one
        "new_acc": pytest.approx((30 + 80) / 2),
        "bwt": None,
        "fwt": pytest.approx(10),
    }


def test_scores_before_a_task_was_learned_are_no_forgetting() -> None:
    # row 0 and the row before training a task hold 90, which was never learned and so cannot be forgotten
    matrix = [[90.0, 90.0], [50.0, 90.0], [50.0, 60.0]]
    assert accuracy_metrics(matrix)["forgetting"] == 0.0


def test_one_task_and_no_measurement() -> None:
    assert accuracy_metrics([[10.0], [30.0]]) == {
        "avg_acc": 30.0,
        "forgetting": None,
        "new_acc": 30.0,
        "bwt": None,
        "fwt": None,
    }
    assert accuracy_metrics(np.full((4, 3), NAN)) == dict.fromkeys(KEYS)


def test_plain_floats_come_out() -> None:
    for value in accuracy_metrics(np.eye(4, 3, dtype=np.float32)).values():
        assert type(value) is float
    json.dumps(accuracy_metrics(np.eye(4, 3)))


@pytest.mark.parametrize(
    ("matrix", "shape"),
    [
        (np.zeros((3, 3)), r"\(3, 3\)"),
        (np.zeros((2, 3)), r"\(2, 3\)"),
        (np.zeros(3), r"\(3,\)"),
        (np.zeros((1, 0)), r"\(1, 0\)"),
        (np.zeros((3, 2, 1)), r"\(3, 2, 1\)"),
        ([], r"\(0,\)"),
        ([[1.0, 2.0], [3.0], [4.0, 5.0]], r"\(3,\)"),
        ([[1.0], [math.inf]], r"\(2, 1\).*row 1"),
        ([[1.0], ["high"]], "high"),
        ([1.0, 2.0], r"\(2,\)"),
        (3.0, r"\(\)"),
        ([[1.0], None], "rows"),
    ],
)
def test_refused_naming_the_shape(matrix: Any, shape: str) -> None:
    with pytest.raises(ValueError, match=shape):
        accuracy_metrics(matrix)


cells = st.one_of(st.just(NAN), st.integers(0, 200).map(lambda n: n / 2))


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    tasks = draw(st.integers(1, 6))
    values = draw(st.lists(cells, min_size=tasks * (tasks + 1), max_size=tasks * (tasks + 1)))
    return np.array(values, dtype=np.float64).reshape(tasks + 1, tasks)


def _mean(terms: list[float]) -> float | None:
    return sum(terms) / len(terms) if terms else None


def _loop(a: np.ndarray) -> dict[str, float | None]:
    """The definitions, cell by cell, with rows and tasks counted as in the paper (task i is column i-1)."""
    last = a.shape[1]

    def cell(j: int, i: int) -> float | None:
        value = float(a[j, i - 1])
        return None if math.isnan(value) else value

    forgetting, bwt = [], []
    for i in range(1, last):
        end, new = cell(last, i), cell(i, i)
        before = [value for j in range(i, last) if (value := cell(j, i)) is not None]
        if end is not None and before:
            forgetting.append(max(before) - end)
        if end is not None and new is not None:
            bwt.append(end - new)
    return {
        "avg_acc": _mean([v for i in range(1, last + 1) if (v := cell(last, i)) is not None]),
        "forgetting": _mean(forgetting),
        "new_acc": _mean([v for i in range(1, last + 1) if (v := cell(i, i)) is not None]),
        "bwt": _mean(bwt),
        "fwt": _mean([v for i in range(2, last + 1) if (v := cell(i - 1, i)) is not None]),
    }


@given(matrices())
@laws
def test_equals_the_loop(matrix: np.ndarray) -> None:
    got, expected = accuracy_metrics(matrix), _loop(matrix)
    assert set(got) == KEYS
    for key, value in expected.items():
        assert got[key] == (None if value is None else pytest.approx(value, abs=1e-9)), key


@given(matrices(), st.integers(-50, 50))
@laws
def test_a_shift_moves_levels_and_leaves_differences(matrix: np.ndarray, shift: int) -> None:
    before, after = accuracy_metrics(matrix), accuracy_metrics(matrix + shift)
    for key, value in before.items():
        moved = shift if key in {"avg_acc", "new_acc", "fwt"} else 0
        assert after[key] == (None if value is None else pytest.approx(value + moved, abs=1e-9)), key


@given(st.integers(2, 6), st.integers(0, 100))
@laws
def test_a_constant_matrix_forgets_nothing(tasks: int, value: int) -> None:
    metrics = accuracy_metrics(np.full((tasks + 1, tasks), float(value)))
    assert metrics == {"avg_acc": value, "forgetting": 0.0, "new_acc": value, "bwt": 0.0, "fwt": value}


@given(matrices(), st.randoms(use_true_random=False))
@laws
def test_the_order_of_the_tasks_does_not_matter_to_the_last_row(matrix: np.ndarray, random: Any) -> None:
    columns = list(range(matrix.shape[1]))
    random.shuffle(columns)
    got, expected = accuracy_metrics(matrix[:, columns])["avg_acc"], accuracy_metrics(matrix)["avg_acc"]
    assert got == (None if expected is None else pytest.approx(expected, abs=1e-9))


@given(matrices())
@laws
def test_forgetting_is_at_least_the_negated_bwt(matrix: np.ndarray) -> None:
    full = np.nan_to_num(matrix)
    metrics = accuracy_metrics(full)
    if metrics["forgetting"] is not None and metrics["bwt"] is not None:
        assert metrics["forgetting"] >= -metrics["bwt"] - 1e-9


def test_the_argument_is_not_changed() -> None:
    matrix = np.array([[NAN, 1.0], [2.0, NAN], [3.0, 4.0]])
    copy = matrix.copy()
    accuracy_metrics(matrix)
    np.testing.assert_array_equal(matrix, copy)


def test_the_example_in_the_docs() -> None:
    page = Path(__file__).parents[1] / "docs/concepts/metrics.md"
    assert doctest.testfile(str(page), module_relative=False).failed == 0
