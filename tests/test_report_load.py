"""Reading run folders: what is missing or broken is named, what is optional may be absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lcia.errors import UserError
from lcia.report import load_run
from report_runs import ASSISTANT, make_run


def rewrite(folder: Path, **changes: Any) -> None:
    """Set keys of results.json, whatever they are."""
    path = folder / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_everything_of_a_run_folder_is_read(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "run", "lcia", seed=3))
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert (run.method, run.seed, run.tasks) == ("lcia", 3, ASSISTANT)
    assert [list(row) for row in run.matrix] == results["matrix"]
    assert run.metrics == results["metrics"]
    assert run.cost.train_s == results["cost"]["train_s"]
    assert run.group_scores["banking_intent"] == results["group_scores"]["banking_intent"]
    assert run.config["method"] == "lcia"
    assert {step.task for step in run.steps} == set(ASSISTANT)
    assert run.averages
    answer = run.predictions("banking_intent")["banking_intent-0"]
    assert answer.reference == ("book a flight", "flight")


def test_a_folder_without_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"elsewhere.*results\.json is missing"):
        load_run(tmp_path / "elsewhere")


@pytest.mark.parametrize("key", ["method", "model", "seed", "tasks", "matrix", "metrics"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    folder = make_run(tmp_path / "run", **{key: None} if key not in ("method", "tasks", "seed") else {})
    results = json.loads((folder / "results.json").read_text())
    results.pop(key, None)
    (folder / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match=rf"results\.json: key '{key}' is missing"):
        load_run(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matrix": [[1.0, 2.0]]}, r"key 'matrix': 6 tasks need 7 rows of 6, found rows of \[2\]"),
        ({"matrix": "none"}, "key 'matrix'"),
        ({"metrics": {"avg_acc": "high"}}, r"key 'metrics\.avg_acc'"),
        ({"seed": "first"}, "key 'seed'"),
        ({"tasks": ["a"] * 6}, "key 'tasks': two tasks have the same name"),
        ({"cost": {"train_s": "long"}}, r"key 'cost\.train_s'"),
    ],
)
def test_a_malformed_key_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = make_run(tmp_path / "run")
    rewrite(folder, **changes)
    with pytest.raises(UserError, match=rf"results\.json: {message}"):
        load_run(folder)


@pytest.mark.parametrize(("text", "message"), [("{broken", "not valid JSON: line 1"), ("[1]", "found list")])
def test_results_that_are_no_json_object(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_run(tmp_path)


def test_nan_and_null_are_both_not_measured(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", tasks=["a", "b"])
    rewrite(folder, matrix=[[float("nan"), None], [50.0, 1.0], [40.0, 60.0]])
    assert load_run(folder).matrix == ((None, None), (50.0, 1.0), (40.0, 60.0))


def test_null_in_an_optional_place_is_absence(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rewrite(folder, ema={"fallback_fraction": None, "retained_mass": None}, routing=None, groups={"a": None})
    run = load_run(folder)
    assert run.ema.retained_mass == {}
    assert run.routing.accuracy is None
    assert run.groups == {"a": None}


def test_the_fixed_keys_alone_are_enough(tmp_path: Path) -> None:
    results = {"method": "lora", "model": "m", "seed": 0, "tasks": ["a"], "matrix": [[1], [2]], "metrics": {}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    run = load_run(tmp_path)
    assert run.config_text is None
    assert run.steps == ()
    assert run.predictions("a") == {}


def test_a_killed_and_resumed_log_counts_the_later_entry(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "lora", tasks=["b", "a"], n_steps=2)
    lines = [
        {"task": "a", "step": 1, "loss": 4.0},
        {"task": "b", "step": 1, "loss": 9.0},
        {"task": "b", "step": 2, "loss": float("inf")},
    ]
    text = (
        "".join(json.dumps(line) + "\n" for line in lines) + '{"task": "b", "st\n{"task": "b", "step": 1, "loss": 3}\n'
    )
    (folder / "training_log.jsonl").write_text(text)
    run = load_run(folder)
    assert run.unreadable_steps == 1
    assert [(step.task, step.step, step.loss) for step in run.steps] == [("b", 1, 3.0), ("b", 2, None), ("a", 1, 4.0)]


def test_a_broken_prediction_is_named_with_its_line(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", tasks=["a"])
    path = folder / "predictions/1/a.jsonl"
    path.write_text(path.read_text() + '{"id": "x"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:7: key 'prompt' is missing"):
        load_run(folder).predictions("a")


def test_the_threshold_is_found_in_the_codebook(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "lcia", threshold=None)
    assert load_run(folder).threshold is None
    (folder / "codebook.json").write_text('{"threshold": 0.3, "reduce": "mean", "groups": {}}')
    assert load_run(folder).threshold == 0.3
