"""`lcia demo` with a tiny random model in place of SmolLM2: two processes, a report, three answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lcia import demo, jobs
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


def test_one_core_has_one_run_at_a_time(lcia: Run, small: Path, monkeypatch) -> None:
    at_once = []

    def begin_nothing(jobs_, runner, console):
        at_once.append(runner.keywords["at_once"])
        return [jobs.Failure(job, 1, ("no",)) for job in jobs_]

    monkeypatch.setattr(demo, "carry_out", begin_nothing)
    code, _, err = lcia("demo")
    assert code == 1
    assert "lora and lcia failed; the same command goes on" in err
    assert at_once == [1]


def test_a_demo_with_other_settings_is_refused(lcia: Run, small: Path, monkeypatch) -> None:
    config = demo.RunConfig(**{**demo.SETTINGS, "max_steps": 3}, method="lora", output_dir=str(small / "lora"))
    folder = RunFolder(small / "lora")
    folder.path.mkdir(parents=True)
    folder.config.write_text(config.as_yaml(), encoding="utf-8")
    code, _, err = lcia("demo")
    assert code == 2
    assert "max_steps (began with 3, now 2)" in err
