"""Comparing runs: which belong together, means and intervals, tables, and the sentences."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table
from rich.text import Text
from scipy import stats

from lcia.errors import UserError
from lcia.report import (
    Run,
    comparison_json,
    comparison_markdown,
    comparison_table,
    comparison_tables,
    load_run,
    load_runs,
    matrix_table,
    write_report,
)
from lcia.report.compare import arrange, differing_settings, estimate, over_orders, paired_difference
from lcia.report.summary import summary
from report_runs import make_matrix, make_run

T3 = ("a", "b", "c")


def made(folder: Path, method: str, seed: int = 0, **options: Any) -> Run:
    """A loaded run in a folder of its own."""
    name = f"{len(list(folder.iterdir()))}-{method}-{seed}"
    return load_run(make_run(folder / name, method, seed=seed, **({"tasks": T3} | options)))


def scored(folder: Path, method: str, seed: int = 0, **metrics: float | None) -> Run:
    """A run with these metrics."""
    empty = dict.fromkeys(("avg_acc", "forgetting", "new_acc", "bwt", "fwt"))
    return made(folder, method, seed, metrics=empty | metrics)


def printed(table: Table | Text, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


# -- intervals


@given(st.lists(st.floats(0, 100), min_size=2, max_size=20))
def test_interval_is_scipys_t_interval(values: list[float]) -> None:
    found = estimate(values)
    assert found is not None
    spread = stats.sem(values)
    low, high = (
        stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=spread) if spread else (found.mean,) * 2
    )
    assert found.half_width is not None
    assert found.mean - found.half_width == pytest.approx(low, abs=1e-9)
    assert found.mean + found.half_width == pytest.approx(high, abs=1e-9)


def test_interval_by_hand() -> None:
    # mean 62, s = 2, t(0.975, 2) = 4.302653: 4.302653 * 2 / sqrt(3)
    found = estimate([60.0, 62.0, 64.0])
    assert found is not None
    assert (found.mean, found.half_width) == (62.0, pytest.approx(4.968276, abs=1e-6))


def test_one_value_has_no_interval_and_none_has_no_mean() -> None:
    single = estimate([None, 5.0])
    assert single is not None
    assert (single.mean, single.half_width, single.n) == (5.0, None, 1)
    assert estimate([None]) is None


def test_paired_difference_uses_the_shared_seeds_only(tmp_path: Path) -> None:
    runs = [scored(tmp_path, "lora", seed, avg_acc=40.0 + seed) for seed in (0, 1, 2)]
    runs += [scored(tmp_path, "lcia", seed, avg_acc=50.0 + 2 * seed) for seed in (1, 2, 7)]
    lora, lcia = arrange(runs)[0].series
    found = paired_difference(lcia, lora, "avg_acc")
    assert found is not None
    assert found.values == (11.0, 12.0)


# -- what belongs together


def labels(runs: Sequence[Run]) -> list[list[tuple[str, tuple[int, ...]]]]:
    return [[(series.label, series.seeds) for series in arena.series] for arena in arrange(runs)]


def test_seeds_of_one_method_are_one_series(tmp_path: Path) -> None:
    runs = [made(tmp_path, method, seed) for seed in (2, 0, 1) for method in ("lora", "lcia")]
    assert labels(runs) == [[("lora", (0, 1, 2)), ("lcia", (0, 1, 2))]]


def test_different_settings_are_not_averaged(tmp_path: Path) -> None:
    runs = [
        made(tmp_path, "lcia", seed, config={"method": {"name": "lcia", "threshold": threshold}})
        for threshold in (0.3, 0.9)
        for seed in (0, 1)
    ]
    assert labels(runs) == [[("lcia (threshold=0.3)", (0, 1)), ("lcia (threshold=0.9)", (0, 1))]]


def test_the_same_seed_twice_is_no_second_sample(tmp_path: Path) -> None:
    runs = [made(tmp_path, "lora"), made(tmp_path, "lora")]
    assert labels(runs) == [[("lora (0-lora-0)", (0,)), ("lora (1-lora-0)", (0,))]]


def test_stream_model_order_and_split_are_kept_apart(tmp_path: Path) -> None:
    runs = [
        made(tmp_path, "lora"),
        made(tmp_path, "lcia", stream="other"),
        made(tmp_path, "lcia", model="big"),
        made(tmp_path, "lcia", tasks=("c", "b", "a")),
        made(tmp_path, "lcia", eval_split="dev"),
    ]
    assert [arena.title for arena in arrange(runs)] == [
        "assistant, order 1 on smollm2-135m",
        "other on smollm2-135m",
        "assistant on big",
        "assistant, order 2 on smollm2-135m",
        "assistant, order 1 on smollm2-135m, dev rows",
    ]


def test_streams_with_other_options_are_not_averaged(tmp_path: Path) -> None:
    """A default that is stated is no other option, nor is where the data lie."""
    streams: list[Any] = [
        "coin",
        {"name": "coin", "path": "/here", "scoring": "strict"},
        {"name": "coin", "path": "/here", "scoring": "released"},
        {"name": "coin", "path": "/there", "scoring": "released"},
    ]
    runs = [made(tmp_path, "lora", seed, stream="coin", config={"stream": one}) for seed, one in enumerate(streams)]
    assert labels(runs) == [[("lora", (0, 1))], [("lora", (2, 3))]]
    assert [arena.title for arena in arrange(runs)] == [
        "coin, scoring=strict on smollm2-135m",
        "coin, scoring=released on smollm2-135m",
    ]
    assert [arena.title for arena in arrange(runs[:2])] == ["coin on smollm2-135m"]
    assert over_orders(arrange(runs)) == []


def test_orders_of_one_stream_with_other_options_are_no_orders_of_one(tmp_path: Path) -> None:
    runs = [
        made(tmp_path, "lora", tasks=tasks, stream="coin", config={"stream": {"name": "coin", **options}})
        for tasks, options in (
            (T3, {"order": "origin"}),
            (T3[::-1], {"order": "reverse"}),
            (T3[::-1], {"order": "reverse", "instructions": "diverse"}),
        )
    ]
    assert [arena.title for arena in arrange(runs)] == [
        "coin, instructions=origin, order 1 on smollm2-135m",
        "coin, instructions=origin, order 2 on smollm2-135m",
        "coin, instructions=diverse, order 2 on smollm2-135m",
    ]
    assert [one.title for one in over_orders(arrange(runs))] == [
        "coin, instructions=origin on smollm2-135m, over 2 orders"
    ]


def test_lists_with_other_prompts_are_not_averaged(tmp_path: Path) -> None:
    def listed(**options: Any) -> list[dict[str, Any]]:
        return [{"name": task, "path": f"{task}.jsonl", **(options if task == "b" else {})} for task in T3]

    streams = [listed(), listed(path="elsewhere/b.jsonl"), listed(examples=2), listed(instruction="Name it")]
    runs = [made(tmp_path, "lora", seed, stream="list", config={"stream": one}) for seed, one in enumerate(streams)]
    assert labels(runs) == [[("lora", (0, 1))], [("lora", (2,))], [("lora", (3,))]]
    assert [arena.title for arena in arrange(runs)] == [
        "list, examples of b=unset, instruction of b=unset on smollm2-135m",
        "list, examples of b=2 on smollm2-135m",
        "list, instruction of b=Name it on smollm2-135m",
    ]


def test_other_scorers_are_not_averaged(tmp_path: Path) -> None:
    """They are named where the stream's options do not say it already."""
    exact, rouge = dict.fromkeys(T3, "exact"), {**dict.fromkeys(T3, "exact"), "b": "rouge_l"}
    runs = [made(tmp_path, "lora", seed, scorers=one) for seed, one in enumerate((exact, exact, rouge))]
    assert labels(runs) == [[("lora", (0, 1))], [("lora", (2,))]]
    assert [arena.title for arena in arrange(runs)] == [
        "assistant, scorer of b=exact on smollm2-135m",
        "assistant, scorer of b=rouge_l on smollm2-135m",
    ]
    coin = [
        made(tmp_path, "lora", stream="coin", scorers=one, config={"stream": {"name": "coin", "scoring": scoring}})
        for one, scoring in ((exact, "strict"), (rouge, "released"))
    ]
    assert [arena.title for arena in arrange(coin)] == [
        "coin, scoring=strict on smollm2-135m",
        "coin, scoring=released on smollm2-135m",
    ]


