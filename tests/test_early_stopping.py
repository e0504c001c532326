"""A task ends when its dev score stops rising, and keeps its best epoch: `early_stopping_patience`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import interrupted
from lcia import learning
from lcia.early_stopping import EarlyStopping
from lcia.errors import UserError
from lcia.methods import METHODS
from lcia.progress import Reporter
from lcia.remarks import about_early_stopping
from lcia.run import extend, measure_again, resume, train
from lcia.stream import SCORERS

Config = Callable[..., Any]
# Two steps an epoch; the second task is learned in the adapter of the first, so that every part of a method works.
EPOCHS = {"tasks": ["colours", "paints"], "max_steps": -1, "num_train_epochs": 4, "per_device_train_batch_size": 8}
TRAINED = sorted(set(METHODS) - {"zero_shot", "eproj", "continual_llava"})
FISHER = {"name": "lcia", "rule": "fisher"}


def measure(config: Any) -> dict[str, Any]:
    with Reporter() as reporter:
        return train(config, reporter)


def told(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def learned_steps(run: Path) -> dict[str, int]:
    return {line["stage"]: line["step"] for line in told(run / "ledger.jsonl") if line["event"] == "stage_learned"}


def scripted(scores: list[float], patience: int) -> Callable[..., EarlyStopping]:
    """In the place of `lcia.learning._early_stopping`: each task's epochs score as written."""

    def make(*_: Any) -> EarlyStopping:
        given_ones: Iterator[float] = iter(scores)
        return EarlyStopping(lambda: next(given_ones), patience)

    return make


@given(scores=st.lists(st.integers(0, 5), min_size=1, max_size=12), patience=st.integers(1, 4))
def test_the_rule_is_a_counter_of_epochs_without_a_record(scores: list[int], patience: int) -> None:
    record, at, waited, stopped = -1, 0, 0, None
    for epoch, score in enumerate(scores, start=1):
        if score > record:
            record, at, waited = score, epoch, 0
        else:
            waited += 1
        if waited == patience:
            stopped = epoch
            break
    rule = EarlyStopping(lambda: 0.0, patience)
    seen: dict[int, float] = {}
    for epoch, score in enumerate(scores, start=1):
        seen[10 * epoch] = score
        if rule.is_over(seen):
            break
    assert (max(seen) == 10 * stopped) if stopped else (max(seen) == 10 * len(scores) and not rule.is_over(seen))
    assert rule.best(seen) == 10 * at


@pytest.mark.parametrize("method", [*TRAINED, FISHER, ["lcia", "replay"]], ids=str)
def test_going_back_to_an_epoch_is_having_ended_there(method, tiny_config: Config, tmp_path, monkeypatch) -> None:
    """Weights and what the method carries on: the third epoch, which was worse, left nothing behind."""
    options = {**EPOCHS, "method": method, "early_stopping_patience": 1, "lora_dropout": 0.1}
    options |= {"max_eval_examples": 1, "max_new_tokens": 2}
    monkeypatch.setattr(learning, "_early_stopping", scripted([1.0, 2.0, 0.0], 1))
    measure(tiny_config(**options, output_dir=str(tmp_path / "back")))
    monkeypatch.setattr(EarlyStopping, "is_over", lambda self, scores: len(scores) == 2)
    measure(tiny_config(**options, output_dir=str(tmp_path / "ended")))
    steps = learned_steps(tmp_path / "back")
    assert steps == learned_steps(tmp_path / "ended")
    assert set(steps.values()) <= {4, 8}  # two epochs; of twice the rows, where old ones or all tasks are learned
    for stage in steps:
        back, ended = (tmp_path / run / "history" / stage for run in ("back", "ended"))
        files = sorted(path.relative_to(ended) for path in ended.rglob("*") if path.is_file())
        assert files == sorted(path.relative_to(back) for path in back.rglob("*") if path.is_file())
        assert any(file.suffix == ".safetensors" for file in files)
        for file in files:
            assert (back / file).read_bytes() == (ended / file).read_bytes(), file
    worse = [record for record in told(tmp_path / "back" / "training_log.jsonl") if record.get("dev_score") == 0.0]
    assert len(worse) == len(steps)  # the log tells of the epoch that was taken back


@pytest.fixture
def by_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, float]], None]:
    """Scores by optimizer step: what is measured again scores the same."""

    def make(scores: dict[int, float]) -> None:
        reached: dict[str, int] = {}
        original = learning.learn_task

        def watched(*args: Any, on_record: Any, **kwargs: Any) -> Any:
            def note(record: dict[str, Any]) -> None:
                reached["step"] = record["step"]
                on_record(record)

            return original(*args, on_record=note, **kwargs)

        def stopping(session: Any, *_: Any) -> EarlyStopping:
            return EarlyStopping(lambda: scores[reached["step"]], session.config.early_stopping_patience)

        monkeypatch.setattr(learning, "learn_task", watched)
        monkeypatch.setattr(learning, "_early_stopping", stopping)

    return make


