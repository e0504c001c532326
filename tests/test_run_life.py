"""The life of a run: interrupted inside a task, extended, rolled back, regrouped, measured again, gated."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from safetensors.torch import load_file

from lcia import training
from lcia.adapters.pool import AdapterPool
from lcia.answering import answer_requests
from lcia.errors import GateError, UserError
from lcia.progress import Reporter
from lcia.regrouping import regroup
from lcia.run import extend, measure_again, require_little_forgetting, resume, rollback, train
from lcia.run_folder import RunFolder
from lcia.session import open_run
from lcia.validate import validate_config
from test_run import Killed, hashes, measure, without_cost


@pytest.fixture
def dies_after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the process die behind the n-th optimizer step it takes from now on; 0: never."""
    on_step_end = training._Moments.on_step_end
    left = 0

    def count(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed
        return on_step_end(self, args, state, control, **kwargs)

    def die(steps: int) -> None:
        nonlocal left
        left = steps

    monkeypatch.setattr(training._Moments, "on_step_end", count)
    return die


def go_on(folder: Path) -> dict[str, Any]:
    with Reporter() as reporter:
        return resume(folder, reporter)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "method", [{"name": "llaca", "rule": rule} for rule in ("fixed", "eq45", "fisher", "eq14")] + ["lora"]
)
@pytest.mark.parametrize("step", [8, 10])
def test_a_task_goes_on_behind_its_last_checkpoint(tiny_config, tmp_path, dies_after_step, dtype, method, step) -> None:
    """Step 8 of all dies in the second task behind the checkpoint of its step 2, step 10 behind that of step 4."""
    options = {"method": method, "dtype": dtype, "max_steps": 5, "save_steps": 2, "tasks": ["colours", "paints"]}
    whole = measure(tiny_config(**options, output_dir=str(tmp_path / "whole")))
    dies_after_step(step)
    with pytest.raises(Killed):
        measure(tiny_config(**options, output_dir=str(tmp_path / "cut")))
    folder = tmp_path / "cut"
    kept = [path.name for path in (folder / "state").iterdir()]
    assert kept == [f"checkpoint-{2 if step == 8 else 4}"]
    assert ((folder / "state" / kept[0] / "ema.safetensors").is_file()) == (method != "lora")
    assert not list(folder.rglob("training_args.bin"))
    dies_after_step(0)
    assert without_cost(go_on(folder)) == without_cost(whole)
    assert hashes(folder) == hashes(tmp_path / "whole")
    assert not list((folder / "state").glob("checkpoint-*"))
    log, other = ((tmp_path / name / "training_log.jsonl").read_text().splitlines() for name in ("cut", "whole"))
    assert [json.loads(line)["step"] for line in log] == [json.loads(line)["step"] for line in other]


def test_a_task_really_goes_on_and_does_not_start_again(tiny_config, dies_after_step, monkeypatch) -> None:
    config = tiny_config(method="lora", max_steps=5, save_steps=2, tasks=["colours"])
    dies_after_step(5)
    with pytest.raises(Killed):
        measure(config)
    steps = []
    monkeypatch.setattr(
        training._Moments, "on_pre_optimizer_step", lambda self, args, state, *a, **k: steps.append(state.global_step)
    )
    dies_after_step(0)
    go_on(Path(config.output_dir))
    assert steps == [4]


@pytest.mark.parametrize("damage", ["no mark", "altered weights", "cut optimizer"])
def test_a_damaged_checkpoint_costs_time_not_correctness(
    tiny_config, tmp_path, dies_after_step, damage, capsys
) -> None:
    options = {"max_steps": 4, "save_steps": 2, "tasks": ["colours", "paints"]}
    whole = measure(tiny_config(**options, output_dir=str(tmp_path / "whole")))
    dies_after_step(7)
    with pytest.raises(Killed):
        measure(tiny_config(**options, output_dir=str(tmp_path / "cut")))
    checkpoint = tmp_path / "cut" / "state" / "checkpoint-2"
    if damage == "no mark":
        (checkpoint / "complete.json").unlink()
    else:
        name = "trained.safetensors" if damage == "altered weights" else "optimizer.pt"
        content = bytearray((checkpoint / name).read_bytes())
        content[-1] ^= 1
        (checkpoint / name).write_bytes(content if damage == "altered weights" else content[:-7])
    dies_after_step(0)
    assert without_cost(go_on(tmp_path / "cut")) == without_cost(whole)
    assert ("is missing or was altered" in capsys.readouterr().err) == (damage != "no mark")