def test_settings_that_differ_between_methods_are_listed(tmp_path: Path) -> None:
    runs = [made(tmp_path, "lora"), made(tmp_path, "lcia", config={"learning_rate": 1e-3, "warmup": 2})]
    found = differing_settings(arrange(runs)[0].series)
    assert found == {"learning_rate": ["0.0005", "0.001"], "warmup": ["unset", "2"]}


def test_a_key_that_is_null_is_no_other_setting_than_none(tmp_path: Path) -> None:
    """A run from before a key was there goes on in the series of its seeds; a null inside `method` is a choice."""
    runs = [made(tmp_path, "lcia", 0), made(tmp_path, "lcia", 1, config={"init_stream": None})]
    assert labels(runs) == [[("lcia", (0, 1))]]
    runs.append(made(tmp_path, "lcia", 2, config={"init_stream": "data"}))
    runs.append(made(tmp_path, "lcia", 3, config={"method": {"name": "lcia", "retained": None}}))
    assert [seeds for _, seeds in labels(runs)[0]] == [(0, 1), (2,), (3,)]


# -- what is no finished run


@pytest.fixture
def folder_of_runs(tmp_path: Path) -> Path:
    """Two finished runs, a run that was interrupted, a folder of something else, an empty one, and a file."""
    for seed in (0, 1):
        make_run(tmp_path / f"a{seed}", "lora", T3, seed)
    (make_run(tmp_path / "begun", "lora", T3, 2) / "results.json").unlink()
    make_run(tmp_path / "studies" / "inside", "lora", T3, 3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes [1].txt").write_text("results.json")
    return tmp_path


def test_finished_runs_are_compared_and_the_rest_is_named(folder_of_runs: Path) -> None:
    runs, left_out = load_runs(sorted(folder_of_runs.glob("*")))
    assert [run.path.name for run in runs] == ["a0", "a1"]
    reasons = {one.path.name: one.why for one in left_out}
    assert list(reasons) == ["begun", "empty", "notes [1].txt", "studies"]
    assert reasons["begun"] == f"a run that is not finished (`lcia resume {folder_of_runs / 'begun'}` goes on with it)"
    assert reasons["notes [1].txt"] == "a file"
    assert (
        reasons["empty"]
        == reasons["studies"]
        == "a folder of something else: neither results.json nor config.yaml in it"
    )

    document = comparison_json(runs, left_out=left_out)
    assert document["runs_compared"] == 2
    assert document["runs_left_out"] == [{"path": str(one.path), "why": one.why} for one in left_out]
    assert {**document, "runs_left_out": []} == comparison_json(runs)  # it changes no number

    text = " ".join(" ".join(printed(part) for part in comparison_tables(runs, left_out=left_out)).split())
    page = html.unescape(write_report(runs, folder_of_runs / "page.html", left_out=left_out).read_text())
    for shown in (text, page):
        assert "Left out, because it is no finished run: 4 of 6 paths." in shown
        for one in left_out:
            assert str(one) in shown


def test_nothing_is_said_where_nothing_is_left_out(folder_of_runs: Path) -> None:
    runs, left_out = load_runs([folder_of_runs / "a0"])
    assert left_out == []
    assert "Left out" not in " ".join(printed(part) for part in comparison_tables(runs, left_out=left_out))
    assert "Left out" not in write_report(runs, folder_of_runs / "page.html", left_out=left_out).read_text()


@pytest.mark.parametrize("names", [["begun"], ["empty", "notes [1].txt"]])
def test_without_a_finished_run_each_path_is_named(folder_of_runs: Path, names: list[str]) -> None:
    with pytest.raises(UserError, match="no finished run here") as caught:
        load_runs([folder_of_runs / name for name in names])
    assert all(str(folder_of_runs / name) in str(caught.value) for name in names)


def test_a_path_that_does_not_exist_is_a_mistake_not_left_out(folder_of_runs: Path) -> None:
    with pytest.raises(UserError, match="a9: no such file or folder"):
        load_runs([folder_of_runs / "a0", folder_of_runs / "a9"])


def test_a_damaged_run_stops_the_comparison(folder_of_runs: Path) -> None:
    (folder_of_runs / "a1" / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"a1/results\.json: not valid JSON"):
        load_runs([folder_of_runs / "a0", folder_of_runs / "a1"])


# -- tables


def test_json_holds_the_numbers_and_nothing_that_json_forbids(tmp_path: Path) -> None:
    runs = [made(tmp_path, "lora", seed) for seed in (0, 1)] + [made(tmp_path, "zero_shot")]
    document = json.loads(json.dumps(comparison_json(runs), allow_nan=False))
    (comparison,) = document["comparisons"]
    lora, zero_shot = comparison["series"]
    values = [run.metrics["avg_acc"] for run in runs[:2]]
    assert lora["metrics"]["avg_acc"]["values"] == values
    assert lora["metrics"]["avg_acc"]["mean"] == pytest.approx(np.mean(values))
    assert lora["seeds"] == [0, 1]
    assert zero_shot["metrics"]["forgetting"] is None
    matrices = [make_matrix("lora", 3, seed) for seed in (0, 1)]
    assert lora["matrix"][3][0] == pytest.approx((matrices[0][3][0] + matrices[1][3][0]) / 2)  # type: ignore[operator]
    assert lora["matrix"][1][2] is None


def test_markdown_holds_mean_and_interval(tmp_path: Path) -> None:
    runs = [scored(tmp_path, "lora", seed, avg_acc=60.0 + 2 * seed, forgetting=1.0) for seed in (0, 1, 2)]
    text = comparison_markdown(runs)
    assert "| lora | 0, 1, 2 | 62.00 ± 4.97 | 1.00 ± 0.00 | – | – | – |" in text


def test_markdown_marks_the_best_and_counts_missing_seeds(tmp_path: Path) -> None:
    runs = [
        scored(tmp_path, "lora", 0, avg_acc=40.0, forgetting=30.0),
        scored(tmp_path, "lora", 1, avg_acc=None, forgetting=30.0),
        scored(tmp_path, "lcia", 0, avg_acc=60.0, forgetting=2.0),
        scored(tmp_path, "multi_task", 0, avg_acc=70.0),
    ]
    lines = comparison_markdown(runs).splitlines()
    assert "40.00 (1 of 2 seeds)" in lines[4]
    assert lines[5].startswith("| lcia | 0 | **60.00** | **2.00** |")
    assert "70.00" in lines[6]
    assert "**70.00**" not in lines[6]  # a reference is not in the contest


def test_markdown_names_cannot_break_the_table(tmp_path: Path) -> None:
    text = comparison_markdown([made(tmp_path, "a|b\n<i>")])
    assert r"| a\|b &lt;i&gt; |" in text


def test_console_tables_hold_the_numbers_and_print_names_as_they_are(tmp_path: Path) -> None:
    run = made(tmp_path, "lcia", tasks=("[red]x", "y", "z"))
    text = printed(comparison_table([run, made(tmp_path, "lora", tasks=run.tasks)]))
    assert f"{run.metrics['avg_acc']:.2f}" in text
    text = printed(matrix_table(run))
    assert "after 1 [red]x" in text
    for row in run.matrix:
        for value in row:
            assert value is None or f"{value:.1f}" in text
    assert text.count("–") == sum(value is None for row in run.matrix for value in row)


def test_console_matrix_of_19_tasks_fits_120_columns(tmp_path: Path) -> None:
    run = made(tmp_path, "lora", tasks=[f"quite_a_long_name_of_a_task_{i}" for i in range(19)])
    lines = printed(matrix_table(run), width=120).splitlines()
    for j, row in enumerate(run.matrix):
        (line,) = (line for line in lines if line.strip().startswith("before" if j == 0 else f"after {j} "))
        assert [cell for cell in line.split()[-19:]] == ["–" if v is None else f"{v:.1f}" for v in row]


# -- sentences


def said(runs: Sequence[Run]) -> str:
    return " ".join(summary(arrange(runs)[0]))


def test_summary_names_the_highest_and_the_most_forgetful(tmp_path: Path) -> None:
    runs = [
        scored(tmp_path, "lora", avg_acc=40.0, forgetting=30.0, new_acc=70.0),
        scored(tmp_path, "lcia", avg_acc=60.0, forgetting=2.0, new_acc=66.0),
    ]
    text = said(runs)
    assert "lcia has the highest average accuracy after 3 tasks, 60.0 %, and forgets 2.0 points a task" in text
    assert "lora forgets most, 30.0 points a task, and has 40.0 %" in text
    assert "Higher Avg.ACC than lora, in points: lcia (+20.0)." in text
    assert "lcia learns new tasks worse than lora: New.ACC −4.0 points." in text
    assert "One seed each" in text


def test_summary_says_that_a_method_does_not_help(tmp_path: Path) -> None:
    runs = [
        scored(tmp_path, "lora", avg_acc=40.0, forgetting=30.0),
        scored(tmp_path, "lcia", avg_acc=38.0, forgetting=-1.0),
    ]
    text = said(runs)
    assert "lora has the highest average accuracy" in text
    assert "No help here, Avg.ACC not above lora: lcia (−2.0)." in text
    assert "Higher" not in text


def test_summary_says_that_an_interval_includes_zero(tmp_path: Path) -> None:
    gains = (-1.0, 2.0, 5.0)  # mean 2, half width 7.5
    runs = [scored(tmp_path, "lora", seed, avg_acc=40.0) for seed in range(3)]
    runs += [scored(tmp_path, "lcia", seed, avg_acc=40.0 + gain) for seed, gain in enumerate(gains)]
    assert "Higher than lora, but the difference's interval includes 0: lcia (+2.0 ± 7.5)." in said(runs)


def test_summary_keeps_references_out_of_the_contest(tmp_path: Path) -> None:
    runs = [
        scored(tmp_path, "lora", avg_acc=5.0, forgetting=30.0),
        scored(tmp_path, "multi_task", avg_acc=70.0),
    ]
    text = said(runs)
    assert text.startswith("lora has an average accuracy (Avg.ACC) of 5.0 % after 3 tasks, and forgets 30.0 points")
    assert "For reference, measured only after the whole stream: multi_task 70.0 %." in text
    assert "Worse than without any training: lora." in text  # the made-up base model has about 15 %


def test_summary_of_a_tie_and_of_nothing(tmp_path: Path) -> None:
    runs = [scored(tmp_path, method, avg_acc=50.0, forgetting=0.0) for method in ("lora", "lcia")]
    assert "lora and lcia share the highest average accuracy" in said(runs)
    assert said([scored(tmp_path, "lora")]) == "No run here has been measured on all its tasks yet."
