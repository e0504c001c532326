"""Two processes, as a launcher starts them, give the run that one gives."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from lcia.errors import UserError
from lcia.progress import Reporter
from lcia.run import train
from lcia.session import check_sharding
from tiny_vision import square_stream, tiny_llava

Config = Callable[..., Any]
FSDP = [str(Path(__file__).with_name("fsdp_on_cpu.py"))]
DIES = [str(Path(__file__).with_name("dies_in_training.py"))]
FSDP_SETTINGS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "ACCELERATE_TORCH_DEVICE": "cpu",
}


def start(
    arguments: list[str], processes: int, program: Sequence[str] = ("-m", "lcia"), **environment: str
) -> list[subprocess.Popen[str]]:
    """`lcia ARGUMENTS` in so many processes, with the environment that torchrun and `accelerate launch` make."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **environment}
    if processes > 1:
        shared |= {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", *program, *arguments],
            env=shared | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


def launch(
    arguments: list[str], processes: int, program: Sequence[str] = ("-m", "lcia"), **environment: str
) -> list[subprocess.CompletedProcess[str]]:
    """`start`, and wait for their ends."""
    ended = []
    for process in start(arguments, processes, program, **environment):
        out, err = process.communicate(timeout=600)
        ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return ended


def config_file(tmp_path: Path, tiny_config: Config, name: str, **changes: Any) -> Path:
    limits = {"max_eval_examples": 4, "per_device_eval_batch_size": 2}
    # AdamW would make a step of its own size out of a gradient that is nothing but rounding
    plain = {"optim": "sgd", "learning_rate": 0.3}
    config = tiny_config(output_dir=str(tmp_path / name), **{**limits, **plain, **changes})
    path = tmp_path / f"{name}.yaml"
    path.write_text(config.as_yaml())
    return path


def adapters(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "pool").glob("*/adapter_model.safetensors"))
    return {f"{file.parent.name}/{key}": value for file in files for key, value in load_file(file).items()}


def predictions(folder: Path) -> dict[str, list[str]]:
    files = sorted(folder.glob("*/*.jsonl"))
    return {
        f"{file.parent.name}/{file.stem}": [json.loads(line)["prediction"] for line in file.read_text().splitlines()]
        for file in files
    }


def test_weights_spread_over_processes_learn_as_one(tiny_config: Config, tmp_path: Path) -> None:
    """FSDP2, as `accelerate launch --use_fsdp --fsdp_version 2` asks for it."""
    alone = config_file(tmp_path, tiny_config, "alone", per_device_train_batch_size=4)
    two = config_file(tmp_path, tiny_config, "two", per_device_train_batch_size=2)
    (one,) = launch(["train", str(alone), "--json"], 1)
    both = launch(["train", str(two), "--json"], 2, FSDP, **FSDP_SETTINGS)
    assert one.returncode == 0, one.stderr
    assert [process.returncode for process in both] == [0, 0], both[0].stderr + both[1].stderr
    assert "sharded weights" in both[0].stderr
    assert json.loads(both[0].stdout)["matrix"] == json.loads(one.stdout)["matrix"]
    theirs = adapters(tmp_path / "two")
    for key, value in adapters(tmp_path / "alone").items():
        assert torch.allclose(theirs[key], value, rtol=0, atol=1e-6), key


# every task goes back from its second epoch to its first: nothing is ever right
EARLY = {"max_steps": -1, "num_train_epochs": 3, "early_stopping_patience": 1, "tasks": ["colours", "paints"]}