@pytest.mark.parametrize("method", ["lcia", {"name": "lcia", "rule": "fisher"}, "lora", "zero_shot"])
def test_an_extended_run_is_the_run_that_had_the_task_from_the_start(
    tiny_config, tiny_stream, tmp_path, monkeypatch, method
):
    monkeypatch.setenv("LCIA_CACHE", str(tmp_path / "one"))
    whole = measure(tiny_config(method=method, output_dir=str(tmp_path / "whole")))
    monkeypatch.setenv("LCIA_CACHE", str(tmp_path / "two"))  # nothing may be reused from it
    short = measure(tiny_config(method=method, tasks=["colours", "animals"], output_dir=str(tmp_path / "grown")))
    with Reporter() as reporter:
        grown = extend(tmp_path / "grown", str(tiny_stream / "paints.jsonl"), None, reporter)
    assert without_cost(grown) == {**without_cost(whole), "stream": grown["stream"]}
    assert hashes(tmp_path / "grown") == hashes(tmp_path / "whole")
    predictions = {
        path.relative_to(tmp_path / "whole"): path.read_text()
        for path in (tmp_path / "whole" / "predictions").rglob("*.jsonl")
    }
    assert predictions == {path: (tmp_path / "grown" / path).read_text() for path in predictions}
    # no old cell was computed again: the whole run's evaluations and those of the grown one are the same number
    total = sum(grown["cost"][key] for key in ("evaluations_run", "evaluations_reused"))
    assert total == sum(whole["cost"][key] for key in ("evaluations_run", "evaluations_reused"))
    assert total > sum(short["cost"][key] for key in ("evaluations_run", "evaluations_reused"))
    assert grown["cost"]["evaluations_run"] == whole["cost"]["evaluations_run"]


def test_extending_refuses_what_does_not_fit(tiny_config, tiny_stream, tmp_path) -> None:
    config = tiny_config(tasks=["colours", "animals"])
    measure(config)
    folder = Path(config.output_dir)
    ledger = (folder / "ledger.jsonl").read_text()
    new = str(tiny_stream / "paints.jsonl")

    def refused(match: str, *arguments: Any) -> None:
        with pytest.raises(UserError, match=match), Reporter() as reporter:
            extend(folder, *arguments[:2], reporter, *arguments[2:])
        assert (folder / "ledger.jsonl").read_text() == ledger

    refused("'colours' was learned already", str(tiny_stream / "colours.jsonl"), None)
    refused("nowhere.jsonl", str(tiny_stream / "nowhere.jsonl"), None)
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({**config.model_dump(), "learning_rate": 0.5, "lora_r": 2}))
    refused("learning_rate.*lora_r|lora_r.*learning_rate", new, None, other)
    frozen = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(frozen.replace("seed: 0", "seed: 7"))
    refused("seed", new, None)
    (folder / "config.yaml").write_text(frozen)
    weights = folder / "history" / "animals" / "animals" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-3])
    refused("adapter_model", new, None)
    weights.write_bytes(content)
    with Reporter() as reporter:  # and after all that the run goes on
        extend(folder, new, None, reporter)


@pytest.mark.parametrize("tasks", [["colours", "animals"], ["colours"]])
def test_a_method_that_learns_all_at_once_cannot_be_extended(tiny_config, tiny_stream, tasks) -> None:
    config = tiny_config(method="multi_task", tasks=tasks)
    measure(config)
    folder = Path(config.output_dir)
    ledger = (folder / "ledger.jsonl").read_text()
    with pytest.raises(UserError, match="all tasks at once"), Reporter() as reporter:
        extend(folder, str(tiny_stream / "paints.jsonl"), None, reporter)
    assert (folder / "ledger.jsonl").read_text() == ledger


