"""A whole run on a tiny model: what it writes, that it repeats, and that it goes on after an interruption."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from lcia import learning, measuring
from lcia.answering import answer_requests, explain_request
from lcia.errors import UserError
from lcia.progress import Reporter
from lcia.run import extend, resume, train
from lcia.run_folder import RunFolder
from lcia.session import load_run_stream, open_run
from test_methods import ON_TEXT


def measure(config: Any) -> dict[str, Any]:
    with Reporter() as reporter:
        return train(config, reporter)


def without_cost(results: dict[str, Any]) -> dict[str, Any]:
    kept = copy.deepcopy(results)
    del kept["cost"], kept["date"]
    return kept


def hashes(folder: Path) -> Any:
    return [record["sha256"] for record in RunFolder(folder).records("stage_learned")]


@pytest.mark.parametrize("method", ON_TEXT)
def test_every_method_gives_a_whole_run(tiny_config, method: str) -> None:
    config = tiny_config(method=method)
    results = measure(config)
    folder = Path(config.output_dir)
    assert results == json.loads((folder / "results.json").read_text())
    matrix = results["matrix"]
    assert len(matrix) == 4
    assert all(len(row) == 3 for row in matrix)
    assert None not in matrix[0]
    assert None not in matrix[3]
    sequential = method not in ("zero_shot", "multi_task")
    assert (matrix[1][:2] != [None, None]) == sequential
    assert matrix[1][2] is None  # two tasks ahead: not measured
    assert (results["metrics"]["forgetting"] is not None) == sequential
    for row, scores in enumerate(matrix):
        for task, score in zip(results["tasks"], scores, strict=True):
            path = folder / "predictions" / str(row) / f"{task}.jsonl"
            assert path.is_file() == (score is not None)
            if score is not None:
                records = [json.loads(line) for line in path.read_text().splitlines()]
                assert {"id", "prompt", "prediction", "reference", "score", "group"} <= set(records[0])
                assert sum(record["score"] for record in records) / len(records) * 100 == pytest.approx(score)


def test_lcia_shares_weights_where_instructions_match_and_averages_only_there(tiny_config) -> None:
    config = tiny_config()
    results = measure(config)
    assert results["groups"] == {"colours": "colours", "animals": "animals", "paints": "colours"}
    assert list(results["ema"]["retained_mass"]) == ["paints"]
    assert results["ema"]["retained_mass"]["paints"] == pytest.approx(0.3, rel=1e-3)
    assert results["routing"]["accuracy"] == 100.0
    assert results["routing"]["base_model_answers"] == 0
    assert sorted(path.name for path in (Path(config.output_dir) / "pool").iterdir()) == [
        "animals",
        "colours",
    ]
    first, second, third = hashes(Path(config.output_dir))
    assert first["colours"] == second["colours"] != third["colours"]
    assert second["animals"] == third["animals"]


def test_unchanged_groups_are_not_evaluated_again(tiny_config, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LCIA_CACHE", str(tmp_path / "empty"))
    results = measure(tiny_config())
    # row 0: three tasks of the base model. row 1: colours and, sent to the only group, animals. row 2: colours did not
    # change; animals by its new group; paints by colours. row 3: animals did not change; colours and paints by the
    # averaged weights.
    assert results["cost"]["evaluations_run"] == 3 + 2 + 2 + 2
    assert results["cost"]["evaluations_reused"] == 1 + 1
    again = measure(tiny_config(output_dir=str(tmp_path / "again")))
    assert again["cost"]["evaluations_run"] == 0
    assert again["matrix"] == results["matrix"]


def test_methods_share_what_does_not_depend_on_them(tiny_config, tmp_path, monkeypatch) -> None:
    """The base model's answers, and those of the first task's adapter, which every method trains alike."""
    monkeypatch.setenv("LCIA_CACHE", str(tmp_path / "empty"))
    plain = measure(tiny_config(method="lora"))
    assert plain["cost"]["evaluations_reused"] == 0
    other = measure(tiny_config(method="llaca", output_dir=str(tmp_path / "other")))
    assert hashes(tmp_path / "other")[0] == hashes(Path(tiny_config(method="lora").output_dir))[0]
    assert other["cost"]["evaluations_reused"] == 3 + 2
    assert other["matrix"][:2] == plain["matrix"][:2]


def test_the_same_seed_repeats_and_another_does_not(tiny_config, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LCIA_CACHE", str(tmp_path / "one"))
    one = measure(tiny_config(output_dir=str(tmp_path / "a")))
    monkeypatch.setenv("LCIA_CACHE", str(tmp_path / "two"))  # nothing may be reused
    two = measure(tiny_config(output_dir=str(tmp_path / "b")))
    measure(tiny_config(output_dir=str(tmp_path / "c"), seed=1))
    assert without_cost(one) == without_cost(two)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b") != hashes(tmp_path / "c")


class Killed(Exception):
    """Stands for the process dying at this very call."""


MOMENTS = [
    (learning, "learn_task"),
    (measuring, "evaluate_task"),
    (RunFolder, "save_snapshot"),
    (RunFolder, "publish"),
    (RunFolder, "confirm"),
]


@pytest.mark.parametrize(("owner", "moment"), MOMENTS, ids=[moment for _, moment in MOMENTS])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_interrupted_run_goes_on_to_the_same_result(tiny_config, tmp_path, monkeypatch, owner, moment, call) -> None:
    whole = measure(tiny_config(output_dir=str(tmp_path / "whole")))
    original = getattr(owner, moment)
    calls = 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call + (moment == "confirm"):  # its first call is the run's first line
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, moment, dying)
    with pytest.raises(Killed):
        measure(tiny_config(output_dir=str(tmp_path / "cut")))
    monkeypatch.setattr(owner, moment, original)
    with (tmp_path / "cut" / "ledger.jsonl").open("a") as file:
        file.write('{"event": "row_mea')  # a line that a crash cut
    with Reporter() as reporter:
        resumed = resume(tmp_path / "cut", reporter)
    assert without_cost(resumed) == without_cost(whole)
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")
    logs = [(tmp_path / name / "training_log.jsonl").read_text().count("\n") for name in ("cut", "whole")]
    assert logs[0] == logs[1]


def test_one_writer_at_a_time(tiny_config) -> None:
    config = tiny_config()
    measure(config)
    with (
        RunFolder(config.output_dir).lock(),
        pytest.raises(UserError, match="another process"),
        Reporter() as reporter,
    ):
        resume(Path(config.output_dir), reporter)


def test_an_altered_adapter_is_found(tiny_config) -> None:
    config = tiny_config()
    measure(config)
    folder = Path(config.output_dir)
    weights = folder / "history" / "paints" / "animals" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"animals.adapter_model.safetensors"):
        open_run(folder)


def test_a_longer_stream_repeats_the_shorter_one(tiny_config, tmp_path) -> None:
    measure(tiny_config(tasks=["colours", "animals"], output_dir=str(tmp_path / "short")))
    measure(tiny_config(output_dir=str(tmp_path / "long")))
    assert hashes(tmp_path / "short") == hashes(tmp_path / "long")[:2]


def test_dev_rows_are_evaluated_when_asked(tiny_config) -> None:
    config = tiny_config(eval_split="dev", tasks=["colours"])
    measure(config)
    records = (Path(config.output_dir) / "predictions" / "1" / "colours.jsonl").read_text().splitlines()
    assert {json.loads(record)["id"] for record in records} == {f"colours-{i}" for i in (4, 10, 16, 22)}


def test_rows_that_do_not_fit_are_counted_not_cut(tiny_config, tiny_stream, tmp_path) -> None:
    rows = [json.loads(line) for line in (tiny_stream / "colours.jsonl").read_text().splitlines()]
    rows[0]["input"] = "x" * 300  # a training row
    rows[5]["input"] = "y" * 300  # a test row
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config(stream=str(tmp_path / "data"))
    results = measure(config)
    assert results["left_out"] == {"colours": 1}
    assert results["too_long"] == {"colours": 1}
    records = (Path(config.output_dir) / "predictions" / "1" / "colours.jsonl").read_text().splitlines()
    assert [json.loads(record).get("too_long") for record in records] == [True, None, None, None]


def test_requests_go_to_the_group_of_their_instruction(tiny_config) -> None:
    config = tiny_config()
    measure(config)
    folder = Path(config.output_dir)
    answers = answer_requests(
        folder, [("animals item 3", "Which animal is it"), ("paints item 1\nName the colour", None)]
    )
    assert [answer.group for answer in answers] == ["animals", "colours"]
    assert answers[1].instruction == "Name the colour"
    assert answers[0].similarity == pytest.approx(1.0)
    assert explain_request(folder, "Which animal is it").group == "animals"


def test_answers_are_those_of_the_evaluation(tiny_config) -> None:
    config = tiny_config()
    measure(config)
    folder = Path(config.output_dir)
    record = json.loads((folder / "predictions" / "3" / "animals.jsonl").read_text().splitlines()[0])
    text = record["prompt"].removeprefix("<|user|>").removesuffix("<|end|>\n<|assistant|>")
    assert answer_requests(folder, [(text, None)])[0].answer == record["prediction"]


@pytest.mark.parametrize("change", ["data", "model"])
def test_a_run_does_not_go_on_with_other_data_or_another_model(tiny_config, tiny_model, tiny_stream, tmp_path, change):
    import shutil

    data, model = tmp_path / "data", tmp_path / "model"
    shutil.copytree(tiny_stream, data)
    shutil.copytree(tiny_model, model)
    config = tiny_config(stream=str(data), model=str(model))
    measure(config)
    if change == "data":
        path = data / "animals.jsonl"
        path.write_text(path.read_text().replace("item 3", "item 33"))
    else:
        path = model / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    with pytest.raises(UserError, match="began with"), Reporter() as reporter:
        resume(Path(config.output_dir), reporter)


def test_a_run_does_not_go_on_with_another_scorer(tiny_config, tiny_stream, tmp_path) -> None:
    import shutil

    data = tmp_path / "data"
    shutil.copytree(tiny_stream, data)
    config = tiny_config(stream=str(data), tasks=["colours", "animals"])
    measure(config)
    folder = Path(config.output_dir)
    (data / "tasks.json").write_text(json.dumps([{"name": "colours", "scorer": "rouge_l"}, "animals", "paints"]))
    with pytest.raises(UserError, match=r"'colours' was scored by exact .* by rouge_l now"), Reporter() as reporter:
        extend(folder, str(data / "paints.jsonl"), None, reporter)
    # a run of an older version, whose first line does not say, goes on
    began, *lines = (folder / "ledger.jsonl").read_text().splitlines(keepends=True)
    kept = {key: value for key, value in json.loads(began).items() if key not in ("scorers", "instructions_sha256")}
    (folder / "ledger.jsonl").write_text("".join([json.dumps(kept) + "\n", *lines]))
    with Reporter() as reporter:
        assert extend(folder, str(data / "paints.jsonl"), None, reporter)["tasks"] == ["colours", "animals", "paints"]


def test_a_run_does_not_go_on_with_other_instructions(tiny_config, tiny_stream, tmp_path) -> None:
    """Those of rows that were not drawn decide on the group, too."""
    import shutil

    data = tmp_path / "data"
    shutil.copytree(tiny_stream, data)
    config = tiny_config(stream=str(data), tasks=["colours"], max_train_examples=2)
    measure(config)
    drawn = {row.id for row in load_run_stream(config)[0].train}
    rows = [json.loads(line) for line in (data / "colours.jsonl").read_text().splitlines()]
    next(row for row in rows if row["split"] == "train" and row["id"] not in drawn)["instruction"] = "Which hue is it"
    (data / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="the rows of task 'colours'"), Reporter() as reporter:
        resume(Path(config.output_dir), reporter)


def test_a_built_in_name_is_no_folder_of_the_working_directory(tiny_config, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("assistant", "smollm2-135m", "data"):
        Path(name).mkdir()
    init = {"path": "assistant", "tasks": ["one"]}
    config = tiny_config(stream="assistant", model="smollm2-135m", init_stream=init).with_absolute_paths()
    assert (config.stream, config.model, config.init_stream) == ("assistant", "smollm2-135m", init)
    for source in ("data", "assistant"):  # a stream's data beside its name is a folder
        config = tiny_config(stream={"name": "instrdialog", "path": source}).with_absolute_paths()
        assert config.stream == {"name": "instrdialog", "path": str(Path(source).absolute())}
    assert tiny_config(stream="data").with_absolute_paths().stream == str(Path("data").absolute())


def test_a_run_can_be_resumed_from_another_folder(tiny_config, tiny_stream, tmp_path, monkeypatch) -> None:
    import shutil

    shutil.copytree(tiny_stream, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    results = measure(tiny_config(stream="data"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with Reporter() as reporter:
        assert resume(tmp_path / "run", reporter) == results


def test_without_hard_links_adapters_are_copied(tiny_config, tmp_path, monkeypatch) -> None:
    import os

    def refuse(*arguments: Any) -> None:
        raise PermissionError("this file system has no hard links")

    expected = measure(tiny_config(output_dir=str(tmp_path / "links")))
    monkeypatch.setattr(os, "link", refuse)
    assert without_cost(measure(tiny_config())) == without_cost(expected)


def test_groups_may_bear_names_that_python_modules_use(tiny_config, tiny_stream, tmp_path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name, source in (("update", "colours"), ("train", "animals")):
        (data / f"{name}.jsonl").write_text((tiny_stream / f"{source}.jsonl").read_text())
    assert set(measure(tiny_config(stream=str(data)))["groups"].values()) == {"update", "train"}
