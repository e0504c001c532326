"""How many lists of prompts are answered as a stream grows, against one per cell of the matrix.

    python bench/growth.py                      # a tiny random model: what is answered does not depend on the weights
    python bench/growth.py --model smollm2-135m

Streams of 2, 4, 8 and 16 tasks in at most five groups: rows of the assistant stream, dealt out. After task j the
matrix has cells for the tasks up to j + 1; a task is answered again only where the weights that answer it changed.
T (T + 1) / 2 is the count of the plain way that measures the tasks seen so far and nothing ahead of them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcia.config import parse_config
from lcia.progress import Reporter
from lcia.run import measure_again, train
from lcia.stream import Task, load_stream
from tiny import fresh_answers, tiny_llama

SIZES = (2, 4, 8, 16)
GROUPS = 5
ROWS = 2  # to train on, and to test with, a task
INSTRUCTIONS = (
    "Answer with the intent of the request using a short phrase",
    "Extract the name of the playlist from the request",
    "Choose the option that fits and give its letter",
    "Which artist does the speaker want to hear",
    "Translate these words into German",
)


def stream_of(tasks: int, folder: Path) -> Path:
    """`tasks` data files; task i belongs to instruction group i mod 5."""
    sources: Sequence[Task] = list(load_stream("assistant"))
    folder.mkdir()
    names = [f"task{number:02d}" for number in range(tasks)]
    for number, name in enumerate(names):
        source = sources[number % len(sources)]
        first = 2 * ROWS * (number // len(sources))
        lines = []
        for place, row in enumerate(source.train[first : first + 2 * ROWS]):
            split = "train" if place < ROWS else "test"
            record = {
                "id": f"{name}-{place}",
                "instruction": INSTRUCTIONS[number % GROUPS],
                "input": row.messages[-1][1],
                "output": row.outputs[0],
                "split": split,
            }
            lines.append(json.dumps(record) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "tasks.json").write_text(json.dumps(names), encoding="utf-8")
    return folder


def measure(model: str | None = None, sizes: Sequence[int] = SIZES) -> list[dict[str, int]]:
    """For each size: tasks, groups, cells of the matrix, T(T+1)/2, lists answered, cells that are not as recomputed.

    `answered` is what the run itself counted, with nothing kept from earlier runs. Recomputed is every cell, anew.
    """
    found = []
    with tempfile.TemporaryDirectory() as place, Reporter() as reporter:
        if model is None:
            model = str(tiny_llama(Path(place) / "tiny"))
        for tasks in sizes:
            values: dict[str, Any] = {
                "stream": str(stream_of(tasks, Path(place) / f"stream{tasks}")),
                "model": model,
                "method": "lcia",
                "output_dir": str(Path(place) / f"run{tasks}"),
                "max_steps": 1,
                "per_device_train_batch_size": ROWS,
                "lora_r": 4,
                "max_new_tokens": 4,
            }
            # answers of a smaller stream would be found by a larger one, whose first tasks are the same
            with fresh_answers(Path(place) / f"kept{tasks}"):
                results = train(parse_config(values, where="bench"), reporter)
                run = Path(values["output_dir"])
                again = measure_again(run, reporter, all_rows=True, recompute=True)
            files = sorted((run / "predictions").glob("*/*.jsonl"))
            changed = sum(
                file.read_text(encoding="utf-8")
                != (run / "evaluations" / "test-all-rows" / file.parent.name / file.name).read_text(encoding="utf-8")
                for file in files
            )
            if len(files) != sum(row["evaluations_run"] for row in again["rows"]):
                raise SystemExit(f"{tasks} tasks: not every cell was answered anew")
            found.append(
                {
                    "tasks": tasks,
                    "groups": len(set(results["groups"].values())),
                    "cells": len(files),
                    "plain": tasks * (tasks + 1) // 2,
                    "answered": results["cost"]["evaluations_run"],
                    "changed": changed,
                }
            )
    return found


def table(found: Sequence[dict[str, int]]) -> str:
    lines = [
        "| tasks | groups | cells of the matrix | T (T + 1) / 2 | answered | cells that differ when all are answered |",
        "|---|---|---|---|---|---|",
    ]
    columns = ("tasks", "groups", "cells", "plain", "answered", "changed")
    lines += ["| " + " | ".join(str(one[column]) for column in columns) + " |" for one in found]
    return "\n".join(lines)


def draw(found: Sequence[dict[str, int]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.2), layout="constrained")
    tasks = [one["tasks"] for one in found]
    for key, label in (("cells", "cells of the matrix"), ("plain", "T (T + 1) / 2"), ("answered", "answered by lcia")):
        axes.plot(tasks, [one[key] for one in found], marker="o", label=label)
    axes.set(xlabel="tasks T, in five groups", ylabel="lists of prompts", xticks=tasks)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a name, hub id or folder; a tiny random model if not given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path, help="the curve")
    chosen = parser.parse_args()
    measured = measure(chosen.model)
    print(table(measured))
    if chosen.json:
        chosen.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    if chosen.png:
        draw(measured, chosen.png)
