"""`lcia demo`: six real tasks on a real language model, with plain LoRA and with lcia, side by side.

Two runs on one core each are done sooner than one after the other on two, because much of a step is too small to be
shared out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

from lcia.answering import Answer, answer_requests
from lcia.backbone import find_model
from lcia.bench_list import BenchRun, outstanding
from lcia.config import RunConfig
from lcia.errors import RunsFailed
from lcia.files import write_text
from lcia.jobs import carry_out, run_here, threads_each, visible_devices
from lcia.report import Run, comparison_json, comparison_table, load_run, matrix_table, write_report

METHODS = ("lora", "lcia")
BYTES_OF_A_RUN = 2 * 2**30  # docs/concepts/plan.md
# Sized to five minutes on two CPU cores; `make study-demo` runs the full size with three seeds.
SETTINGS: dict[str, Any] = {
    "stream": "assistant",
    "model": "smollm2-135m",
    "max_steps": 24,
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-4,
    "lora_r": 16,
    "max_eval_examples": 20,
    "max_new_tokens": 12,
}
REQUESTS = (
    ("do i need a visa to go to japan", "Answer with the intent of the request using a short phrase"),
    ("put this song on my rainy sunday playlist", "Extract the name of the playlist from the request"),
    ("play something by nina simone", "Extract the name of the artist from the request"),
)


@dataclass(frozen=True)
class DemoResult:
    """Two runs, their comparison, and three answers."""

    runs: list[Run]
    answers: list[Answer]
    report: Path

    def as_dict(self) -> dict[str, Any]:
        return {
            **comparison_json(self.runs),
            "answers": [answer.as_dict() for answer in self.answers],
            "report": str(self.report),
        }

    def readable(self) -> list[Any]:
        asked = []
        for answer in self.answers:
            asked += [f"> {answer.request.replace(chr(10), ' / ')}", answer]
        return [
            *(matrix_table(run) for run in self.runs),
            comparison_table(self.runs),
            "Three requests to the lcia run, each sent to a group by its instruction:",
            *asked,
            f"report: {self.report}",
        ]


def run_demo(folder: Path, console: Console) -> DemoResult:
    """Train (or go on training) both runs below `folder`, write the report, answer three requests.

    Raises:
        UserError: the model's package is missing, or a folder holds something else than the demo's run.
        RunsFailed: what they said is on the console.
    """
    demo = []
    for method in METHODS:
        config = RunConfig(**SETTINGS, method=method, output_dir=str(folder / method))
        demo.append(BenchRun(config, ("train", str(folder / f"{method}.yaml"))))
    devices = visible_devices()
    at_once = _at_once(len(devices))
    jobs = outstanding(demo, threads_each(None, len(METHODS)))
    if jobs:
        find_model(SETTINGS["model"])  # once for both
        for run in demo:
            write_text(Path(run.arguments[-1]), run.config.as_yaml())
        names = " and ".join(job.name for job in jobs)
        console.print(f"{names}, {at_once} at a time; each tells more in {folder}/METHOD/log.txt", highlight=False)
        failures = carry_out(jobs, partial(run_here, at_once=at_once, devices=devices), console)
        if failures:
            failed = " and ".join(failure.job.name for failure in failures)
            raise RunsFailed(f"{failed} failed; the same command goes on")
    runs = [load_run(run.folder) for run in demo]
    report = write_report(runs, folder / "report.html")
    answers = answer_requests(folder / "lcia", list(REQUESTS))
    return DemoResult(runs, answers, report)


def _at_once(devices: int) -> int:
    """How many of the two runs there is room for: a GPU for each, or a core and memory."""
    room = devices or min(torch.get_num_threads(), psutil.virtual_memory().available // BYTES_OF_A_RUN)
    return max(1, min(len(METHODS), room))
