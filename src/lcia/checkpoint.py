"""Checkpoints inside a task: a killed task goes on with the step after its last checkpoint, exactly.

state/checkpoint-N/
  trained.safetensors   θ, the raw weights after step N
  ema.safetensors, ...  what the method needs (Method.save_progress)
  optimizer.pt, scheduler.pt, rng_state.pth, trainer_state.json   transformers.Trainer's own
  complete.json         written last: without it, the folder is a part of a checkpoint and counts as nothing
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lcia.errors import UserError
from lcia.files import file_sha256, sync_folder, write_text
from lcia.processes import count, on_main

_MARK = "complete.json"
_WEIGHTS = "trained.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A whole one."""

    folder: Path
    step: int
    seconds: float  # of training before it
    log: list[dict[str, Any]]  # one record per step before it


def find_checkpoint(state: Path, task: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of `task` below `state`, or what is wrong with those that there are.

    A damaged checkpoint costs time, not correctness: the task then starts again.

    Raises:
        UserError: another number of processes wrote one.
    """
    whole: dict[int, Checkpoint] = {}
    needed: set[int] = set()  # the best epochs, to which the task may go back
    damaged = []
    for mark in state.glob(f"checkpoint-*/{_MARK}"):
        facts = json.loads(mark.read_text(encoding="utf-8"))
        if facts["task"] != task:
            continue
        _check_processes(mark.parent, facts)
        wrong = _altered(mark.parent, facts)
        if wrong:
            damaged.append(f"{mark.parent}: {', '.join(wrong)} is missing or was altered; the checkpoint is not used")
            continue
        whole[facts["step"]] = Checkpoint(mark.parent, facts["step"], facts["seconds"], facts["log"])
        if facts.get("best") is not None:
            needed.add(facts["best"])
    lost = [] if damaged else [f"{state}/checkpoint-{step}: missing" for step in sorted(needed - whole.keys())]
    if not whole or damaged or lost:
        return None, [*damaged, *lost]
    return whole[max(whole)], []


def check_processes(state: Path, learned: Collection[str]) -> None:
    """Whether as many processes as wrote the checkpoints below `state` can go on, but for those of tasks `learned`.

    Raises:
        UserError: they are not as many: the batches behind a checkpoint would be others.
    """
    for mark in state.glob(f"checkpoint-*/{_MARK}"):
        facts = json.loads(mark.read_text(encoding="utf-8"))
        if facts["task"] not in learned:
            _check_processes(mark.parent, facts)


def _check_processes(folder: Path, facts: Mapping[str, Any]) -> None:
    then, now = facts.get("processes", count()), count()  # marks of older versions do not tell
    if then != now:
        raise UserError(
            f"{folder}: was written by {then} processes, and here are {now}: the rest of {facts['task']!r} would have "
            f"other batches. Launch {then}, or remove {folder.parent}: then the task starts again"
        )


def checkpoint_at(state: Path, step: int) -> Checkpoint:
    """The one after this step of the task that is being learned.

    Raises:
        UserError: it is not whole.
    """
    folder = state / f"checkpoint-{step}"
    mark = folder / _MARK
    facts: dict[str, Any] = json.loads(mark.read_text(encoding="utf-8")) if mark.is_file() else {}
    wrong = _altered(folder, facts) if facts else [_MARK]
    if wrong:
        raise UserError(
            f"{folder}: {', '.join(wrong)} is missing or was altered, and the task's best weights were there; "
            "`lcia resume` learns the task again"
        )
    return Checkpoint(folder, facts["step"], facts["seconds"], facts["log"])


def _altered(folder: Path, facts: Mapping[str, Any]) -> list[str]:
    """The files that are not as they were written."""
    return [
        name
        for name, digest in facts["files"].items()
        if not (folder / name).is_file() or file_sha256(folder / name) != digest
    ]


def mark_complete(
    folder: Path, task: str, step: int, seconds: float, log: list[dict[str, Any]], best: int | None = None
) -> None:
    """Everything is written: make it durable, say so, and remove the checkpoints before it but that of step `best`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / _MARK)
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
    hashes = {str(path.relative_to(folder)): file_sha256(path) for path in files}
    facts = {"task": task, "step": step, "best": best, "seconds": seconds, "processes": count()}
    facts |= {"log": log, "files": hashes}
    # Not `write_json`: a loss, or a gradient's norm, may not be finite. Training goes on and tells at its end.
    write_text(folder / _MARK, json.dumps(facts) + "\n")
    sync_folder(folder.parent)
    for other in folder.parent.glob("checkpoint-*"):
        if other not in (folder, folder.with_name(f"checkpoint-{best}")):
            _remove(other)


@on_main
def clear_checkpoints(state: Path) -> None:
    """The task is finished and kept elsewhere."""
    for folder in state.glob("checkpoint-*"):
        _remove(folder)


def _remove(folder: Path) -> None:
    (folder / _MARK).unlink(missing_ok=True)  # first: a half-removed checkpoint must not count
    shutil.rmtree(folder)


def save_trained(folder: Path, trained: Mapping[str, torch.Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().contiguous() for name, value in trained.items()}, folder / _WEIGHTS)


@torch.no_grad()
def load_trained(folder: Path, trained: Mapping[str, torch.nn.Parameter]) -> None:
    for name, value in load_file(folder / _WEIGHTS).items():
        trained[name].copy_(value)