@pytest.mark.parametrize("dies_at", [3, 4, 5, 6, 7, 11])
@pytest.mark.parametrize("method", ["lora", FISHER], ids=str)
def test_a_killed_task_stops_where_it_would_have(dies_at, method, tiny_config: Config, tmp_path, by_step) -> None:
    """In the worse epoch, between two checkpoints of one, at an epoch's first and last step, in the second task."""
    options = {**EPOCHS, "method": method, "early_stopping_patience": 2, "save_steps": 3, "lora_dropout": 0.1}
    options |= {"max_eval_examples": 1, "max_new_tokens": 2, "logging_steps": 5}
    by_step({2: 1.0, 4: 3.0, 6: 2.0, 8: 2.5})
    whole = measure(tiny_config(**options, output_dir=str(tmp_path / "whole")))
    with interrupted(dies_at):
        measure(tiny_config(**options, output_dir=str(tmp_path / "cut")))
    with Reporter() as reporter:
        again = resume(tmp_path / "cut", reporter)
    assert again["matrix"] == whole["matrix"]
    assert learned_steps(tmp_path / "cut") == learned_steps(tmp_path / "whole") == {"colours": 4, "paints": 4}
    left, right = (tmp_path / name / "history" for name in ("cut", "whole"))
    files = [path.relative_to(right) for path in right.rglob("*") if path.is_file() and path.name != "README.md"]
    assert len(files) >= 4
    for file in files:
        assert (left / file).read_bytes() == (right / file).read_bytes(), file
    logs = [told(tmp_path / run / "training_log.jsonl") for run in ("whole", "cut")]
    for record in (record for log in logs for record in log):
        del record["examples_per_s"]
    assert logs[0] == logs[1]
    assert not list((tmp_path / "cut" / "state").glob("checkpoint-*"))


