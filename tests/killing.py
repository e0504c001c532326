"""A run whose process dies, by SIGKILL, at a chosen one of the calls that write files, train or answer.

Runs in processes of a fork server that has everything imported: a new interpreter a kill would take ten times as long.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")


def advance(values: dict[str, Any], extension: str, cache: str, die_at: int, report: Any) -> None:
    """In the child: bring the run as far as it goes, or die at the `die_at`-th watched call; 0: never."""
    import torch

    from lcia.config import parse_config
    from lcia.progress import Reporter
    from lcia.run import extend, resume, train
    from lcia.run_folder import RunFolder

    os.environ["LCIA_CACHE"] = cache
    torch.set_num_threads(1)
    calls = watch(die_at)
    folder = RunFolder(values["output_dir"])
    with open(os.devnull, "w") as sink, contextlib.redirect_stderr(sink), Reporter() as reporter:
        if folder.config.is_file():
            resume(folder.path, reporter)
        else:
            train(parse_config(values, where="test"), reporter)
        if not folder.records("extended"):
            extend(folder.path, extension, None, reporter)
    report.put(calls)


def watch(die_at: int) -> list[str]:
    """Count the calls in which a kill is most likely to do harm. Files are written half before the process dies."""
    import shutil

    import safetensors.torch
    import torch
    from transformers import Trainer

    from lcia import checkpoint, evaluation, run_folder
    from lcia.adapters import pool
    from lcia.ema import average

    calls: list[str] = []

    def dying(owner: Any, name: str, file_argument: int | None = None) -> None:
        original = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            if len(calls) == die_at:
                if file_argument is not None:
                    original(*arguments, **options)
                    path = Path(arguments[file_argument])
                    os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(owner, name, call)

    for name in ("fsync", "replace", "link"):
        dying(os, name)
    dying(shutil, "rmtree")
    dying(torch, "save", file_argument=1)
    for module in (pool, run_folder, checkpoint, average, safetensors.torch):
        dying(module, "save_file", file_argument=1)
    dying(Trainer, "training_step")
    dying(evaluation, "generate_answers")
    return calls


def run_until(values: dict[str, Any], extension: str, cache: str, die_at: int) -> tuple[int, list[str]]:
    """(exit code, watched calls) of one process."""
    CONTEXT.set_forkserver_preload(["lcia.run", "lcia.training", "transformers.trainer", "peft"])
    report = CONTEXT.Queue()
    process = CONTEXT.Process(target=advance, args=(values, extension, cache, die_at, report))
    process.start()
    calls: list[str] = []
    if die_at == 0:
        calls = report.get(timeout=300)
    process.join(300)
    assert process.exitcode is not None
    return process.exitcode, calls
