"""The command: each mistake of a user ends with exit code 2 and one message, before any training."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from lcia import machine, training
from lcia.backbone import resolve_paths

GOOD_ROW = {"input": "a", "instruction": "say", "output": "b"}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def refused(lcia: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The message of a command that must end with exit code 2 without training."""

    def check(*arguments: object) -> str:
        def no_training(*args: object, **kwargs: object) -> None:
            raise AssertionError("training began")

        monkeypatch.setattr(training.TaskTrainer, "train", no_training)
        code, out, err = lcia(*arguments)
        assert code == 2, err
        assert out == ""
        messages = [line for line in err.splitlines() if line.startswith("lcia: ")]
        assert len(messages) == 1, err
        return messages[0]

    return check


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a configuration file whose stream is a folder with the given files."""

    def write(files: dict[str, str] | None = None, **changes: object) -> Path:
        data = tmp_path / "data"
        data.mkdir(exist_ok=True)
        for name, text in (files or {"task.jsonl": rows(12)}).items():
            (data / name).write_text(text)
        values = {
            "stream": str(data),
            "model": str(tiny_model),
            "method": "lcia",
            "output_dir": str(tmp_path / "out"),
            "dtype": "float32",
            "max_steps": 1,
            "max_new_tokens": 2,
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({**values, **changes}))
        return path

    return write


def rows(count: int, **changes: object) -> str:
    return "".join(json.dumps({**GOOD_ROW, "input": f"a{i}", **changes}) + "\n" for i in range(count))


def test_an_empty_file(refused, config) -> None:
    message = refused("train", config({"task.jsonl": ""}))
    assert "task.jsonl" in message
    assert "empty" in message


def test_broken_json_on_line_3(refused, config) -> None:
    message = refused("train", config({"task.jsonl": rows(2) + '{"input": "a",\n' + rows(3)}))
    assert "task.jsonl" in message
    assert "3" in message


def test_a_row_without_output(refused, config) -> None:
    message = refused("train", config({"task.jsonl": rows(4) + json.dumps({"input": "a", "instruction": "b"}) + "\n"}))
    assert "task.jsonl" in message
    assert "5" in message
    assert "output" in message


def test_an_image_row_for_a_text_model(refused, config, tmp_path) -> None:
    from PIL import Image

    path = config({"task.jsonl": rows(8) + rows(1, image="photo.png", input="what")})
    Image.new("RGB", (4, 4)).save(tmp_path / "data" / "photo.png")
    message = refused("train", path)
    assert "task.jsonl" in message
    assert "image" in message


def test_an_unknown_key_names_the_nearest(refused, config) -> None:
    message = refused("train", config(lerning_rate=1e-3))
    assert "config.yaml" in message
    assert "'lerning_rate'" in message
    assert "'learning_rate'" in message


def test_a_wrong_type_names_the_key(refused, config) -> None:
    assert "'max_length'" in refused("train", config(max_length="long"))


def test_an_unknown_method_names_the_nearest(refused, config) -> None:
    message = refused("train", config(method="lcai"))
    assert "'lcai'" in message
    assert "'lcia'" in message


def test_an_unknown_option_of_a_method_names_the_nearest(refused, config) -> None:
    message = refused("train", config(method={"name": "lcia", "treshold": 0.5}))
    assert "'treshold'" in message
    assert "'threshold'" in message


@pytest.mark.parametrize(
    "option",
    [
        {"rule": "eq46"},
        {"retained": 1.5},
        {"threshold": "high"},
        {"start": "first"},
        {"route_threshold": "5e-1"},
    ],
)
def test_a_refused_value_of_a_method(refused, config, option) -> None:
    assert "method" in refused("train", config(method={"name": "lcia", **option}))


@pytest.mark.parametrize(
    "change",
    [
        {"lr_scheduler_type": "linea"},
        {"optim": "adamx"},
        {"adam_epsilon": "small"},
        {"lora_target_modules": ["foo"]},
        {"lora_target_modules": "*_proj"},  # a glob, where a regular expression is meant
        {"optim": "schedule_free_adamw"},
        {"attn_implementation": "flash_attention_2"},  # whose package is not there
        {"enable_jit_checkpoint": True},
        {"label_smoothing_factor": 0.1},
    ],
)
def test_a_value_that_training_would_refuse_later(refused, config, change, tmp_path) -> None:
    assert next(iter(change)) in refused("train", config(**change))
    assert not (tmp_path / "out").exists()


def test_a_row_that_the_template_refuses_is_named_before_training(refused, config, tiny_model, tmp_path) -> None:
    """As Gemma's refuses system messages; here in the last of the rows."""
    model = shutil.copytree(tiny_model, tmp_path / "strict")
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    template = model / "chat_template.jinja"
    template.write_text(strict + template.read_text())
    talk = [{"role": role, "content": "abc"} for role in ("system", "user", "assistant")]
    last = json.dumps({"messages": talk, "split": "train"}) + "\n"
    splits = "".join(rows(4, split=split) for split in ("train", "dev", "test"))
    message = refused("train", config({"one.jsonl": rows(12), "two.jsonl": splits + last}, model=str(model)))
    assert "two.jsonl:13" in message
    assert "no system messages" in message
    assert not (tmp_path / "out").exists()


