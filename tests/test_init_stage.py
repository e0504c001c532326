"""The Init stage: against the three commands it stands for, against W + s·B·A in float64, and through a run's life."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from killing import run_until
from lcia import init_stage, training
from lcia.answering import answer_requests
from lcia.errors import UserError
from lcia.export import export_run
from lcia.progress import Reporter
from lcia.run import extend, measure_again, resume, rollback, train
from lcia.run_folder import RunFolder
from lcia.session import open_run
from lcia.validate import validate_config
from test_run import Killed, hashes, measure, without_cost
from tiny_vision import square_stream, tiny_llava

TASKS = ["colours", "animals"]


@pytest.fixture(scope="module")
def init_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks that are none of the stream's."""
    folder = tmp_path_factory.mktemp("init-data")
    for name, answers in (("sizes", ("big", "small")), ("tastes", ("sweet", "sour"))):
        rows = [
            {
                "id": f"{name}-{i}",
                "instruction": f"Which of the {name}",
                "input": f"thing {i}",
                "output": answers[i % 2],
                "split": ("train", "train", "train", "test")[i % 4],
            }
            for i in range(16)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def with_init(tiny_config: Callable[..., Any], init_data: Path) -> Callable[..., Any]:
    """A run of two tasks behind an Init stage, which trains 8 steps for each of its own two."""

    def make(**changes: Any) -> Any:
        return tiny_config(
            **{
                "tasks": TASKS,
                "method": "lora",
                "max_steps": 2,
                "init_stream": str(init_data),
                "init_max_steps": 8,
                "init_learning_rate": 1.1e-2,
                "max_new_tokens": 6,
                **changes,
            }
        )

    return make


def go_on(folder: Path) -> dict[str, Any]:
    with Reporter() as reporter:
        return resume(folder, reporter)


def base_of(folder: Path) -> str | None:
    return RunFolder(folder).base_sha256()


# --- what it is


def test_it_is_multi_task_then_merged_then_a_run_on_that_model(with_init, tiny_config, init_data, tmp_path) -> None:
    """The three commands that the key stands for, one by one."""
    results = measure(with_init(output_dir=str(tmp_path / "one")))
    options = {"stream": str(init_data), "method": "multi_task", "max_steps": 8, "learning_rate": 1.1e-2}
    measure(tiny_config(**options, output_dir=str(tmp_path / "init")))
    export_run(tmp_path / "init", tmp_path / "model", "merged")
    later = {"tasks": TASKS, "method": "lora", "max_steps": 2, "max_new_tokens": 6}
    expected = measure(tiny_config(**later, model=str(tmp_path / "model"), output_dir=str(tmp_path / "three")))
    assert hashes(tmp_path / "one" / "init") == hashes(tmp_path / "init")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "three")
    assert base_of(tmp_path / "one") == base_of(tmp_path / "three") != base_of(tmp_path / "init")
    assert results["matrix"] == expected["matrix"]
    for row in ("0", "1", "2"):
        for path in (tmp_path / "three" / "predictions" / row).iterdir():
            assert (tmp_path / "one" / "predictions" / row / path.name).read_text() == path.read_text()
    assert results["model"] == str(with_init().with_absolute_paths().model)
    facts = results["init"]
    assert facts["tasks"] == ["sizes", "tastes"]
    assert facts["train_s"] > 0
    assert facts["left_out"] == 0
    logged = (tmp_path / "one" / "init" / "training_log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in logged] == list(range(1, 17))  # 8 for each of 2 tasks


def test_the_base_becomes_w_plus_the_adapters_product(with_init, tiny_model, tmp_path) -> None:
    measure(with_init(tasks=["colours"], method="zero_shot"))
    folder = tmp_path / "run" / "init"
    before, after = load_file(tiny_model / "model.safetensors"), load_file(folder / "model" / "model.safetensors")
    adapter = load_file(folder / "history" / "all" / "shared" / "adapter_model.safetensors")
    adapter = {key.removeprefix("base_model.model."): value.double() for key, value in adapter.items()}
    assert before.keys() == after.keys()
    moved = 0
    for key, weight in before.items():
        path = key.removesuffix(".weight")
        if f"{path}.lora_A.weight" not in adapter:
            assert torch.equal(after[key], weight)
            continue
        a, b = adapter[f"{path}.lora_A.weight"].tolist(), adapter[f"{path}.lora_B.weight"].tolist()
        for i, line in enumerate(weight.double().tolist()):
            for j in range(0, len(line), 7):
                exact = line[j] + 2.0 * sum(b[i][k] * a[k][j] for k in range(4))  # alpha = 2 r
                assert after[key][i, j].item() == pytest.approx(exact, abs=1e-7)
                moved += abs(exact - line[j]) > 1e-4
    assert moved > 100


def test_row_0_and_every_answer_are_the_init_models(with_init, tiny_config, tmp_path, monkeypatch) -> None:
    """And not one prediction of the untrained base is reused for it."""
    monkeypatch.setenv("LCIA_CACHE", str(tmp_path / "cache"))  # with nothing in it yet
    plain = measure(tiny_config(tasks=TASKS, method="zero_shot", max_new_tokens=6, output_dir=str(tmp_path / "plain")))
    results = measure(with_init(method="zero_shot"))
    assert results["cost"]["evaluations_run"] == len(TASKS)  # row 0; the last row is the same model's
    made = str(tmp_path / "run" / "init" / "model")
    again = {"tasks": TASKS, "method": "zero_shot", "max_new_tokens": 6, "output_dir": str(tmp_path / "again")}
    assert measure(tiny_config(**again, model=made))["matrix"] == results["matrix"]
    said = [
        [json.loads(line)["prediction"] for line in text.splitlines()]
        for run in ("plain", "run", "again")
        for text in [(tmp_path / run / "predictions" / "0" / "colours.jsonl").read_text()]
    ]
    assert said[0] != said[1] == said[2]
    assert plain["model"] == results["model"]


def test_own_values_hold_in_the_init_stage_only_and_others_are_the_runs(with_init, init_data, tmp_path) -> None:
    config = with_init(
        init_stream={"path": str(init_data), "tasks": ["tastes"]},
        init_max_steps=None,
        init_num_train_epochs=3,
        init_max_train_examples=4,
        tasks=["colours"],
    )
    measure(config)
    own = yaml.safe_load((tmp_path / "run" / "init" / "config.yaml").read_text())
    assert own["learning_rate"] == 1.1e-2
    assert own["max_steps"] == -1  # the run's limit would be a limit on the epochs
    assert own["per_device_train_batch_size"] == 4
    assert (own["stream"], own["tasks"], own["init_stream"]) == (str(init_data), ["tastes"], None)
    (stage,) = RunFolder(tmp_path / "run" / "init").records("stage_learned")
    assert stage["stage"] == "tastes"
    logged = (tmp_path / "run" / "init" / "training_log.jsonl").read_text().splitlines()
    assert len(logged) == 3  # epochs of 4 rows in one batch
    assert len((tmp_path / "run" / "training_log.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("method", ["multi_task", "adapter_cl", "lcia"])
def test_other_methods_start_from_it_too(with_init, tmp_path, method) -> None:
    results = measure(with_init(method=method))
    assert None not in results["matrix"][2]
    assert base_of(tmp_path / "run") == open_run(tmp_path / "run").backbone.fingerprint


def test_on_an_encoder_decoder(with_init, tiny_t5, tmp_path) -> None:
    results = measure(with_init(model=str(tiny_t5), max_new_tokens=8))
    assert None not in results["matrix"][2]
    assert RunFolder(tmp_path / "run").base_sha256() != RunFolder(tmp_path / "run" / "init").base_sha256()


def test_on_a_model_that_sees_the_projector_is_the_bases_from_then_on(with_init, tmp_path) -> None:
    for folder in ("model", "squares"):
        (tmp_path / folder).mkdir()
    model, squares = str(tiny_llava(tmp_path / "model")), str(square_stream(tmp_path / "squares"))
    init = {"path": squares, "tasks": ["tints"]}
    results = measure(with_init(model=model, stream=squares, tasks=["colours"], init_stream=init))
    assert None not in results["matrix"][1]
    made = load_file(tmp_path / "run" / "init" / "model" / "model.safetensors")
    kept = load_file(tmp_path / "run" / "init" / "pool" / "shared" / "projector.safetensors")
    before = load_file(tmp_path / "model" / "model.safetensors")
    assert len(kept) == 4
    for name, weight in kept.items():
        (key,) = [key for key in made if key.endswith(name.removeprefix("model."))]
        assert torch.equal(made[key], weight)
        assert not torch.equal(made[key], before[key])


def test_rounding_is_measured_and_told(with_init, tmp_path) -> None:
    exact = measure(with_init(tasks=["colours"], output_dir=str(tmp_path / "exact")))
    coarse = measure(with_init(tasks=["colours"], dtype="bfloat16", output_dir=str(tmp_path / "coarse")))
    assert exact["init"]["rounding"] < 1e-5
    assert 1e-3 < coarse["init"]["rounding"] < 1
    weights = load_file(tmp_path / "coarse" / "init" / "model" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


# --- interrupted


def dies_at_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    on_step_end, taken = training._Moments.on_step_end, 0

    def dying(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == step:
            raise Killed
        return on_step_end(self, *args, **kwargs)

    monkeypatch.setattr(training._Moments, "on_step_end", dying)


def dies_in(name: str) -> Callable[[pytest.MonkeyPatch], None]:
    def arrange(monkeypatch: pytest.MonkeyPatch) -> None:
        def dying(*arguments: Any, **options: Any) -> Any:
            raise Killed

        monkeypatch.setattr(init_stage, name, dying)

    return arrange


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tiny_stream, init_data, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The run of `interrupted` without an interruption."""
    from lcia.config import parse_config

    folder = tmp_path_factory.mktemp("undisturbed")
    values = interrupted_values(tiny_model, tiny_stream, init_data, folder)
    return folder, measure(parse_config(values, where="test"))


def interrupted_values(model: Path, stream: Path, data: Path, folder: Path) -> dict[str, Any]:
    return {
        "stream": str(stream),
        "tasks": TASKS,
        "model": str(model),
        "method": "lcia",
        "output_dir": str(folder),
        "dtype": "float32",
        "max_steps": 2,
        "save_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lora_r": 4,
        "max_length": 256,
        "max_new_tokens": 4,
        "init_stream": str(data),
        "init_max_steps": 2,
    }


@pytest.mark.parametrize(
    "arrange",
    [
        lambda monkeypatch: dies_at_step(monkeypatch, 3),  # of Init's 4
        dies_in("learn_stage"),
        dies_in("merge_active"),
        dies_in("write_model"),
        dies_in("move_durably"),
        dies_in("load_backbone"),  # the model lies there, and no line says so yet
        lambda monkeypatch: dies_at_step(monkeypatch, 6),  # the stream's second
    ],
    ids=["inside", "before", "not merged", "not written", "not moved", "not confirmed", "in the stream"],
)
def test_a_kill_around_init_leaves_no_trace(
    undisturbed, tiny_model, tiny_stream, init_data, tmp_path, monkeypatch, arrange
) -> None:
    from lcia.config import parse_config

    whole, expected = undisturbed
    values = interrupted_values(tiny_model, tiny_stream, init_data, tmp_path / "cut")
    with monkeypatch.context() as patched:
        arrange(patched)
        with pytest.raises(Killed):
            measure(parse_config(values, where="test"))
    with (tmp_path / "cut" / "ledger.jsonl").open("a") as file:
        file.write('{"event": "init_lea')  # a line that the kill cut
    results = go_on(tmp_path / "cut")
    for part in ("", "init"):
        assert hashes(tmp_path / "cut" / part) == hashes(whole / part)
    assert base_of(tmp_path / "cut") == base_of(whole)
    kept = [without_cost(found) for found in (results, expected)]
    for found in kept:
        del found["init"]["train_s"], found["init"]["peak_memory_mib"]
    assert kept[0] == kept[1]
    files = [
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        for folder in (whole, tmp_path / "cut")
    ]
    assert files[0] == files[1]
    assert (tmp_path / "cut" / "init" / "model" / "model.safetensors").read_bytes() == (
        whole / "init" / "model" / "model.safetensors"
    ).read_bytes()


def test_sigkill_inside_init_leaves_no_trace(undisturbed, tiny_model, tiny_stream, init_data, tmp_path) -> None:
    """Twice in one run, half-written files included."""
    whole, _ = undisturbed
    values = interrupted_values(tiny_model, tiny_stream, init_data, tmp_path / "killed")
    extension, cache = str(tiny_stream / "paints.jsonl"), str(tmp_path / "cache")
    for moment in (14, 30):
        code, _ = run_until(values, extension, cache, die_at=moment)
        assert code == -9
        assert not RunFolder(tmp_path / "killed").records("init_learned", "stage_learned")
    code, _ = run_until(values, extension, cache, die_at=0)
    assert code == 0
    assert base_of(tmp_path / "killed") == base_of(whole)
    assert hashes(tmp_path / "killed")[:2] == hashes(whole)


# --- the run's life


def test_extended_it_is_the_run_that_had_all_tasks_from_the_start(with_init, tiny_stream, tmp_path) -> None:
    expected = measure(with_init(tasks=[*TASKS, "paints"], output_dir=str(tmp_path / "long")))
    measure(with_init())
    shutil.copytree(tmp_path / "run", tmp_path / "short")
    with Reporter() as reporter:
        extended = extend(tmp_path / "run", str(tiny_stream / "paints.jsonl"), None, reporter)
    assert hashes(tmp_path / "run") == hashes(tmp_path / "long")
    assert extended["matrix"] == expected["matrix"]
    assert extended["init"]["tasks"] == ["sizes", "tastes"]
    with Reporter() as reporter:
        back = rollback(tmp_path / "run", "animals", reporter)
    assert hashes(tmp_path / "run") == hashes(tmp_path / "short")
    assert back["init"] == extended["init"]
    assert base_of(tmp_path / "run") == base_of(tmp_path / "long")


@pytest.mark.parametrize("to", ["init", "all", "sizes"])
def test_no_rollback_goes_behind_it(with_init, tmp_path, to) -> None:
    measure(with_init(tasks=["colours"], method="lora"))
    with pytest.raises(UserError, match=f"no task '{to}' to go back to; learned one by one: colours"), Reporter() as r:
        rollback(tmp_path / "run", to, r)


def test_it_answers_and_is_measured_again_with_the_init_model(with_init, tmp_path) -> None:
    results = measure(with_init())
    record = json.loads((tmp_path / "run/predictions/2/animals.jsonl").read_text().splitlines()[0])
    text = record["prompt"].removeprefix("<|user|>").removesuffix("<|end|>\n<|assistant|>")
    assert answer_requests(tmp_path / "run", [(text, None)])[0].answer == record["prediction"]
    with Reporter() as reporter:
        again = measure_again(tmp_path / "run", reporter, all_rows=True, recompute=True)
    assert again["matrix"] == results["matrix"]


def test_the_init_tasks_can_be_measured(with_init, tmp_path) -> None:
    """RUN/init is a run that only lacks its rows."""
    measure(with_init())
    before = base_of(tmp_path / "run")
    results = go_on(tmp_path / "run" / "init")
    assert results["tasks"] == ["sizes", "tastes"]
    assert None not in results["matrix"][2]
    assert go_on(tmp_path / "run")["init"]["tasks"] == ["sizes", "tastes"]
    assert base_of(tmp_path / "run") == before


@pytest.mark.parametrize("harm", ["altered", "missing"])
def test_a_damaged_init_model_is_named(with_init, tmp_path, harm) -> None:
    measure(with_init(tasks=["colours"]))
    path = tmp_path / "run" / "init" / "model" / "config.json"
    if harm == "missing":
        path.unlink()
    else:
        path.write_text(path.read_text() + " ")
    for use in (go_on, open_run, lambda run: export_run(run, tmp_path / "out")):
        with pytest.raises(UserError, match=r"init/model/config\.json: (missing|its content)"):
            use(tmp_path / "run")


def test_changed_init_data_are_refused_until_it_is_learned(with_init, init_data, tmp_path, monkeypatch) -> None:
    data = tmp_path / "data"
    shutil.copytree(init_data, data)
    config = with_init(init_stream=str(data), tasks=["colours"])
    with monkeypatch.context() as patched:
        dies_at_step(patched, 3)
        with pytest.raises(Killed):
            measure(config)
    kept = (data / "sizes.jsonl").read_text()
    (data / "sizes.jsonl").write_text(kept.replace("big", "huge"))
    with pytest.raises(UserError, match="rows of task 'sizes' are not those the run began with"):
        go_on(tmp_path / "run")
    (data / "sizes.jsonl").write_text(kept)
    go_on(tmp_path / "run")
    shutil.rmtree(data)
    go_on(tmp_path / "run")  # learned: its data are not needed any more


# --- export


def test_exported_adapters_name_the_base_they_belong_to(with_init, tmp_path) -> None:
    from peft import PeftModel

    measure(with_init())
    made = tmp_path / "run" / "init" / "model"
    assert export_run(tmp_path / "run", tmp_path / "peft").base == str(made)
    settings = json.loads((tmp_path / "peft" / "shared" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(made)
    card = (tmp_path / "peft" / "shared" / "README.md").read_text()
    assert "after the run's Init stage" in card
    assert str(base_of(tmp_path / "run"))[:16] in card
    assert f"after the run's Init stage: {made}" in (tmp_path / "run" / "pool" / "shared" / "README.md").read_text()

    ids = torch.arange(5, 25)[None]
    session = open_run(tmp_path / "run")
    with session.pool.active("shared") as model, torch.no_grad():
        expected = model(input_ids=ids).logits
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made, **options), tmp_path / "peft/shared")
    export_run(tmp_path / "run", tmp_path / "merged", "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", **options)
    export_run(tmp_path / "run", tmp_path / "vllm", "vllm")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "vllm" / "base", **options)
    served = PeftModel.from_pretrained(served, tmp_path / "vllm" / "adapters" / "shared")
    with torch.no_grad():
        assert torch.equal(plain.eval()(input_ids=ids).logits, expected)
        assert torch.equal(served.eval()(input_ids=ids).logits, expected)
        torch.testing.assert_close(merged.eval()(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


# --- refused before anything is begun


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_stream": None}, "key 'init_max_steps' goes with init_stream"),
        ({"init_stream": {"path": ".", "tasks": "sizes"}}, "key 'init_stream': 'tasks' must be a list of names"),
        ({"init_max_steps": 0}, "key 'init_max_steps'"),
        ({"init_learning_rate": 0}, "key 'init_learning_rate'"),
    ],
)
def test_bad_values_are_named(with_init, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        with_init(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_stream": "no_such_stream"}, "no_such_stream"),
        ({"init_stream": {"path": "DATA", "tasks": ["size"]}}, "no task 'size'. Did you mean 'sizes'"),
        ({"lora_target_modules": ["lm_head"]}, "an adapted weight is shared, .*init_stream leave it out"),
    ],
)
def test_what_cannot_be_learned_or_merged_is_refused_before_the_run_begins(
    with_init, init_data, tmp_path, changes, message
) -> None:
    changes = json.loads(json.dumps(changes).replace("DATA", str(init_data)))
    with pytest.raises(UserError, match=message):
        measure(with_init(**changes))
    assert not (tmp_path / "run").exists()


def test_validate_tells_of_it(with_init) -> None:
    with Reporter() as reporter:
        notes = validate_config(with_init(), reporter).notes
        assert "Init: 2 tasks, learned at once before the stream: 24 training rows" in notes
        with pytest.raises(UserError, match="no task 'size'"):
            validate_config(with_init(init_stream={"path": with_init().init_stream, "tasks": ["size"]}), reporter)


def test_a_bench_can_have_it(init_data) -> None:
    from lcia.bench import bench_config

    config = bench_config("instrdialog", "lora", overrides=[f"init_stream={init_data}", "init_num_train_epochs=1"])
    assert config.init_source() == (str(init_data), None)


def test_train_is_what_the_command_calls(with_init) -> None:
    """`lcia train` and `resume` share the one place where Init is learned."""
    with Reporter() as reporter:
        results = train(with_init(tasks=["colours"]), reporter)
    assert go_on(Path(with_init().output_dir)) == results
