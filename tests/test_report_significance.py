"""Intervals over test rows, tests against a reference, several orders: from run folders to the numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lcia.errors import UserError
from lcia.report import Run, compare_runs, comparison_json, comparison_markdown, comparison_tables, load_run
from lcia.report.compare import arrange, over_orders, pareto_front
from lcia.report.statistics import holm
from lcia.report.tables import cost_grid
from lcia.seeds import stable_seed
from report_runs import make_answered_run, make_run
from test_report_compare import T3, made, printed

Answers = dict[tuple[int, str], list[float]]


def answered(folder: Path, method: str, seed: int = 0, **options: Any) -> Run:
    name = f"{len(list(folder.iterdir()))}-{method}-{seed}"
    return load_run(make_answered_run(folder / name, method, seed=seed, **({"tasks": T3} | options)))


def measured(folder: Path, method: str, seed: int = 0, avg_acc: float | None = None, **options: Any) -> Run:
    """A run with this Avg.ACC, whose predictions are not those of its matrix."""
    empty = dict.fromkeys(("forgetting", "new_acc", "bwt", "fwt"))
    return made(folder, method, seed, metrics={"avg_acc": avg_acc} | empty, **options)


# -- intervals over test rows


def test_a_single_run_has_a_bootstrap_interval_labelled_as_one(tmp_path: Path) -> None:
    runs = [answered(tmp_path, "lora"), answered(tmp_path, "multi_task")]
    (comparison,) = comparison_json(runs)["comparisons"]
    lora, multi_task = (one["metrics"] for one in comparison["series"])
    for key in ("avg_acc", "forgetting", "new_acc"):
        interval = lora[key]["interval"]
        assert interval["over"] == "test rows"
        assert interval["low"] <= lora[key]["mean"] <= interval["high"]
        assert interval["low"] < interval["high"]
        assert lora[key]["half_width"] is None
    assert multi_task["avg_acc"]["interval"]["over"] == "test rows"
    assert multi_task["forgetting"] is None
    found = lora["avg_acc"]
    shown = f"{found['mean']:.2f} [{found['interval']['low']:.1f}, {found['interval']['high']:.1f}]"
    text = comparison_markdown(runs)
    assert shown in text
    assert "95 % bootstrap interval over test rows (2,000 resamples" in text
    assert "over seeds." not in text
    assert shown.split(" ")[0] in printed(comparison_tables(runs)[0])


def test_the_interval_is_about_as_wide_as_theory_says(tmp_path: Path) -> None:
    """Stratified: the variance of Avg.ACC is the mean of the tasks' p (1 − p) / n, divided by their number."""
    answers: Answers = {}
    for task, right in (("a", 20), ("b", 100), ("c", 160)):
        for row in range(4):
            answers[row, task] = [1.0] * right + [0.0] * (200 - right)
    run = answered(tmp_path, "lora", answers=answers)
    deviation = 100 * math.sqrt(sum(p * (1 - p) / 200 for p in (0.1, 0.5, 0.8)) / 9)
    low, high = run.bootstrap.intervals["avg_acc"]
    assert high - low == pytest.approx(2 * 1.96 * deviation, rel=0.06)
    assert run.bootstrap.intervals["forgetting"] == (0.0, 0.0)  # nothing changed, whatever the rows


def test_several_seeds_have_the_t_interval_and_the_bootstrap(tmp_path: Path) -> None:
    runs = [answered(tmp_path, "lora", seed) for seed in (0, 1, 2)]
    (series,) = comparison_json(runs)["comparisons"][0]["series"]
    found = series["metrics"]["avg_acc"]
    assert found["interval"]["over"] == "seeds"
    assert found["interval"]["high"] - found["mean"] == pytest.approx(found["half_width"])
    rows = found["row_interval"]
    assert rows["over"] == "test rows"
    assert rows["low"] < found["mean"] < rows["high"]
    assert series["no_row_interval"] is None
    shown = f"{found['mean']:.2f} ± {found['half_width']:.2f} [{rows['low']:.1f}, {rows['high']:.1f}]"
    text = comparison_markdown(runs)
    assert shown in text
    assert "± half width of the 95 % t-interval over seeds; [low, high]: 95 % bootstrap interval over test rows" in text
    table = printed(comparison_tables(runs)[0])
    assert all(
        part in table for part in (f"{found['mean']:.2f}", f"± {found['half_width']:.2f}", shown[shown.index("[") :])
    )