def test_requests_without_room_for_an_answer(lcia, refused, config, tmp_path) -> None:
    assert "none of the test requests" in refused("train", config(max_length=64, max_new_tokens=60))
    splits = rows(6, split="train") + rows(1, split="test", input="long" * 10) + rows(1, split="test")
    code, out, _ = lcia("validate", config({"task.jsonl": splits}, max_length=64, max_new_tokens=20))
    assert code == 0
    assert "1 of 2 test requests" in " ".join(out.split())


def test_a_gguf_file_that_nobody_can_read(refused, config, tmp_path) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF" + bytes(40))
    assert "cut.gguf" in refused("train", config(model=str(tmp_path / "cut.gguf")))


def test_a_launcher_with_mixed_precision(refused, config, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert "mixed_precision: no" in refused("train", config())


def test_numbers_that_yaml_reads_as_text_are_numbers(config) -> None:
    from lcia.config import load_config

    assert load_config(config(adam_epsilon="1e-6")).training_arguments()["adam_epsilon"] == 1e-6


def test_ctrl_c_says_how_to_go_on(lcia, config, monkeypatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training.TaskTrainer, "train", interrupted)
    code, _, err = lcia("train", config())
    assert code == 130
    assert "lcia resume" in err


def test_two_tasks_of_one_name(refused, config, tmp_path) -> None:
    path = config()
    task = {"name": "twin", "path": str(tmp_path / "data" / "task.jsonl")}
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**values, "stream": [task, task]}))
    assert "'twin'" in refused("train", path)


