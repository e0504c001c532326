"""SIGKILL at any moment, then `resume`: the run ends as if nothing had happened.

`make study-kill` runs 30 kills instead of a few (LCIA_KILLS).
"""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import pytest

from killing import run_until
from lcia.run_folder import RunFolder
from test_run import hashes, without_cost
from tiny_vision import square_stream, tiny_llava

KILLS = int(os.environ.get("LCIA_KILLS", "6")) // 3  # of each scenario


def content(folder: Path) -> dict[str, Any]:
    """All that a run leaves, but for times and costs."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {
        "results": without_cost(json.loads((folder / "results.json").read_text())),
        "hashes": hashes(folder),
        "files": sorted(files),
        "bytes": {name: path.read_bytes() for name, path in files.items() if name.startswith(("pool", "predictions"))},
        "events": [
            record["event"] for record in RunFolder(folder).records("stage_learned", "row_measured", "extended")
        ],
    }


PLAIN = {"max_steps": 3, "per_device_train_batch_size": 4}
# every task goes back from its second epoch to its first: nothing is ever right
EARLY = {"num_train_epochs": 3, "per_device_train_batch_size": 8, "early_stopping_patience": 1}

# projectors, averaged in the third task
SEEING = {**PLAIN, "projector_learning_rate": 5e-3}


@pytest.fixture(scope="module", params=[PLAIN, EARLY, SEEING], ids=["plain", "early stopping", "with images"])
def scenario(
    request: pytest.FixtureRequest, tiny_model: Path, tiny_stream: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """A stream of two tasks, a third that extends it, checkpoints inside tasks; and how it ends undisturbed."""
    folder = tmp_path_factory.mktemp("kill")
    model, stream, tasks = tiny_model, tiny_stream, ["colours", "animals"]
    if request.param is SEEING:
        (folder / "squares").mkdir()
        model, stream, tasks = tiny_llava(folder), square_stream(folder / "squares"), ["colours", "tints"]
    values = {
        "stream": str(stream),
        "tasks": tasks,
        "model": str(model),
        "method": {"name": "lcia", "rule": "fisher"},
        "dtype": "float32",
        **request.param,
        "save_steps": 1,
        "learning_rate": 1e-2,
        "lora_r": 4,
        "max_length": 256,
        "max_new_tokens": 4,
    }
    extension = str(stream / "paints.jsonl")
    whole = {**values, "output_dir": str(folder / "whole")}
    code, calls = run_until(whole, extension, str(folder / "cache-whole"), die_at=0)
    assert code == 0
    return values, extension, folder, content(folder / "whole"), calls


def moments(calls: list[str], number: int) -> list[int]:
    """Calls to die at, spread over all kinds of them, then over all of them; the same ones every time."""
    draw = random.Random(0)
    kinds = sorted(set(calls))
    chosen = [draw.choice([i for i, call in enumerate(calls, start=1) if call == kind]) for kind in kinds]
    draw.shuffle(chosen)
    return (chosen + [draw.randint(1, len(calls)) for _ in range(number)])[:number]


@pytest.mark.parametrize("kill", range(KILLS))
def test_a_killed_run_ends_like_an_undisturbed_one(scenario: Any, kill: int) -> None:
    values, extension, folder, whole, calls = scenario
    run = {**values, "output_dir": str(folder / f"run-{kill}")}
    cache = str(folder / f"cache-{kill}")
    moment = moments(calls, KILLS)[kill]
    code, _ = run_until(run, extension, cache, die_at=moment)
    assert code == -signal.SIGKILL
    if kill % 3 == 2:  # and again while it recovers
        run_until(run, extension, cache, die_at=1 + moment % 7)
    code, _ = run_until(run, extension, cache, die_at=0)
    assert code == 0
    assert content(folder / f"run-{kill}") == whole