def test_rolled_back_is_never_learned(tiny_config, tiny_stream, tmp_path) -> None:
    short = measure(tiny_config(tasks=["colours", "animals"], output_dir=str(tmp_path / "short")))
    whole = measure(tiny_config(output_dir=str(tmp_path / "long")))
    with Reporter() as reporter:
        back = rollback(tmp_path / "long", "animals", reporter)
    assert without_cost(back) == without_cost(short)
    files = [
        {path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*") if path.is_file()}
        for name in ("short", "long")
    ]
    assert files[0] == files[1]
    with Reporter() as reporter:  # what came later may come again
        again = extend(tmp_path / "long", str(tiny_stream / "paints.jsonl"), None, reporter)
    assert without_cost(again)["matrix"] == without_cost(whole)["matrix"]
    assert hashes(tmp_path / "long")[-1] == RunFolder(tmp_path / "long").records("stage_learned")[-1]["sha256"]
    with Reporter() as reporter, pytest.raises(UserError, match=r"no task 'birds'.*colours, animals, paints"):
        rollback(tmp_path / "long", "birds", reporter)


def write_rows(file: Path, answer: str, rows: int = 12) -> Path:
    """A task whose requests are all answered alike."""
    lines = [
        {
            "instruction": f"Say {file.stem}",
            "input": f"item {i}",
            "output": answer,
            "split": ("train", "train", "train", "train", "dev", "test")[i % 6],
        }
        for i in range(rows)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of two tasks without a tasks.json: what lies there is the stream."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("ants", "cats"):
        write_rows(folder / f"{name}.jsonl", name)
    return folder


def test_what_the_folder_gets_later_is_learned_by_extend_alone(tiny_config, data, tmp_path, capsys) -> None:
    config = tiny_config(stream=str(data))
    before = measure(config)
    run = Path(config.output_dir)
    write_rows(data / "bees.jsonl", "bees")  # between the two
    history = sorted(path.name for path in (run / "history").iterdir())
    assert without_cost(go_on(run)) == without_cost(before)
    assert "not in this run: bees" in capsys.readouterr().err
    assert sorted(path.name for path in (run / "history").iterdir()) == history
    with Reporter() as reporter:
        extended = extend(run, str(data / "bees.jsonl"), None, reporter)
    assert "not in this run" not in capsys.readouterr().err
    whole = measure(tiny_config(stream=str(data), tasks=["ants", "cats", "bees"], output_dir=str(tmp_path / "whole")))
    assert extended["tasks"] == whole["tasks"] == ["ants", "cats", "bees"]
    assert extended["matrix"] == whole["matrix"]
    assert hashes(run) == hashes(tmp_path / "whole")
    ledger = (run / "ledger.jsonl").read_text()
    (data / "ants.jsonl").rename(data / "aunts.jsonl")
    with pytest.raises(UserError, match="no task 'ants'"):
        go_on(run)
    assert (run / "ledger.jsonl").read_text() == ledger


def test_a_task_that_comes_back_with_other_data_is_measured_anew(tiny_config, data, tmp_path) -> None:
    """A bad data set is rolled back, corrected, and learned: also the rows before it are of the new data."""
    dogs = write_rows(tmp_path / "dogs.jsonl", "wrong")
    with Reporter() as reporter:
        train(tiny_config(stream=str(data)), reporter)
        extend(tmp_path / "run", str(dogs), None, reporter)
        dogs.unlink()
        rollback(tmp_path / "run", "cats", reporter)  # what goes need not be there any more
        write_rows(dogs, "dogs", rows=24)
        again = extend(tmp_path / "run", str(dogs), None, reporter)
        train(tiny_config(stream=str(data), output_dir=str(tmp_path / "fresh")), reporter)
        fresh = extend(tmp_path / "fresh", str(dogs), None, reporter)
    assert without_cost(again) == without_cost(fresh)
    made = [
        {path.relative_to(tmp_path / name): path.read_text() for path in (tmp_path / name).glob("predictions/*/*")}
        for name in ("run", "fresh")
    ]
    assert made[0] == made[1]
    assert Path("predictions/0/dogs.jsonl") in made[0]


def test_a_cell_that_an_older_row_lacks_is_measured_with_that_rows_weights(tiny_config) -> None:
    """As of a run that an older version rolled back and extended again."""
    config = tiny_config(max_steps=12)
    results = measure(config)
    ledger = Path(config.output_dir) / "ledger.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    row = next(line for line in lines if line["event"] == "row_measured" and line["row"] == 2)
    cell = Path(config.output_dir) / "predictions" / "2" / "paints.jsonl"
    told = cell.read_text()
    for kind in ("scores", "routing"):
        del row[kind]["paints"]
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert without_cost(go_on(Path(config.output_dir))) == without_cost(results)
    assert cell.read_text() == told
    last = Path(config.output_dir) / "predictions" / "3" / "paints.jsonl"
    assert [json.loads(line)["prediction"] for line in last.read_text().splitlines()] != [
        json.loads(line)["prediction"] for line in told.splitlines()
    ]  # so that the last row's weights would show


def test_a_task_that_an_older_version_learned_unasked_belongs_to_the_run(tiny_config, data) -> None:
    config = tiny_config(stream=str(data))
    results = measure(config)
    ledger = Path(config.output_dir) / "ledger.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    for fact in ("data_sha256", "instructions_sha256", "scorers"):
        del lines[0][fact]["cats"]  # as if it had been put there later
    ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert without_cost(go_on(Path(config.output_dir))) == without_cost(results)


def test_rolled_back_changes_of_groups_are_told(tiny_config, capsys) -> None:
    config = tiny_config(tasks=["colours", "animals"])
    measure(config)
    with Reporter() as reporter:
        regroup(Path(config.output_dir), "rename", "colours", "hues", "a better name", reporter)
        back = rollback(Path(config.output_dir), "animals", reporter)
    assert set(back["groups"].values()) == {"colours", "animals"}
    assert "undone too: groups rename colours hues (a better name)" in capsys.readouterr().err


def test_results_of_a_change_that_broke_off_are_not_there(tiny_config, tiny_stream, dies_after_step) -> None:
    config = tiny_config(tasks=["colours", "animals"])
    measure(config)
    dies_after_step(1)
    with pytest.raises(Killed), Reporter() as reporter:
        extend(Path(config.output_dir), str(tiny_stream / "paints.jsonl"), None, reporter)
    assert not (Path(config.output_dir) / "results.json").exists()
    dies_after_step(0)
    assert len(go_on(Path(config.output_dir))["tasks"]) == 3


def test_what_a_user_writes_into_the_pool_harms_no_snapshot(tiny_config) -> None:
    config = tiny_config(tasks=["colours", "animals"])
    results = measure(config)
    for file in (Path(config.output_dir) / "pool").rglob("*.*"):
        with file.open("a") as opened:
            opened.write("more")
    assert without_cost(go_on(Path(config.output_dir))) == without_cost(results)
    assert open_run(Path(config.output_dir)).pool.names == ["colours", "animals"]


def test_another_number_of_processes_does_not_go_on_inside_a_task(tiny_config, dies_after_step) -> None:
    config = tiny_config(max_steps=4, save_steps=2, tasks=["colours"])
    dies_after_step(4)
    with pytest.raises(Killed):
        measure(config)
    dies_after_step(0)
    folder = Path(config.output_dir)
    mark = folder / "state" / "checkpoint-2" / "complete.json"
    mark.write_text(json.dumps({**json.loads(mark.read_text()), "processes": 8}))
    with pytest.raises(UserError, match="written by 8 processes, and here are 1"):
        go_on(folder)
    shutil.copytree(folder / "state" / "checkpoint-2", folder.parent / "kept")
    shutil.rmtree(folder / "state")
    assert go_on(folder)["tasks"] == ["colours"]
    # killed between the end of a task and its tidying up: nothing goes on behind that checkpoint
    shutil.copytree(folder.parent / "kept", folder / "state" / "checkpoint-2")
    (folder / "results.json").unlink()
    assert go_on(folder)["tasks"] == ["colours"]
    assert not list(folder.glob("state/checkpoint-*"))


def test_a_task_that_was_cut_short_is_not_taken_for_learned(tiny_config, monkeypatch) -> None:
    config = tiny_config(max_steps=4, tasks=["colours"])

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True

    with monkeypatch.context() as patched:
        patched.setattr(training._Moments, "on_step_end", stop)
        with pytest.raises(RuntimeError, match="ended after 1 of 4 steps"):
            measure(config)
    assert not RunFolder(config.output_dir).records("stage_learned")
    assert go_on(Path(config.output_dir))["tasks"] == ["colours"]


def test_results_tell_where_a_run_went_on(tiny_config, tiny_stream, monkeypatch) -> None:
    config = tiny_config(tasks=["colours", "animals"])
    assert measure(config)["went_on"] == []
    folder = Path(config.output_dir)
    elsewhere = {"device": "cuda", "kernels": "H200", "threads": 3}
    monkeypatch.setattr("lcia.results.machine", lambda: elsewhere)
    assert go_on(folder)["went_on"] == []  # nothing was computed
    with Reporter() as reporter:
        extended = extend(folder, str(tiny_stream / "paints.jsonl"), None, reporter)
    assert [part["machine"] for part in extended["went_on"]] == [elsewhere]
    assert extended["machine"]["device"] == "cpu"
    with Reporter() as reporter:
        assert rollback(folder, "animals", reporter)["went_on"] == []


def test_tasks_learned_at_once_have_no_new_acc_when_measured_again(tiny_config) -> None:
    config = tiny_config(method="multi_task")
    measure(config)
    with Reporter() as reporter:
        again = measure_again(Path(config.output_dir), reporter, all_rows=True)
    assert {key for key, value in again["metrics"].items() if value is not None} == {"avg_acc"}


def test_a_run_is_measured_again_without_being_changed(tiny_config, tmp_path) -> None:
    config = tiny_config()
    results = measure(config)
    folder = Path(config.output_dir)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with Reporter() as reporter:
        again = measure_again(folder, reporter, all_rows=True, recompute=True)
        dev = measure_again(folder, reporter, split="dev")
        one = measure_again(folder, reporter, tasks=["animals"])
    assert again["matrix"] == results["matrix"]
    assert again["metrics"] == results["metrics"]
    assert results["cost"]["evaluations_reused"] > 0  # what was reused is what answering it again gives, byte by byte
    assert sum(row["evaluations_reused"] for row in again["rows"]) == 0
    cells = [path.relative_to(folder / "predictions") for path in folder.glob("predictions/*/*.jsonl")]
    assert len(cells) == sum(len(row["scores"]) for row in again["rows"])
    for path in cells:
        assert (folder / "predictions" / path).read_bytes() == (
            folder / "evaluations" / "test-all-rows" / path
        ).read_bytes()
    assert list(one["rows"][-1]["scores"]) == ["animals"]
    kept = json.loads((folder / "evaluations" / "test-all-rows.json").read_text())
    assert kept["matrix"] == again["matrix"]  # another question has not overwritten it
    expected = measure(tiny_config(eval_split="dev", output_dir=str(tmp_path / "dev")))
    assert dev["rows"][-1]["scores"] == dict(zip(expected["tasks"], expected["matrix"][-1], strict=True))
    assert {path: path.read_bytes() for path in before} == before


def test_other_data_is_routed_and_measured(tiny_config, tiny_stream, tmp_path) -> None:
    config = tiny_config(tasks=["colours", "animals"])
    measure(config)
    with Reporter() as reporter:
        found = measure_again(Path(config.output_dir), reporter, source=str(tiny_stream / "paints.jsonl"))
    assert found["rows"][-1]["routing"] == {"paints": {"colours": 4}}
    assert found["tasks"] == ["paints"]


def test_whatever_is_done_with_a_run_can_be_watched(tiny_config, tiny_stream, monkeypatch) -> None:
    """On a terminal. Rows are named after the run's own tasks, whatever is measured in them."""
    monkeypatch.setenv("TERM", "xterm")  # on a dumb one nothing is drawn
    config, paints = tiny_config(tasks=["colours", "animals"]), str(tiny_stream / "paints.jsonl")
    folder = Path(config.output_dir)

    def watched(work: Callable[..., Any], *arguments: Any, **options: Any) -> str:
        console = Console(file=io.StringIO(), width=200, force_terminal=True)
        with Reporter(console) as reporter:
            work(*arguments, reporter, **options)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())

    watched(validate_config, config)
    assert "│ base model │" in watched(train, config)
    assert "│ base model │" in watched(measure_again, folder, all_rows=True)
    for options, column in (({}, "colours"), ({"tasks": ["colours"]}, "colours"), ({"source": paints}, "paints")):
        shown = watched(measure_again, folder, **options)
        assert re.search(rf"┃ after +┃ +{column} ┃", shown)
        assert re.search(r"│ animals +│ +\d+\.\d │", shown)
    for work, *arguments in (
        (extend, paints, None),
        (regroup, "rename", "colours", "hues", "a better name"),
        (rollback, "animals"),
        (resume,),
    ):
        assert "│ base model │" in watched(work, folder, *arguments)


def test_a_request_loads_the_weights_of_its_group_alone(tiny_config, monkeypatch) -> None:
    folder = Path(tiny_config().output_dir)
    measure(tiny_config())
    load, loaded = AdapterPool.load, []

    def noted(self: AdapterPool, name: str, place: Path) -> None:
        loaded.append(name)
        load(self, name, place)

    monkeypatch.setattr(AdapterPool, "load", noted)
    requests = [("item 1", "Name the colour"), ("item 1", "Which animal is it")]
    together = answer_requests(folder, requests)
    assert sorted(loaded) == ["animals", "colours"]
    loaded.clear()
    assert answer_requests(folder, requests[1:]) == together[1:]
    assert loaded == ["animals"]
    weights = folder / "history" / "paints" / "colours" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert answer_requests(folder, requests[1:]) == together[1:]
    with pytest.raises(UserError, match=r"colours/adapter_model\.safetensors: its content is not"):
        answer_requests(folder, requests)


def test_groups_change_by_hand_with_a_reason(tiny_config) -> None:
    config = tiny_config()
    measure(config)
    folder = Path(config.output_dir)
    weights = {
        group: load_file(folder / "pool" / group / "adapter_model.safetensors") for group in ("colours", "animals")
    }
    with Reporter() as reporter:
        renamed = regroup(folder, "rename", "colours", "hues", "a better name", reporter)
    assert renamed["groups"] == {"colours": "hues", "animals": "animals", "paints": "hues"}
    assert renamed["routing"]["accuracy"] == 100.0
    same = load_file(folder / "pool" / "hues" / "adapter_model.safetensors")
    assert all((same[key] == value).all() for key, value in weights["colours"].items())
    with Reporter() as reporter:
        merged = regroup(folder, "merge", "animals", "hues", "one is enough", reporter)
    assert set(merged["groups"].values()) == {"hues"}
    one = sum(value.numel() for value in same.values())
    parameters = [
        [found["cost"][f"{kind}_parameters"] for kind in ("trained", "stored")] for found in (renamed, merged)
    ]
    assert parameters == [[one, 2 * one], [one, one]]
    assert [path.name for path in (folder / "pool").iterdir()] == ["hues"]
    assert open_run(folder).pool.names == ["hues"]
    reasons = [record["reason"] for record in RunFolder(folder).records("groups_changed")]
    assert reasons == ["a better name", "one is enough"]
    with Reporter() as reporter:
        split = regroup(folder, "split", "hues", "beasts", "it was not", reporter, ["animals"])
    assert split["groups"] == {"colours": "hues", "animals": "beasts", "paints": "hues"}
    assert json.loads((folder / "codebook.json").read_text())["groups"]["beasts"] == ["Which animal is it"]
    assert without_cost(go_on(folder)) == without_cost(split)


@pytest.mark.parametrize("method", [{"name": "lcia", "rule": "fisher"}, ["lcia", "ewc"], ["lcia", "pgp"]], ids=str)
def test_what_a_method_keeps_of_a_group_follows_it(tiny_config, tiny_stream, method) -> None:
    config = tiny_config(method=method, tasks=["colours", "animals"])
    measure(config)
    folder = Path(config.output_dir)
    with Reporter() as reporter:
        regroup(folder, "merge", "animals", "colours", "one is enough", reporter)
        regroup(folder, "rename", "colours", "hues", "a better name", reporter)
        regroup(folder, "split", "hues", "beasts", "it was not", reporter, ["animals"])
        grown = extend(folder, str(tiny_stream / "paints.jsonl"), None, reporter)
    assert grown["groups"] == {"colours": "hues", "animals": "beasts", "paints": "hues"}


def test_no_new_task_is_called_like_a_group(tiny_config, tiny_stream, tmp_path) -> None:
    """It would get an adapter of that name, and there is one."""
    config = tiny_config(tasks=["colours", "animals"])
    measure(config)
    folder = Path(config.output_dir)
    shutil.copy(tiny_stream / "paints.jsonl", tmp_path / "beasts.jsonl")
    with Reporter() as reporter:
        regroup(folder, "rename", "animals", "beasts", "a better name", reporter)
        ledger = (folder / "ledger.jsonl").read_text()
        with pytest.raises(UserError, match="a group is called 'beasts' already"):
            extend(folder, str(tmp_path / "beasts.jsonl"), None, reporter)
    assert (folder / "ledger.jsonl").read_text() == ledger


def test_a_diverged_task_says_so_though_it_has_checkpoints(tiny_config) -> None:
    config = tiny_config(method="lora", learning_rate=1e38, save_steps=1)
    with pytest.raises(RuntimeError, match="is not finite after training; lower learning_rate"):
        measure(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rename", "birds", "b", "why"), "no group 'birds'"),
        (("rename", "colours", "v1.5", "why"), "A-Z a-z 0-9 _ -"),
        (("rename", "colours", "x", "why", ["paints"]), "only split takes some tasks"),
        (("rename", "colours", "animals", "why"), "exists already"),
        (("merge", "colours", "birds", "why"), "no group 'birds' to merge into"),
        (("split", "colours", "new", "why", ["animals"]), "some, not all"),
        (("split", "colours", "new", "why", ["paints"]), "both sides"),
        (("renam", "colours", "x", "why"), "Did you mean 'rename'"),
        (("rename", "colours", "x", " "), "reason"),
        (("rename", "colours", "../x", "why"), "group"),
    ],
)
def test_changes_of_groups_that_do_not_fit_change_nothing(tiny_config, arguments, message) -> None:
    config = tiny_config()
    measure(config)
    folder = Path(config.output_dir)
    ledger = (folder / "ledger.jsonl").read_text()
    action, group, other, reason, *tasks = arguments
    with Reporter() as reporter, pytest.raises(UserError, match=message):
        regroup(folder, action, group, other, reason, reporter, *tasks)
    assert (folder / "ledger.jsonl").read_text() == ledger