def test_the_bootstrap_of_several_seeds_is_that_of_their_mean(tmp_path: Path) -> None:
    """A resample has the same rows in all seeds; forgetting's maximum is each seed's own, as in the number shown."""
    random = np.random.default_rng(5)
    per_seed = [
        {
            (row, task): [float(x) for x in random.integers(0, 2, n)]
            for row in range(4)
            for task, n in zip(T3, (7, 9, 4), strict=True)
        }
        for _ in range(3)
    ]
    runs = [answered(tmp_path, "lora", seed, answers=answers) for seed, answers in enumerate(per_seed)]
    (series,) = arrange(runs)[0].series

    drawn = {
        task: np.random.default_rng(stable_seed(0, "bootstrap", task)).multinomial(n, [1 / n] * n, size=2000)
        for task, n in zip(T3, (7, 9, 4), strict=True)
    }
    averages, forgotten = [], []
    for b in range(2000):
        matrices = []
        for answers in per_seed:
            matrix = [[0.0] * 3 for _ in range(4)]
            for (row, task), scores in answers.items():
                total = sum(int(times) * score for times, score in zip(drawn[task][b], scores, strict=True))
                matrix[row][T3.index(task)] = 100 * total / len(scores)
            matrices.append(matrix)
        averages.append(sum(sum(matrix[3]) / 3 for matrix in matrices) / 3)
        lost = [
            (max(matrix[1][0], matrix[2][0]) - matrix[3][0] + matrix[2][1] - matrix[3][1]) / 2 for matrix in matrices
        ]
        forgotten.append(sum(lost) / 3)
    for key, values in (("avg_acc", averages), ("forgetting", forgotten)):
        interval = series.row_interval(key)
        assert interval is not None
        assert [interval.low, interval.high] == pytest.approx(list(np.quantile(values, [0.025, 0.975])), abs=1e-9)


def test_a_seed_that_answered_other_rows_takes_the_bootstrap_of_all(tmp_path: Path) -> None:
    runs = [answered(tmp_path, "lora", 0), answered(tmp_path, "lora", 1, answers=final({task: [1.0] for task in T3}))]
    (series,) = comparison_json(runs)["comparisons"][0]["series"]
    assert series["metrics"]["avg_acc"]["row_interval"] is None
    assert series["metrics"]["avg_acc"]["interval"] is not None
    assert series["no_row_interval"] == "its seeds did not answer the same test rows"
    (runs[1].path / "predictions/2/a.jsonl").unlink()
    (series,) = comparison_json([runs[0], load_run(runs[1].path)])["comparisons"][0]["series"]
    assert series["no_row_interval"] == "seed 1: no predictions of a after 2 tasks were kept"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda run: (run / "predictions/2/a.jsonl").unlink(), "no predictions of a after 2 tasks were kept"),
        (lambda run: flip_first(run / "predictions/2/a.jsonl"), "of a after 2 tasks do not give the score in results"),
        (lambda run: rename_first(run / "predictions/2/a.jsonl"), "not all stages tested the same rows of a"),
    ],
)
def test_predictions_that_are_not_the_matrix_give_no_interval_and_say_why(
    tmp_path: Path, damage: Any, reason: str
) -> None:
    folder = make_answered_run(tmp_path / "run", "lora", T3)
    damage(folder)
    (series,) = comparison_json([load_run(folder)])["comparisons"][0]["series"]
    assert series["metrics"]["avg_acc"]["interval"] is None
    assert reason in series["no_row_interval"]


def edit_first(path: Path, **changes: Any) -> None:
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | changes), *others]))


def flip_first(path: Path) -> None:
    edit_first(path, score=1 - json.loads(path.read_text().splitlines()[0])["score"])


def rename_first(path: Path) -> None:
    edit_first(path, id="another row")


# -- tests over seeds