@pytest.mark.parametrize("harm", ["newest altered", "best altered", "best missing"])
def test_a_damaged_checkpoint_lets_the_task_start_again(harm, tiny_config: Config, tmp_path, by_step, capsys) -> None:
    """Whichever of the two: going on without the best epoch would end in nothing."""
    options = {**EPOCHS, "method": "lora", "early_stopping_patience": 2, "lora_dropout": 0.1}
    by_step({2: 3.0, 4: 1.0, 6: 2.0})
    whole = measure(tiny_config(**options, output_dir=str(tmp_path / "whole")))
    with interrupted(5):
        measure(tiny_config(**options, output_dir=str(tmp_path / "cut")))
    state = tmp_path / "cut" / "state"
    assert {folder.name for folder in state.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    harmed = state / ("checkpoint-4" if harm == "newest altered" else "checkpoint-2")
    if harm == "best missing":
        shutil.rmtree(harmed)
    else:
        (harmed / "trained.safetensors").write_bytes(b"")
    for _ in range(2):  # and once more: a folder that was damaged is whole when it is written again
        with interrupted(6), Reporter() as reporter:
            resume(tmp_path / "cut", reporter)
        told_of = capsys.readouterr().err
    assert "altered" not in told_of
    assert "starts again" not in told_of
    with Reporter() as reporter:
        assert resume(tmp_path / "cut", reporter)["matrix"] == whole["matrix"]
    assert learned_steps(tmp_path / "cut") == learned_steps(tmp_path / "whole") == {"colours": 2, "paints": 2}


def test_an_epoch_that_is_cut_short_counts(tiny_config: Config, tmp_path, by_step) -> None:
    """`max_steps` inside an epoch, with accumulated micro-batches: its end is scored, and can be the best."""
    options = {**EPOCHS, "method": "lora", "early_stopping_patience": 3, "max_steps": 5, "tasks": ["colours"]}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    for best, scores in ((5, {2: 1.0, 4: 2.0, 5: 3.0}), (4, {2: 1.0, 4: 3.0, 5: 2.0})):
        by_step(scores)
        run = tmp_path / str(best)
        measure(tiny_config(**options, output_dir=str(run)))
        assert learned_steps(run) == {"colours": best}


def test_passes_that_were_taken_back_are_paid_for(tiny_config: Config, tmp_path, by_step) -> None:
    costs = {}
    for patience, scores in ((1, {2: 3.0, 4: 1.0}), (3, {2: 3.0, 4: 1.0, 6: 1.0, 8: 1.0})):
        by_step(scores)
        run = tmp_path / str(patience)
        measure(tiny_config(**EPOCHS, method="lwf", early_stopping_patience=patience, output_dir=str(run)))
        assert learned_steps(run) == {"colours": 2, "paints": 2}
        learned = [line for line in told(run / "ledger.jsonl") if line["event"] == "stage_learned"]
        costs[patience] = learned[-1]["method_cost"]["extra_forward_rows"]
    assert costs == {1: 4 * 8, 3: 8 * 8}


def test_a_run_that_stopped_early_is_extended_and_measured_elsewhere(
    tiny_config: Config, tiny_stream: Path, tmp_path
) -> None:
    config = tiny_config(**EPOCHS, method="lora", early_stopping_patience=1, output_dir=str(tmp_path / "run"))
    measure(config)
    with Reporter() as reporter:
        extend(tmp_path / "run", str(tiny_stream / "animals.jsonl"), None, reporter)
    assert set(learned_steps(tmp_path / "run")) == {"colours", "paints", "animals"}
    rows = [{**row, "id": f"other-{row['id']}"} for row in told(tiny_stream / "paints.jsonl") if row["split"] != "dev"]
    other = tmp_path / "other.jsonl"  # without dev rows, which nothing is trained on
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Reporter() as reporter:
        assert measure_again(tmp_path / "run", reporter, source=str(other))["tasks"] == ["other"]


@pytest.mark.parametrize(
    ("changes", "told_of"),
    [
        ({"method": {"name": "lcia", "rest": 0.5}}, "the average (retained, rest) is paced for the full length"),
        ({"method": "stable_ema"}, None),
        ({"method": "lora", "eval_split": "dev"}, "by the rows that the scores are of"),
    ],
)
def test_what_a_user_should_know_is_told(changes, told_of, tiny_config: Config) -> None:
    found = about_early_stopping(tiny_config(early_stopping_patience=1, **changes))
    assert (told_of is None) == (found == [])
    assert told_of is None or told_of in found[0]
    assert about_early_stopping(tiny_config(**changes)) == []


def test_the_score_is_that_of_the_dev_rows(tiny_config: Config, tmp_path, monkeypatch) -> None:
    """Of a task's best epoch and of `lcia eval --split dev` behind it, with all weights as they were then."""
    run = tmp_path / "run"
    # every byte of an answer counts: so small a model is never right
    monkeypatch.setitem(SCORERS, "exact", lambda answer, references: sum(answer.encode()) % 101 / 101)
    config = tiny_config(**EPOCHS, method="lora", early_stopping_patience=9, output_dir=str(run), learning_rate=3e-2)
    measure(config)
    scores = [record for record in told(run / "training_log.jsonl") if "dev_score" in record]
    assert [record["step"] for record in scores] == 2 * [2, 4, 6, 8]
    kept = learned_steps(run)
    with Reporter() as reporter:
        rows = measure_again(run, reporter, split="dev", all_rows=True)["rows"]
    for row, task in ((1, "colours"), (2, "paints")):
        mine = {record["step"]: record["dev_score"] for record in scores if record["task"] == task}
        assert mine[kept[task]] == max(mine.values()) == rows[row]["scores"][task]
    assert len({record["dev_score"] for record in scores}) > 1


def test_all_tasks_at_once_stop_together(tiny_config: Config, tmp_path) -> None:
    run = tmp_path / "run"
    config = tiny_config(**EPOCHS, method="multi_task", early_stopping_patience=1, output_dir=str(run))
    measure(config)
    scores = {r["step"]: r["dev_score"] for r in told(run / "training_log.jsonl") if "dev_score" in r}
    assert min(scores) == 4  # an epoch of both tasks' rows
    assert learned_steps(run) == {"all": max(sorted(scores), key=scores.__getitem__)}


def test_without_dev_rows_it_is_refused(tiny_config: Config, tiny_stream: Path, tmp_path) -> None:
    rows = [row for row in told(tiny_stream / "colours.jsonl") if row["split"] != "dev"]
    data = tmp_path / "colours.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="'colours': it has no dev rows, and early_stopping_patience"):
        measure(tiny_config(stream=str(data), early_stopping_patience=1))
    rows = [
        {**row, "input": "much " * 60} if row["split"] == "dev" else row for row in told(tiny_stream / "colours.jsonl")
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="none of its dev rows fits max_length"):
        measure(tiny_config(stream=str(data), early_stopping_patience=1))


def test_a_best_epoch_that_was_altered_is_named(tiny_config: Config, tmp_path, monkeypatch) -> None:
    run = tmp_path / "run"

    def altering() -> float:
        if (run / "state" / "checkpoint-2" / "trained.safetensors").is_file():
            (run / "state" / "checkpoint-2" / "trained.safetensors").write_bytes(b"")
        return next(scores)

    scores = iter([2.0, 1.0])
    monkeypatch.setattr(learning, "_early_stopping", lambda *_: EarlyStopping(altering, 1))
    config = tiny_config(**EPOCHS, method="lora", early_stopping_patience=1, output_dir=str(run))
    with pytest.raises(UserError, match=r"checkpoint-2: trained.safetensors is missing or was altered.*best weights"):
        measure(config)
