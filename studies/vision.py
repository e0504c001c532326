"""The vision stream on lite-llava: the methods of the paper's Table 1, in small.

    lcia backbone build lite-llava
    make study-vision          # LCIA_DATA is the folder in which vision_stream/ lies

Four tasks, 30 steps of 8 rows each, 40 test rows; lora, lcia, replay and multi_task with three seeds, the others with
one; each task also learned alone, against its most frequent answer and the model before: about two hours of CPU.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from study import ROOT, mean_and_spread, paired_p, run_all

from lcia.config import parse_config
from lcia.files import write_text
from lcia.session import load_run_stream
from lcia.stream import SCORERS

STUDY = "vision"
SEEDS = (0, 1, 2)
TASKS = ["eurosat_mcq", "clothing_cls", "coco_vqa", "bccd_ground"]
COMMON: dict[str, Any] = {
    "stream": "vision",
    "model": "lite-llava",
    "max_steps": 30,
    "per_device_train_batch_size": 8,
    "learning_rate": 5e-4,
    "lora_r": 16,
    "max_eval_examples": 40,
    "max_new_tokens": 24,
}
THREE_SEEDS = ("lora", "lcia", "replay", "multi_task")
ONE_SEED = ("stable_ema", "llaca", "ewc", "eproj", "continual_llava", "moelora")


def stream_runs(methods: Sequence[str], seeds: Sequence[int]) -> dict[str, dict[str, Any]]:
    return {
        f"{method}-seed{seed}": {**COMMON, "tasks": TASKS, "seed": seed, "method": method}
        for seed in seeds
        for method in methods
    }


def single_runs() -> dict[str, dict[str, Any]]:
    return {f"alone-{task}": {**COMMON, "tasks": [task], "seed": 0, "method": "lora"} for task in TASKS}


def most_frequent() -> dict[str, tuple[str, float]]:
    """{task: (the answer that training rows have most often, its score on the test rows of the study)}."""
    config = parse_config({**COMMON, "tasks": TASKS, "output_dir": "none"}, where="study")
    found = {}
    for task in load_run_stream(config):
        answer = Counter(row.outputs[0] for row in task.train).most_common(1)[0][0]
        scores = [SCORERS[task.scorer](answer, row.outputs) for row in task.test]
        found[task.name] = (answer, 100 * sum(scores) / len(scores))
    return found


def matrix(run: Mapping[str, Any]) -> list[str]:
    rows = ["before", *(f"after {task}" for task in run["tasks"])]
    lines = [f"| | {' | '.join(run['tasks'])} |", "|---" * (len(run["tasks"]) + 1) + "|"]
    for name, cells in zip(rows, run["matrix"], strict=True):
        lines.append(f"| {name} | {' | '.join('' if cell is None else f'{cell:.1f}' for cell in cells)} |")
    return lines


def write_tables(found: Mapping[str, Any], baselines: Mapping[str, tuple[str, float]]) -> None:
    def of(method: str) -> list[Any]:
        return [found[f"{method}-seed{seed}"] for seed in (SEEDS if method in THREE_SEEDS else SEEDS[:1])]

    def row(method: str) -> str:
        runs = of(method)
        cells = [mean_and_spread([run["metrics"][key] for run in runs]) for key in ("avg_acc", "forgetting", "new_acc")]
        against = "one seed"
        if method == "lora":
            against = "–"
        elif method in THREE_SEEDS:
            against = paired_p(*([run["metrics"]["avg_acc"] for run in of(name)] for name in (method, "lora")))
        return f"| `{method}` | {' | '.join(cells)} | {against} |"

    any_run = found["lora-seed0"]
    before = dict(zip(any_run["tasks"], any_run["matrix"][0], strict=True))
    alone = {task: found[f"alone-{task}"]["matrix"][-1][0] for task in TASKS}
    names = sorted(
        [*THREE_SEEDS, *ONE_SEED], key=lambda m: -sum(run["metrics"]["avg_acc"] for run in of(m)) / len(of(m))
    )
    dates = sorted(run["date"] for run in found.values())
    lines = [
        "# The vision stream on lite-llava",
        "",
        f"Command: `make study-vision`. Four tasks in order, {COMMON['max_steps']} steps of"
        f" {COMMON['per_device_train_batch_size']} rows a task, learning rate {COMMON['learning_rate']:g}",
        f"(projector too), r = {COMMON['lora_r']}, {COMMON['max_eval_examples']} test rows a task, all methods with"
        " their defaults:",
        "nothing was tuned here. Two runs at a time, one thread each.",
        f"Dates {dates[0][:10]} to {dates[-1][:10]}; versions: "
        + ", ".join(f"{name} {number}" for name, number in any_run["versions"].items())
        + ".",
        "",
        "## Can each task be learned at all?",
        "",
        "| task | most frequent answer | its score | before | learned alone |",
        "|---|---|---|---|---|",
        *(
            f"| {task} | {baselines[task][0]} | {baselines[task][1]:.1f} | {before[task]:.1f} | {alone[task]:.1f} |"
            for task in TASKS
        ),
        "",
        "`before`: lite-llava with its projector aligned, and no task learned (row 0). Scores of grounding: share of",
        "boxes with IoU > 0.5.",
        "",
        "## One after another",
        "",
        f"Mean ± sample standard deviation over seeds {', '.join(map(str, SEEDS))}, or one seed; percent. `against",
        "lora`: difference of Avg.ACC, p of the paired t test over seeds.",
        "",
        "| method | Avg.ACC | Forgetting | New.ACC | against lora |",
        "|---|---|---|---|---|",
        *map(row, names),
        "",
        "## Matrices of seed 0",
    ]
    for method in ("lora", "lcia", "replay"):
        lines += ["", f"`{method}`", "", *matrix(found[f"{method}-seed0"])]
    write_text(ROOT / "results" / f"{STUDY}.md", "\n".join([*lines, ""]))


if __name__ == "__main__":
    os.environ.setdefault("LCIA_DATA", str(Path("..") / "shared" / "data"))
    os.chdir(ROOT)
    first = run_all(STUDY, {**single_runs(), **stream_runs((*THREE_SEEDS, *ONE_SEED), SEEDS[:1])})
    write_tables({**first, **run_all(STUDY, stream_runs(THREE_SEEDS, SEEDS[1:]))}, most_frequent())