def test_over_seeds_is_the_paired_t_test_of_the_seeds_that_both_have(tmp_path: Path) -> None:
    scores = {"lora": {0: 40.0, 1: 42.0, 2: 39.0, 5: 90.0}, "lcia": {0: 45.0, 1: 44.0, 2: 46.0, 7: 0.0}}
    runs = [
        measured(tmp_path, method, seed, avg_acc=value) for method in scores for seed, value in scores[method].items()
    ]
    (scope,) = compare_runs(runs).scopes
    (contrast,) = scope.contrasts
    expected = stats.ttest_rel([45.0, 44.0, 46.0], [40.0, 42.0, 39.0])
    assert (contrast.label, contrast.reference, contrast.repeats.n) == ("lcia", "lora", 3)
    assert contrast.repeats.p == pytest.approx(float(expected.pvalue), abs=1e-12)
    assert contrast.difference is not None
    assert contrast.difference.mean == pytest.approx(14 / 3)
    assert contrast.difference.half_width == pytest.approx(14 / 3 - expected.confidence_interval().low)
    assert "3 seeds are few. Even uncorrected, p is below 0.05 only from 4.3 standard errors on" in comparison_markdown(
        runs
    )


@pytest.mark.parametrize(
    ("seeds", "reason"),
    [((3,), "no test over seeds, no seed in common"), ((0,), "no test over seeds, only one seed in common")],
)
def test_a_missing_test_says_why(tmp_path: Path, seeds: tuple[int, ...], reason: str) -> None:
    runs = [answered(tmp_path, "lora")] + [answered(tmp_path, "lcia", seed) for seed in seeds]
    assert f"assistant on smollm2-135m: {reason}: lcia." in comparison_markdown(runs)


def test_equal_differences_have_no_t(tmp_path: Path) -> None:
    runs = [
        measured(tmp_path, method, seed, avg_acc=50.0 + gain)
        for method, gain in (("lora", 0), ("lcia", 3))
        for seed in (0, 1)
    ]
    (scope,) = compare_runs(runs).scopes
    assert scope.contrasts[0].repeats.p is None
    assert "the difference is the same in all seeds" in comparison_markdown(runs)


# -- tests over test rows


def plain_sign_flips(differences: list[float]) -> float:
    observed = abs(math.fsum(differences))
    n, hits = len(differences), 0
    for pattern in range(2**n):
        signed = [-d if pattern >> i & 1 else d for i, d in enumerate(differences)]
        hits += abs(math.fsum(signed)) >= observed - 1e-9
    return hits / 2**n


def final(scores: dict[str, list[float]]) -> Answers:
    """The same scores in all rows."""
    return {(row, task): values for row in range(len(scores) + 1) for task, values in scores.items()}


def test_over_test_rows_is_the_sign_flip_test_of_their_shares(tmp_path: Path) -> None:
    """Tasks of 2 and 5 rows weigh the same, so a row of the first counts 2.5 times as much."""
    lora = {"a": [0.0, 1.0], "b": [0.0, 0.0, 1.0, 0.0, 1.0]}
    lcia = {"a": [1.0, 1.0], "b": [1.0, 1.0, 0.0, 0.5, 1.0]}
    runs = [
        answered(tmp_path, method, tasks=("a", "b"), answers=final(scores))
        for method, scores in (("lora", lora), ("lcia", lcia))
    ]
    shares = [
        (mine - its) / 2 / len(lora[task]) for task in lora for mine, its in zip(lcia[task], lora[task], strict=True)
    ]
    (contrast,) = compare_runs(runs).scopes[0].contrasts
    assert contrast.examples.n == 7
    assert contrast.examples.p == pytest.approx(plain_sign_flips(shares), abs=1e-12)
    assert contrast.difference is not None
    assert contrast.difference.mean == pytest.approx(100 * math.fsum(shares))