def test_a_model_folder_without_weights(refused, config, tmp_path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    message = refused("train", config(model=str(tmp_path / "model")))
    assert "no weights" in message


def test_an_output_folder_that_holds_another_run(refused, config, tmp_path) -> None:
    path = config()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text("stream: x\n")
    message = refused("train", path)
    assert "another run" in message
    assert "out" in message


def test_a_test_split_that_is_empty(refused, config) -> None:
    message = refused("train", config({"task.jsonl": rows(6, split="train")}))
    assert "task.jsonl" in message
    assert "test" in message


def test_a_missing_configuration_and_bad_overrides(refused, config, tmp_path) -> None:
    assert "none.yaml" in refused("train", tmp_path / "none.yaml")
    assert "'seed'" in refused("train", config(), "seed")
    assert "'seed'" in refused("train", config(), "seed=many")


def test_an_argument_the_run_owns_is_refused(refused, config) -> None:
    assert "'save_strategy'" in refused("train", config(save_strategy="steps"))


@pytest.mark.parametrize("verb", ["report", "compare", "resume", "generate"])
def test_a_folder_that_is_no_run(refused, tmp_path, verb) -> None:
    arguments = [tmp_path, "hello"] if verb == "generate" else [tmp_path]
    assert str(tmp_path) in refused(verb, *arguments)


def test_what_is_no_run_is_left_out_and_told_by_name(lcia, tmp_path) -> None:
    from report_runs import make_run

    run, file = make_run(tmp_path / "run", "lora"), tmp_path / "notes [1].txt"
    file.write_text("")
    for verb in ("compare", "report"):
        code, out, _ = lcia(verb, run, file)
        assert code == 0
        assert f"{file}: a file\n" in out  # whole, however long, and no markup
        code, out, _ = lcia(verb, run, file, "--json")
        assert code == 0
        assert json.loads(out)["runs_left_out"] == [{"path": str(file), "why": "a file"}]
    assert lcia("compare", file)[0] == 2


def test_compare_writes_a_page_beside_the_runs(lcia, tmp_path, monkeypatch) -> None:
    from report_runs import make_run

    runs = [make_run(tmp_path / "runs" / method, method, ("a", "b")) for method in ("lora", "lcia")]
    (tmp_path / "elsewhere").mkdir()
    elsewhere = make_run(tmp_path / "elsewhere" / "ewc", "ewc", ("a", "b"))
    monkeypatch.chdir(tmp_path)
    code, out, _ = lcia("compare", *runs)
    assert code == 0
    assert "Avg.ACC" in out
    assert "report: runs/comparison.html" in out
    first = (tmp_path / "runs" / "comparison.html").read_text()
    assert "lora" in first

    code, out, _ = lcia("compare", *sorted((tmp_path / "runs").iterdir()), "--json")  # as `runs/*` gives it now
    assert code == 0
    document = json.loads(out)
    assert (document["report"], document["runs_compared"]) == ("runs/comparison.html", 2)
    assert document["runs_left_out"] == []  # the page and its figures are its own

    code, out, _ = lcia("compare", *runs, elsewhere)  # no folder holds them all
    assert code == 0
    assert "report: comparison.html" in out
    assert (tmp_path / "comparison.html").is_file()

    code, out, _ = lcia("compare", *runs, "--out", tmp_path / "elsewhere" / "mine.html", "--json")
    assert code == 0
    assert json.loads(out)["report"] == str(tmp_path / "elsewhere" / "mine.html")

    (tmp_path / "comparison.html").unlink()
    monkeypatch.setattr("os.access", lambda folder, mode: Path(folder) != tmp_path / "runs")
    code, out, _ = lcia("compare", *runs)
    assert code == 0
    assert "report: comparison.html" in out
    assert (tmp_path / "comparison.html").is_file()


def test_bad_usage_exits_with_2(lcia) -> None:
    assert lcia("trian")[0] == 2
    assert lcia("train")[0] == 2


def test_the_way_from_validate_to_generate(lcia, config, tmp_path) -> None:
    path = config({"one.jsonl": rows(12), "two.jsonl": rows(12, instruction="Spell it backwards")})
    code, out, _ = lcia("validate", path, "--json")
    assert code == 0
    assert [task["name"] for task in json.loads(out)["tasks"]] == ["one", "two"]
    code, out, err = lcia("train", path, "--json")
    assert code == 0, err
    assert json.loads(out)["tasks"] == ["one", "two"]
    run = tmp_path / "out"
    assert (run / "report.html").is_file()
    for arguments in (
        ["resume", run],
        ["report", run],
        ["compare", run, run],
        ["compare", run, path, tmp_path / "data"],  # as `runs/*` may give it
        ["route", run, "Spell it backwards"],
    ):
        code, out, err = lcia(*arguments, "--json")
        assert code == 0, err
        json.loads(out)
    code, out, _ = lcia("generate", run, "abc", "--instruction", "Spell it backwards", "--json")
    assert code == 0
    assert json.loads(out)["group"] == "two"
    assert lcia("route", path, "--task", tmp_path / "data" / "two.jsonl", "--json")[0] == 0
    code, _, err = lcia("route", path, "--task", tmp_path / "data")
    assert code == 2
    assert "2 tasks (one, two); give the file of one" in err
    code, out, _ = lcia("generate", run, "abc", "--system", "Spell it backwards", "--json")
    assert code == 0
    assert json.loads(out)["group"] == "two"
    assert lcia("validate", tmp_path / "data")[0] == 0
    for arguments, message in [
        ((tmp_path / "data", "max_length=9"), "'max_length=9' belongs to a configuration"),
        ((path, "--model", "x"), "--model is for a folder of data"),
    ]:
        code, _, err = lcia("validate", *arguments)
        assert code == 2
        assert message in err


def test_the_months_after_training(lcia, config, tmp_path) -> None:
    path = config({"one.jsonl": rows(12), "two.jsonl": rows(12, instruction="Spell it backwards")})
    assert lcia("train", path)[0] == 0
    run, later = tmp_path / "out", tmp_path / "three.jsonl"
    later.write_text(rows(12, instruction="Count the letters"))
    code, out, err = lcia("extend", run, later, "--max-forgetting", "-1", "--json")
    assert code == 3
    assert json.loads(out)["tasks"] == ["one", "two", "three"]  # learned, measured and written all the same
    assert "forgetting over the budget of -1 points" in err
    assert "one 0.0" in err
    assert lcia("resume", run, "--max-forgetting", "0", "--per-task")[0] == 0
    code, out, _ = lcia("eval", run, "--split", "dev", "--json")
    assert code == 0
    assert set(json.loads(out)["rows"][-1]["scores"]) == {"one", "two", "three"}
    assert lcia("eval", run)[0] == 0
    code, out, _ = lcia("groups", run, "rename", "three", "counting", "--reason", "it says more", "--json")
    assert code == 0
    assert json.loads(out)["groups"]["three"] == "counting"
    code, out, _ = lcia("rollback", run, "--to", "two", "--json")
    assert code == 0
    assert json.loads(out)["tasks"] == ["one", "two"]
    code, out, err = lcia("rollback", run, "--to", "tow", "--json")
    assert (code, out) == (2, "")
    assert "one, two" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["extend", "RUN", "nowhere.jsonl"], "nowhere.jsonl"),
        (["eval", "RUN", "--split", "tset"], "test or dev"),
        (["eval", "RUN", "--tasks", "birds"], "no task 'birds'"),
        (["extend", "RUN", "x", "--per-task"], "--max-forgetting"),
        (["report", "RUN", "--out", "FILE/report.html"], "give --out"),
        (["groups", "RUN", "renam", "task", "x", "--reason", "y"], "Did you mean 'rename'"),
    ],
)
def test_mistakes_after_training(lcia, refused, config, tmp_path, arguments, message) -> None:
    file = config()
    assert lcia("train", file)[0] == 0
    places = {"RUN": tmp_path / "out", "FILE/report.html": file / "report.html"}
    assert message in refused(*(places.get(word, word) for word in arguments))


