"""`lcia demo`: six real tasks on a real language model, with plain LoRA and with lcia, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcia.answering import Answer, answer_requests
from lcia.config import RunConfig
from lcia.errors import UserError
from lcia.progress import Reporter
from lcia.report import Run, comparison_json, comparison_table, load_run, matrix_table, write_report
from lcia.run import resume, train

METHODS = ("lora", "lcia")
# Sized to six minutes on two CPU cores; `make study-demo` runs the full size with three seeds.
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
            asked += [f"[dim]>[/dim] {answer.request.replace(chr(10), ' / ')}", answer]
        return [
            *(matrix_table(run) for run in self.runs),
            comparison_table(self.runs),
            "Three requests to the lcia run, each sent to a group by its instruction:",
            *asked,
            f"report: {self.report}",
        ]


def run_demo(folder: Path) -> DemoResult:
    """Train (or go on training) both runs below `folder`, write the report, answer three requests."""
    for method in METHODS:
        config = RunConfig(**SETTINGS, method=method, output_dir=str(folder / method))
        with Reporter() as reporter:
            if (folder / method / "config.yaml").is_file():
                _require_same(folder / method, config)
                resume(folder / method, reporter)
            else:
                train(config, reporter)
    runs = [load_run(folder / method) for method in METHODS]
    report = write_report(runs, folder / "report.html")
    answers = answer_requests(folder / "lcia", list(REQUESTS))
    return DemoResult(runs, answers, report)


def _require_same(folder: Path, config: RunConfig) -> None:
    """A finished demo of other settings must not pass for this one."""
    if (folder / "config.yaml").read_text(encoding="utf-8") != config.as_yaml():
        raise UserError(f"{folder} holds a demo with other settings; remove it or give another --output-dir")