def test_a_row_of_several_seeds_is_one_row(tmp_path: Path) -> None:
    """Two seeds: the unit stays the test row, with the mean of its two differences."""
    random = np.random.default_rng(3)
    drawn = {
        (method, seed): [float(x) for x in random.integers(0, 2, 8)] for method in ("lora", "lcia") for seed in (0, 1)
    }
    runs = [
        answered(tmp_path, method, seed, tasks=("a",), answers=final({"a": scores}))
        for (method, seed), scores in drawn.items()
    ]
    means = [
        (drawn["lcia", 0][i] - drawn["lora", 0][i] + drawn["lcia", 1][i] - drawn["lora", 1][i]) / 16 for i in range(8)
    ]
    (contrast,) = compare_runs(runs).scopes[0].contrasts
    assert (contrast.examples.n, contrast.repeats.n) == (8, 2)
    assert contrast.examples.p == pytest.approx(plain_sign_flips(means), abs=1e-12)


def test_rows_that_only_one_method_answered_are_left_out_and_counted(tmp_path: Path) -> None:
    runs = [
        answered(tmp_path, method, tasks=("a",), answers=final({"a": scores}))
        for method, scores in (("lora", [0.0, 1.0, 1.0]), ("lcia", [1.0, 1.0, 1.0, 0.0, 0.0]))
    ]
    (contrast,) = compare_runs(runs).scopes[0].contrasts
    assert (contrast.examples.n, contrast.unshared_rows) == (3, 2)
    assert contrast.difference.mean == pytest.approx(60.0 - 200 / 3)
    assert contrast.examples_difference == pytest.approx(100 / 3)  # which way the test over rows points
    assert (
        "lcia and lora did not answer the same test rows; 2 that only one of them answered are left out"
        in comparison_markdown(runs)
    )


def test_predictions_that_are_missing_are_told(tmp_path: Path) -> None:
    runs = [answered(tmp_path, "lora"), load_run(make_run(tmp_path / "lcia", "lcia", T3))]
    text = comparison_markdown(runs)
    assert (
        "no test over test rows, the predictions of a after 3 tasks do not give the score in results.json: lcia."
        in text
    )


# -- the correction, and the reference


def test_holm_runs_over_all_comparisons_of_all_tables(tmp_path: Path) -> None:
    runs = [
        answered(tmp_path, method, seed, stream=stream)
        for stream in ("one", "two")
        for method in ("lora", "lcia", "llaca")
        for seed in (0, 1, 2)
    ]
    document = comparison_json(runs)
    contrasts = [one for comparison in document["comparisons"] for one in comparison["significance"]]
    assert len(contrasts) == 4
    for name in ("repeats", "examples"):
        raw = [one[name]["p"] for one in contrasts]
        assert [one[name]["corrected"] for one in contrasts] == holm(raw)
        assert {one[name]["family"] for one in contrasts} == {4}
    assert any(one["repeats"]["corrected"] > one["repeats"]["p"] for one in contrasts)


def test_against_names_the_reference_by_label_or_method(tmp_path: Path) -> None:
    runs = [
        measured(tmp_path, "lora", avg_acc=1.0),
        measured(tmp_path, "llaca", avg_acc=2.0),
        measured(tmp_path, "lcia", avg_acc=3.0, config={"method": {"name": "lcia", "threshold": 0.3}}),
        measured(tmp_path, "lcia", avg_acc=4.0, config={"method": {"name": "lcia", "threshold": 0.9}}),
    ]

    def compared(against: str | None) -> list[tuple[str, str]]:
        return [(one.label, one.reference) for one in compare_runs(runs, against).scopes[0].contrasts]

    assert {reference for _, reference in compared(None)} == {"lora"}
    assert [label for label, _ in compared("llaca")] == ["lora", "lcia (threshold=0.3)", "lcia (threshold=0.9)"]
    assert {reference for _, reference in compared("lcia (threshold=0.9)")} == {"lcia (threshold=0.9)"}
    with pytest.raises(UserError, match=r"--against: 'lcia' has several series; name one: 'lcia \(threshold=0\.3\)'"):
        compared("lcia")
    with pytest.raises(UserError, match=r"--against: no run of 'lora2' here\. Did you mean 'lora'\?"):
        compared("lora2")


# -- orders


