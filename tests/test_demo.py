"""`lcia demo` with a tiny random model in place of SmolLM2: two processes, a report, three answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from lcia import bench_list, demo, jobs
from lcia.errors import UserError
from lcia.run_folder import RunFolder

Run = Callable[..., tuple[int, str, str]]
SMALL = {"max_steps": 2, "lora_r": 2, "dtype": "float32", "max_eval_examples": 2, "max_new_tokens": 2}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "SETTINGS", {**demo.SETTINGS, **SMALL, "model": str(tiny_model)})
    return tmp_path / "runs/demo"


def test_two_runs_a_report_and_answers_and_again_without_work(lcia: Run, small: Path, monkeypatch) -> None:
    monkeypatch.setattr(demo.torch, "get_num_threads", lambda: 2)  # this process has one, so that tests are fast
    code, out, err = lcia("demo", "--json")
    assert code == 0, err
    assert "lora: done" in err
    assert "lcia: done" in err
    told = json.loads(out)
    assert told["runs_compared"] == 2
    assert [answer["request"].splitlines()[0] for answer in told["answers"]] == [
        request for request, _ in demo.REQUESTS
    ]
    assert (small / "report.html").is_file()
    for method in demo.METHODS:
        results = json.loads((small / method / "results.json").read_text(encoding="utf-8"))
        assert results["machine"]["threads"] == 1  # half of two
        assert len(results["matrix"]) == 7
        assert not (small / method / ".log.progress").exists()

    monkeypatch.setattr(jobs, "_start", lambda *_: pytest.fail("a finished run was begun again"))
    code, again, err = lcia("demo", "--json")
    assert code == 0, err
    assert json.loads(again)["answers"] == told["answers"]


@pytest.mark.parametrize(
    ("cores", "free_gib", "devices", "at_once"),
    [(1, 99, 0, 1), (2, 99, 0, 2), (16, 99, 0, 2), (16, 3, 0, 1), (16, 1, 0, 1), (1, 1, 2, 2), (16, 99, 1, 1)],
)
def test_as_many_runs_at_a_time_as_there_is_room_for(monkeypatch, cores, free_gib, devices, at_once) -> None:
    monkeypatch.setattr(demo.torch, "get_num_threads", lambda: cores)
    monkeypatch.setattr(demo.psutil, "virtual_memory", lambda: SimpleNamespace(available=free_gib * 2**30))
    assert demo._at_once(devices) == at_once


def test_a_run_that_fails_and_the_same_command_again(lcia: Run, small: Path, monkeypatch) -> None:
    with monkeypatch.context() as failing:
        failing.setattr(jobs, "_COMMAND", (sys.executable, "-c", "import sys; sys.exit('lcia: a full disk')"))
        code, out, err = lcia("demo")
    assert (code, out) == (1, "")
    assert "lora and lcia, 1 at a time" in err
    assert "lcia: a full disk" in err
    assert err.endswith("lcia: lora and lcia failed; the same command goes on\n")
    assert lcia("demo")[0] == 0


def test_without_its_model_nothing_begins(lcia: Run, small: Path, monkeypatch) -> None:
    monkeypatch.setattr(demo, "SETTINGS", {**demo.SETTINGS, "model": "smollm2-135"})
    code, out, err = lcia("demo")
    assert (code, out) == (2, "")
    assert "smollm2-135m" in err
    assert not small.exists()


def test_processes_of_a_launcher_begin_no_demo(lcia: Run, small: Path, monkeypatch) -> None:
    monkeypatch.setattr(bench_list.processes, "count", lambda: 2)
    with pytest.raises(UserError, match="torchrun"):
        demo.run_demo(small, Console(quiet=True))


def test_a_demo_with_other_settings_is_refused(lcia: Run, small: Path, monkeypatch) -> None:
    config = demo.RunConfig(**{**demo.SETTINGS, "max_steps": 3}, method="lora", output_dir=str(small / "lora"))
    folder = RunFolder(small / "lora")
    folder.path.mkdir(parents=True)
    folder.config.write_text(config.as_yaml(), encoding="utf-8")
    code, _, err = lcia("demo")
    assert code == 2
    assert "max_steps (began with 3, now 2)" in err
