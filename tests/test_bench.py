"""Benchmarks by name: which settings a run gets, where it goes, and what the command says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lcia.bench import BENCHMARKS, bench_config
from lcia.errors import UserError
from lcia.stream.sources import DATA

ORDERS: dict[str, list[str]] = json.loads((DATA / "instrdialog/orders.json").read_text())
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def task_files(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ORDERS["1"]:
        content = {
            "Definition": [f"Do {name}"],
            "Positive Examples": [{"input": "a", "output": "b"}] * 2,
            "Instances": [{"id": f"i-{n}", "input": f"s{n}", "output": ["good"]} for n in range(110)],
        }
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_run_has_the_protocols_settings() -> None:
    config = bench_config("instrdialog", "lcia", order=2, seed=3)
    assert config.stream == {"name": "instrdialog", "order": 2}
    assert config.output_dir == "runs/bench/instrdialog/lcia-order2-seed3"
    assert (config.seed, config.method, config.model) == (3, "lcia", "google/t5-small-lm-adapt")
    assert (config.max_length, config.max_new_tokens, config.per_device_train_batch_size) == (1024, 128, 8)
    assert (config.num_train_epochs, config.lr_scheduler_type, config.max_train_examples) == (15, "constant", None)


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ({"method": "{name: lcia, threshold: 0.3}"}, "lcia-order1-seed0"),
        ({"method": "[lcia, ewc]", "order": 3}, "lcia+ewc-order3-seed0"),
        ({"method": "lora", "overrides": ["seed=5"]}, "lora-order1-seed5"),
        ({"method": "lora", "overrides": ["method=ewc"]}, "ewc-order1-seed0"),
    ],
)
def test_a_run_is_named_by_what_it_is(arguments: dict[str, Any], folder: str) -> None:
    assert bench_config("instrdialog", **arguments).output_dir == f"runs/bench/instrdialog/{folder}"


def test_what_the_user_sets_comes_first() -> None:
    overrides = ["learning-rate=2e-4", "output_dir=elsewhere", "max_train_examples=7"]
    config = bench_config("instrdialog", "lora", model="smollm2-135m", data="here", overrides=overrides)
    assert (config.learning_rate, config.output_dir, config.max_train_examples) == (2e-4, "elsewhere", 7)
    assert config.model == "smollm2-135m"
    assert config.stream == {"name": "instrdialog", "order": 1, "path": "here"}
    assert bench_config("instrdialog", "lora").learning_rate == BENCHMARKS["instrdialog"].settings["learning_rate"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("instrdialogue", "lcia"), "Did you mean 'instrdialog'?"),
        (("instrdialog", "lcai"), "unknown method 'lcai'"),
        (("instrdialog", "{name: lcia"), "neither a name nor valid YAML"),
        (("instrdialog", "lcia", 4), "orders 1, 2, 3, not 4"),
        (("instrdialog", "lcia", 1, 0, None, None, ["lerning_rate=1"]), "Did you mean 'learning_rate'?"),
        (("instrdialog", "lcia", 1, 0, None, None, ["learning_rate"]), "not key=value"),
    ],
)
def test_mistakes_are_named(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        bench_config(*arguments)


def test_list(lcia: Run) -> None:
    code, out, _ = lcia("bench", "list", "--json")
    assert code == 0
    assert json.loads(out)["instrdialog"]["orders"] == [1, 2, 3]
    assert "instrdialog" in lcia("bench", "list")[1]


def test_run(lcia: Run, task_files: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chosen = ORDERS["3"][:2]
    small = [f"tasks=[{', '.join(chosen)}]", "max_steps=1", "max_eval_examples=1", "max_new_tokens=2", "dtype=float32"]
    command = ["bench", "run", "instrdialog", "--method", "lora", "--order", 3, "--data", task_files]
    code, out, err = lcia(*command, "--model", tiny_model, *small, "max_length=400")
    assert code == 0, err
    results = json.loads((tmp_path / "runs/bench/instrdialog/lora-order3-seed0/results.json").read_text())
    assert results["tasks"] == chosen
    assert set(results["scorers"].values()) == {"rouge_l"}
    metrics = results["metrics"]
    assert f"AR {metrics['avg_acc']:.1f}   FWT {metrics['fwt']:.1f}   BWT {metrics['bwt']:.1f}" in out


def test_a_wrong_order_ends_with_2(lcia: Run) -> None:
    code, out, err = lcia("bench", "run", "instrdialog", "--order", 9)
    assert (code, out) == (2, "")
    assert "orders 1, 2, 3" in err