def test_orders_are_shown_each_and_together(tmp_path: Path) -> None:
    orders = (("a", "b", "c"), ("c", "b", "a"), ("b", "c", "a"))
    scores = {"lora": ((40.0, 44.0), (50.0, 50.0), (30.0, 36.0)), "lcia": ((50.0, 50.0), (55.0, 57.0), (51.0, 49.0))}
    runs = [
        measured(tmp_path, method, seed, tasks=order, avg_acc=value)
        for method in scores
        for order, values in zip(orders, scores[method], strict=True)
        for seed, value in enumerate(values)
    ]
    arenas = arrange(runs)
    assert [arena.title for arena in arenas] == [f"assistant, order {i} on smollm2-135m" for i in (1, 2, 3)]
    (found,) = over_orders(arenas)
    assert found.labels == ("lora", "lcia")
    lora = found.metric("lora", "avg_acc")
    assert lora is not None
    assert lora.values == (42.0, 50.0, 33.0)  # an order's seeds are one value
    expected = stats.ttest_rel([50.0, 56.0, 50.0], [42.0, 50.0, 33.0])
    comparison = compare_runs(runs)
    (contrast,) = comparison.order_scopes[0].contrasts
    assert contrast.repeats.n == 3
    assert contrast.repeats.p == pytest.approx(float(expected.pvalue), abs=1e-12)
    assert contrast.repeats.family == 4  # three orders by themselves, and all together
    (document,) = comparison_json(runs)["over_orders"]
    assert document["orders"] == [list(order) for order in orders]
    assert document["series"][0]["metrics"]["avg_acc"]["over_orders"]["values"] == [42.0, 50.0, 33.0]
    assert [one["values"] for one in document["series"][1]["metrics"]["avg_acc"]["per_order"]] == [
        [50.0, 50.0], [55.0, 57.0], [51.0, 49.0],
    ]  # fmt: skip
    text = comparison_markdown(runs)
    half = float(stats.t.ppf(0.975, 2)) * float(np.std([42.0, 50.0, 33.0], ddof=1)) / math.sqrt(3)
    assert f"| 41.67 ± {half:.2f} |" in text
    assert "3 orders are few" in text


def test_an_order_that_a_method_did_not_run_is_counted(tmp_path: Path) -> None:
    runs = [measured(tmp_path, "lora", tasks=order, avg_acc=50.0) for order in (("a", "b"), ("b", "a"))]
    runs.append(measured(tmp_path, "lcia", tasks=("b", "a"), avg_acc=60.0))
    assert "| lcia | – | 60.00 | 60.00 (1 of 2 orders) |" in comparison_markdown(runs)


def test_a_label_is_the_same_in_every_order(tmp_path: Path) -> None:
    runs = [
        measured(
            tmp_path, "lcia", tasks=order, avg_acc=1.0, config={"method": {"name": "lcia", "threshold": threshold}}
        )
        for order, threshold in ((("a", "b"), 0.3), (("a", "b"), 0.9), (("b", "a"), 0.9))
    ]
    first, second = arrange(runs)
    assert [one.label for one in first.series] == ["lcia (threshold=0.3)", "lcia (threshold=0.9)"]
    assert [one.label for one in second.series] == ["lcia (threshold=0.9)"]


def test_other_tasks_are_no_other_order(tmp_path: Path) -> None:
    runs = [measured(tmp_path, "lora", tasks=tasks, avg_acc=1.0) for tasks in (("a", "b"), ("a", "b", "c"))]
    arenas = arrange(runs)
    assert [arena.title for arena in arenas] == [f"assistant, selection {i} on smollm2-135m" for i in (1, 2)]
    assert over_orders(arenas) == []