@pytest.mark.parametrize(
    ("method", "changes"), [("lcia", {}), (["ewc", "agem"], {}), ("lwf", EARLY)], ids=["lcia", "ewc+agem", "early"]
)
def test_two_processes_learn_and_answer_as_one(method: Any, changes: Any, tiny_config: Config, tmp_path: Path) -> None:
    """Half the rows in each process are the same batch; averages, adapters and answers are those of one process."""
    alone = config_file(tmp_path, tiny_config, "alone", method=method, per_device_train_batch_size=4, **changes)
    two = config_file(tmp_path, tiny_config, "two", method=method, per_device_train_batch_size=2, **changes)
    (one,) = launch(["train", str(alone), "--json"], 1)
    # nothing that one process has answered may pass for the answers of two
    both = launch(["train", str(two), "--json"], 2, LCIA_CACHE=str(tmp_path / "cache"))
    assert one.returncode == 0, one.stderr
    assert [process.returncode for process in both] == [0, 0], both[0].stderr + both[1].stderr
    assert both[1].stdout == ""  # one of them speaks
    expected, found = json.loads(one.stdout), json.loads(both[0].stdout)
    assert found["matrix"] == expected["matrix"]
    assert found["cost"].get("extra_forward_rows") == expected["cost"].get("extra_forward_rows")
    theirs = adapters(tmp_path / "two")
    for key, value in adapters(tmp_path / "alone").items():
        assert torch.allclose(theirs[key], value, rtol=0, atol=1e-6), key
    # what two have answered, one answers from the same weights, word for word
    (again,) = launch(["eval", str(tmp_path / "two"), "--all-rows", "--recompute"], 1)
    assert again.returncode == 0, again.stderr
    shared = predictions(tmp_path / "two" / "predictions")
    assert shared == predictions(tmp_path / "two" / "evaluations" / "test-all-rows")
    if method == "lcia":  # the others learn one answer to everything
        assert len({answer for answers in shared.values() for answer in answers}) > 1