def test_doctor(lcia, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("LCIA_CACHE", str(tmp_path))
    for name in machine.KERNELS_KEPT:
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "answers").mkdir()
    (tmp_path / "answers" / "one.json").write_text("[]")
    code, out, _ = lcia("doctor", "--json")
    assert code == 0
    facts = json.loads(out)["facts"]
    paths = resolve_paths("auto", "auto", torch.device("cpu"))
    assert facts["dtype"].startswith(paths["dtype"])
    assert facts["attention"].startswith(paths["attn_implementation"] + ": ")
    assert "saves 5% of the tokens" in facts["batches"]
    assert "leaves the batch" in facts["prompts"]
    assert "1 lists kept" in facts["answers"]
    assert ("leaves gaps" in facts["freed memory"]) == machine.has_glibc()  # this process is not the command's
    assert facts["kernels"] == "oneDNN keeps the last 64"
    monkeypatch.delenv(machine.KERNELS_KEPT[0])
    monkeypatch.setenv(machine.KERNELS_KEPT[1], "7")  # the user's own
    assert "oneDNN keeps the last 7" in lcia("doctor", "--json")[1]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    words = [sys.executable, "-m", "lcia", *arguments]
    return subprocess.run(words, env={**kept, **environment}, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not machine.has_glibc(), reason="glibc's allocator")
def test_the_command_starts_without_small_caches() -> None:
    done = command("doctor", "--json")
    assert done.returncode == 0
    assert "small pieces are off" in json.loads(done.stdout)["facts"]["freed memory"]
    others = command("doctor", "--json", GLIBC_TUNABLES="glibc.malloc.perturb=0")  # it keeps what a user has set
    assert "small pieces are off" in json.loads(others.stdout)["facts"]["freed memory"]
    own = command("doctor", "--json", GLIBC_TUNABLES="glibc.malloc.tcache_count=3")
    assert "leaves gaps" in json.loads(own.stdout)["facts"]["freed memory"]
    wrong = command("train", "no such file")
    assert (wrong.returncode, wrong.stdout) == (2, "")  # arguments arrive as they were, and so does the exit code
    assert "no such file" in wrong.stderr


def test_doctor_tells_another_machines_paths(monkeypatch) -> None:
    from lcia.doctor import examine

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = examine().facts
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr("lcia.doctor.has_glibc", lambda: False)
    there = examine()
    assert there.facts["device"] == "a GPU"
    assert here["attention"].startswith("eager: fused attention's bfloat16 backward pass is slow")
    assert there.facts["attention"] == "sdpa: fused"
    assert "C library" in there.facts["freed memory"]
    assert not any("bfloat16 instructions" in warning for warning in there.warnings)  # of a CPU only
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert any("bfloat16 instructions" in warning for warning in examine().warnings)


def test_help_does_not_wait_for_torch() -> None:
    import subprocess

    script = "import sys, lcia.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