def test_test_rows_are_paired_over_orders_by_task_and_id(tmp_path: Path) -> None:
    """Each order weighs the same, whether it was run with two seeds or with one."""
    seeds = {("a", "b"): (0, 1), ("b", "a"): (0,)}
    random = np.random.default_rng(1)
    made = {
        (method, order, seed): final({task: [float(x) for x in random.uniform(0, 1, 4)] for task in order})
        for method in ("lora", "lcia")
        for order in seeds
        for seed in seeds[order]
    }
    runs = [
        answered(tmp_path, method, seed, tasks=order, answers=answers)
        for (method, order, seed), answers in made.items()
    ]
    shares = []
    for task in ("a", "b"):
        for i in range(4):
            of_order = {}
            for order in seeds:
                differences = [
                    made["lcia", order, seed][2, task][i] - made["lora", order, seed][2, task][i]
                    for seed in seeds[order]
                ]
                of_order[order] = sum(differences) / len(differences)
            shares.append(sum(of_order.values()) / 2 / 2 / 4)  # orders, tasks, rows
    (scope,) = compare_runs(runs).order_scopes
    assert scope.contrasts[0].examples.n == 8
    assert scope.contrasts[0].examples.p == pytest.approx(plain_sign_flips(shares), abs=1e-12)
    assert scope.contrasts[0].difference is not None
    assert scope.contrasts[0].difference.mean == pytest.approx(100 * math.fsum(shares))


# -- cost


def with_cost(folder: Path, method: str, avg_acc: float, **cost: float) -> Run:
    return measured(folder, method, avg_acc=avg_acc, cost=cost)


def test_costs_of_a_method_are_shown_where_any_run_names_them(tmp_path: Path) -> None:
    runs = [
        with_cost(tmp_path, "lora", 40.0, train_s=10.0),
        with_cost(tmp_path, "replay", 50.0, train_s=20.0, examples_stored=120, extra_forward_rows=2400),
    ]
    text = printed(comparison_tables(runs)[-1])
    assert "Examples stored" in text
    assert "Extra rows forward" in text
    assert "Numbers stored" not in text
    assert "2.4 k" in text
    assert "Examples stored" not in "".join(printed(table) for table in comparison_tables(runs[:1]))
    series = comparison_json(runs)["comparisons"][0]["series"]
    assert [one["cost"]["examples_stored"] for one in series] == [
        None, {"mean": 120.0, "half_width": None, "n": 1, "values": [120.0]},
    ]  # fmt: skip


def test_front_of_avg_acc_and_cost(tmp_path: Path) -> None:
    runs = [
        with_cost(tmp_path, "lora", 40.0, train_s=10.0),
        with_cost(tmp_path, "slow", 40.0, train_s=11.0),
        with_cost(tmp_path, "replay", 50.0, train_s=20.0, examples_stored=120),
        with_cost(tmp_path, "multi_task", 90.0, train_s=1.0),  # is in no contest
        with_cost(tmp_path, "silent", 80.0),  # recorded no time
    ]
    series = arrange(runs)[0].series
    assert pareto_front(series, "train_s") == ["lora", "replay"]
    assert pareto_front(series, "examples_stored") == ["silent"]  # a method that names no examples stores none
    assert pareto_front(series, "stored_parameters") == []
    assert comparison_json(runs)["comparisons"][0]["not_dominated"]["train_s"] == ["lora", "replay"]


def test_parameters_trained_and_stored_are_two_costs(tmp_path: Path) -> None:
    """One adapter a task against one for all: the same training, more to store."""
    runs = [
        with_cost(tmp_path, "lora", 40.0, train_s=10.0, trained_parameters=1000, stored_parameters=1000),
        with_cost(tmp_path, "o_lora", 50.0, train_s=10.0, trained_parameters=1000, stored_parameters=3000),
        with_cost(tmp_path, "older", 60.0, train_s=10.0, trained_parameters=2000),  # one number: all adapters'
    ]
    series = arrange(runs)[0].series
    assert pareto_front(series, "trained_parameters") == ["o_lora"]
    assert pareto_front(series, "stored_parameters") == ["lora", "older"]
    costs = [one["cost"] for one in comparison_json(runs)["comparisons"][0]["series"]]
    means = [[one[key] and one[key]["mean"] for key in ("trained_parameters", "stored_parameters")] for one in costs]
    assert means == [[1000.0, 1000.0], [1000.0, 3000.0], [None, 2000.0]]
    grid = cost_grid(arrange(runs)[0])
    columns = [grid.columns.index(name) for name in ("Trained parameters", "Stored parameters")]
    assert [[row[i] for i in columns] for row in grid.rows] == [
        ["1 k", "1 k"], ["1 k", "3 k"], ["not recorded", "2 k"],
    ]  # fmt: skip
