"""bench/README.md tells what results/bench.json holds, and names tests that there are."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / "bench" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return dict(json.loads((ROOT / "results" / "bench.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("part", ["ablation_training", "ablation_answering", "ablation_answering_float32"])
def test_every_kept_optimisation_has_a_line_with_its_ratios(part: str, text: str, found: dict[str, Any]) -> None:
    for way, alone in found[part]["alone"].items():
        ratios = re.escape(f"| {alone:.2f}x | {found[part]['together'][way]:.2f}x |")
        assert re.search(rf"^\| `{way}`: [^|]*{ratios}", text, re.MULTILINE), way


def test_the_tests_it_names_are_there(text: str) -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    assert len(named) > 5
    for file, name in named:
        assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{file}::{name}"


def test_losses_and_predictions_were_the_peers(found: dict[str, Any]) -> None:
    assert all(one["difference"] <= 1e-4 for one in found["training"].values())
    assert all(one["differing"] == 0 for name, one in found["proof"].items() if name != "lcia")
    assert all(one["changed"] == 0 for one in found["growth"])


def test_the_readme_has_its_ratios(found: dict[str, Any]) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    training = found["training"]
    for ratio in (training["trainer"]["ratio"], training["trainer-eager"]["ratio"], found["matrix"]["plain"]["ratio"]):
        assert f"{ratio:.1f} times" in readme


def test_lists_answered_are_counted_from_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """T of the base model, those of a group's tasks so far whenever it has learned, and T - 1 a step ahead."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    growth = importlib.import_module("growth")
    assert [one["answered"] for one in growth.measure(sizes=(2, 4))] == [5, 11]
