"""Plans against runs: bytes against torch's allocator, steps and evaluations against a ledger, disk against files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import ProfilerActivity, profile

import lcia.learning
from lcia import run
from lcia.planning import Plan, plan_run
from lcia.progress import Reporter
from tiny_vision import square_stream, tiny_llava

Config = Callable[..., Any]


def plan(config: Any, **options: Any) -> Plan:
    with Reporter() as reporter:
        return plan_run(config, reporter, **options)


def train(config: Any) -> dict[str, Any]:
    with Reporter() as reporter:
        return run.train(config, reporter)


@pytest.fixture(scope="module")
def tiny_see(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("see")
    model, stream = folder / "llava", folder / "squares"
    stream.mkdir()
    return {"model": str(tiny_llava(model)), "stream": str(square_stream(stream))}


@pytest.fixture
def config_of(tiny_config: Config, tiny_t5: Path, tiny_see: dict[str, str]) -> Config:
    """A configuration for one of three kinds of model, each step on all rows of a task."""
    own = {"llama": {}, "t5": {"model": str(tiny_t5), "max_new_tokens": 8}, "llava": tiny_see}

    def make(kind: str, **changes: Any) -> Any:
        return tiny_config(**{"per_device_train_batch_size": 16, **own[kind], **changes})

    return make


class Allocated:
    """What torch's allocator gave out, by its own profiler."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "trace.json"
        self.peak = 0  # bytes above what there was

    @contextmanager
    def watch(self) -> Iterator[None]:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            yield
        seen.export_chrome_trace(str(self._file))
        events = json.loads(self._file.read_text())["traceEvents"]
        changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]")
        total = highest = 0
        for _, size in changes:
            total += size
            highest = max(highest, total)
        self.peak = max(self.peak, highest)


@pytest.mark.parametrize(
    ("kind", "method", "changes"),
    [
        ("llama", "lcia", {}),
        (
            "llama",
            {"name": "lcia", "rule": "fisher"},
            {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 8},
        ),
        ("llama", "lwf", {"attn_implementation": "sdpa"}),
        ("t5", "ewc", {}),
        ("llava", "lcia", {"activation_checkpointing": True}),
        ("llava", "lora", {}),
    ],
)
def test_training_takes_the_bytes_that_were_planned(
    config_of: Config, kind: str, method: Any, changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(kind, method=method, tasks=["colours", "paints"], **changes)
    planned = plan(config).training
    assert planned is not None
    allocated, learn = Allocated(tmp_path), lcia.learning.learn_task

    def watched(*arguments: Any, **options: Any) -> Any:
        with allocated.watch():
            return learn(*arguments, **options)

    monkeypatch.setattr(lcia.learning, "learn_task", watched)
    train(config)
    before = planned.parts["base weights"] + planned.parts["adapters"]
    print(kind, method, allocated.peak, planned.peak - before, (planned.peak - before) / allocated.peak, planned.parts)
    assert planned.peak - before == pytest.approx(allocated.peak, rel=0.15)