def test_two_processes_that_were_killed_go_on_exactly(tiny_config: Config, tmp_path: Path) -> None:
    several = {"per_device_train_batch_size": 2, "max_steps": 12, "save_steps": 1, "tasks": ["colours", "paints"]}
    whole = config_file(tmp_path, tiny_config, "whole", **several)
    killed = config_file(tmp_path, tiny_config, "killed", **several)
    assert [process.returncode for process in launch(["train", str(whole)], 2)] == [0, 0]
    both = launch(["train", str(killed)], 2, DIES, DIES_AT="18")  # the sixth step of the second task
    # the one that is still writing a checkpoint may see the other go instead
    assert -signal.SIGKILL in [process.returncode for process in both]
    assert 0 not in [process.returncode for process in both]
    history = tmp_path / "killed" / "history"
    assert (history / "colours").is_dir()
    assert not (history / "paints").exists()
    again = launch(["resume", str(tmp_path / "killed")], 2)
    assert [process.returncode for process in again] == [0, 0], again[0].stderr + again[1].stderr
    assert "paints: going on behind step" in again[0].stderr
    expected = adapters(tmp_path / "whole")
    found = adapters(tmp_path / "killed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_one_process_takes_one_of_several_gpus(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Trainer would deal the rows of a batch out to all it sees."""

    class Two(TrainingArguments):
        @cached_property
        def _setup_devices(self) -> torch.device:
            found: torch.device = TrainingArguments.__dict__["_setup_devices"].func(self)
            self._n_gpu = 2
            return found

    class DealtOut(torch.nn.DataParallel):
        def __init__(self, *_: Any, **__: Any) -> None:
            raise AssertionError("the model was put into DataParallel")

    monkeypatch.setattr("lcia.training.TrainingArguments", Two)
    monkeypatch.setattr("torch.nn.DataParallel", DealtOut)
    with Reporter() as reporter:
        train(tiny_config(method="lora"), reporter)


def test_an_error_is_told_once_and_ends_all(tmp_path: Path) -> None:
    both = launch(["resume", str(tmp_path)], 2)
    assert [process.returncode for process in both] == [2, 2]
    assert "not a run folder" in both[0].stderr
    assert "not a run folder" not in both[1].stderr


def test_sharding_that_cannot_work_is_refused(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcia.session.is_sharding", lambda: True)
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(UserError, match="fsdp_version: 2"):
        check_sharding(tiny_config())
    monkeypatch.setenv("FSDP_VERSION", "2")
    for method in ("lora", "lcia", "stable_ema", "multi_task", ["lcia", "replay"]):
        check_sharding(tiny_config(method=method))
    for method in ("ewc", ["lcia", "agem"], "moelora"):
        with pytest.raises(UserError, match="train it with DDP"):
            check_sharding(tiny_config(method=method))
    config = tiny_config()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="DeepSpeed"):
        check_sharding(config)


def test_sharding_that_accelerate_ignores_is_an_error(tiny_config: Config, tmp_path: Path) -> None:
    """On a CPU accelerate would train under DDP instead, and say nothing."""
    config = config_file(tmp_path, tiny_config, "two")
    both = launch(["train", str(config)], 2, ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    assert [process.returncode for process in both] == [2, 2], both[0].stderr + both[1].stderr
    assert "does not shard on this kind of device" in both[0].stderr


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_the_callback_in_two_processes_is_that_of_one(kind: str, tmp_path: Path) -> None:
    """In a plain Trainer: accumulation, clipping that fisher looks behind, evaluations and checkpoints."""
    script = [str(Path(__file__).with_name("callback_in_processes.py"))]
    sharding = {} if kind == "ddp" else {**FSDP_SETTINGS, "FSDP_TRANSFORMER_CLS_TO_WRAP": "Linear"}
    (one,) = launch([str(tmp_path / "one"), "4"], 1, script)
    both = launch([str(tmp_path / "two"), "2"], 2, script, **sharding)
    assert one.returncode == 0, one.stderr
    assert [process.returncode for process in both] == [0, 0], both[0].stderr + both[1].stderr
    alone, together = (load_file(tmp_path / run / "found.safetensors") for run in ("one", "two"))
    assert alone.keys() == together.keys()
    for key, value in alone.items():
        is_average = not key.startswith("importance/")  # which is no number near one
        assert torch.allclose(together[key], value, rtol=0 if is_average else 1e-5, atol=1e-6), key
    kept = [load_file(tmp_path / run / "checkpoint-3" / "ema.safetensors") for run in ("one", "two")]
    averages = [key for key in kept[0] if key.startswith("average/")]
    assert averages
    assert all(torch.allclose(kept[0][key], kept[1][key], rtol=0, atol=1e-6) for key in averages)
    assert any(not torch.equal(alone[f"average/{name}"], kept[0][f"average/{name}"]) for name in ("body.0.weight",))


@pytest.mark.parametrize(
    ("method", "changes", "sharding"),
    [
        ("lcia", {}, {}),
        ("lcia", {"tasks": ["colours", "paints"]}, {"program": FSDP, **FSDP_SETTINGS}),  # all rows have images
        ("ewc", {}, {}),
        ("eproj", {}, {}),
        ({"name": "moelora", "experts": 2}, {"activation_checkpointing": True}, {}),
    ],
    ids=["lcia", "lcia in shards", "ewc", "eproj", "moelora checkpointed"],
)
def test_two_processes_learn_what_is_shown_as_one(
    method: Any, changes: Any, sharding: Any, tiny_config: Config, tmp_path: Path
) -> None:
    """One row a process and micro-batch: where it has no image, the projector has no part in that forward pass."""
    (tmp_path / "rows").mkdir()
    own = {"model": str(tiny_llava(tmp_path)), "stream": str(square_stream(tmp_path / "rows")), "max_steps": 4}
    common = {**own, "tasks": ["colours", "tints"], "method": method, "projector_learning_rate": 0.1, **changes}
    alone = config_file(tmp_path, tiny_config, "alone", per_device_train_batch_size=2, **common)
    two = config_file(tmp_path, tiny_config, "two", per_device_train_batch_size=1, **common)
    (one,) = launch(["train", str(alone), "--json"], 1)
    both = launch(["train", str(two), "--json"], 2, **sharding)
    assert one.returncode == 0, one.stderr
    assert [process.returncode for process in both] == [0, 0], both[0].stderr + both[1].stderr
    assert json.loads(both[0].stdout)["matrix"] == json.loads(one.stdout)["matrix"]
    theirs = adapters(tmp_path / "two")
    for key, value in adapters(tmp_path / "alone").items():
        assert torch.allclose(theirs[key], value, atol=1e-5), key


def test_rows_with_and_without_images_are_not_sharded(tiny_config: Config, tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    own = {"model": str(tiny_llava(tmp_path)), "stream": str(square_stream(tmp_path / "rows")), "tasks": ["tints"]}
    path = config_file(tmp_path, tiny_config, "mixed", **own)
    both = launch(["train", str(path)], 2, FSDP, **FSDP_SETTINGS)
    assert [process.returncode for process in both] == [2, 2], both[0].stderr + both[1].stderr
    assert "task 'tints': 6 of 12 rows have images, and under FSDP2 all of them must, or none" in both[0].stderr
    assert not (tmp_path / "mixed").exists()