def test_the_gate_names_the_tasks_over_the_budget() -> None:
    results = {
        "tasks": ["a", "b", "c"],
        "matrix": [[0, 0, 0], [90, 0, None], [60, 80, 0], [50, 70, 60]],
        "metrics": {"forgetting": 25.0},
    }
    require_little_forgetting(results, 25.0, per_task=False)
    require_little_forgetting(results, 40.0, per_task=True)
    with pytest.raises(GateError, match=r"mean 25.0; tasks over it: a 40.0$"):
        require_little_forgetting(results, 24.9, per_task=False)
    with pytest.raises(GateError, match=r"a 40.0, b 10.0$"):
        require_little_forgetting(results, 5.0, per_task=True)
    with pytest.raises(UserError, match="no forgetting"):
        require_little_forgetting({**results, "metrics": {"forgetting": None}}, 5.0, per_task=False)


def test_a_copied_run_goes_on_elsewhere(tiny_config, tiny_stream, tmp_path) -> None:
    measure(tiny_config(tasks=["colours", "animals"], output_dir=str(tmp_path / "here")))
    whole = measure(tiny_config(output_dir=str(tmp_path / "whole")))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    with Reporter() as reporter:
        assert (
            extend(tmp_path / "there", str(tiny_stream / "paints.jsonl"), None, reporter)["matrix"] == whole["matrix"]
        )


def test_training_needs_no_run_beside_it(tiny_config) -> None:
    """`train` is the only one that begins a run; the others refuse a folder without one."""
    with Reporter() as reporter:
        for call in (
            lambda p: resume(p, reporter),
            lambda p: extend(p, "x", None, reporter),
            lambda p: rollback(p, "x", reporter),
        ):
            with pytest.raises(UserError, match="not a run folder"):
                call(Path(tiny_config().output_dir))
        assert train(tiny_config(), reporter)["tasks"]
