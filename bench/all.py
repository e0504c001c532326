"""`make bench`: everything that is measured, in one run on one machine, as one page.

    python bench/all.py                 # about fifty minutes on 2 CPU cores; results/bench.md and results/bench.json
    python bench/all.py --out DIR

The machine must have nothing else to do: what runs beside it is measured too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ablation
import growth
import matrix
import training

HERE = Path(__file__).resolve().parent
STARTS = {
    "lcia --help": ["-m", "lcia", "--help"],
    "lcia doctor": ["-m", "lcia", "doctor"],
    "import torch, transformers, peft": ["-c", "import torch, transformers, peft; transformers.AutoModelForCausalLM"],
}
STARTED = 5  # times; the fastest counts


def start_up() -> dict[str, float]:
    """Seconds of a process that does next to nothing."""
    found = {}
    for name, arguments in STARTS.items():
        taken = []
        for _ in range(STARTED):
            began = time.monotonic()
            subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
            taken.append(time.monotonic() - began)
        found[name] = min(taken)
    return found


def output_of(script: str, *arguments: str) -> str:
    print(script, file=sys.stderr, flush=True)
    command = [sys.executable, str(HERE / script), *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def headline(found: dict[str, Any]) -> list[str]:
    """Ratios first."""
    ours, peers = found["training"]["lcia"], found["training"]
    lines = ["| what | against | lcia is faster by |", "|---|---|---|"]
    for name in training.CONTENDERS[1:]:
        if peers[name]["difference"] <= training.LARGEST_DIFFERENCE:
            memory = f"{ours['peak_gib']:.1f} against {peers[name]['peak_gib']:.1f} GiB"
            lines.append(f"| a training step | {name} | {peers[name]['ratio']:.2f}x ({memory}) |")
    lines.append(f"| the accuracy matrix of six tasks | the plain way | {found['matrix']['ratio']:.2f}x |")
    last = found["growth"][-1]
    lines.append(
        f"| lists of prompts answered, {last['tasks']} tasks in {last['groups']} groups | one per cell | "
        f"{last['cells'] / last['answered']:.2f}x fewer |"
    )
    start = found["start_up"]
    libraries = start["import torch, transformers, peft"]
    lines.append(f"| `lcia --help` | importing the libraries | {libraries / start['lcia --help']:.1f}x |")
    return lines


def page(found: dict[str, Any]) -> str:
    proof = found["proof"]["plain"]
    return "\n".join(
        [
            "# Speed",
            "",
            f"Command: `make bench`. {found['machine']}. {found['date']}; "
            + ", ".join(f"{name} {number}" for name, number in found["versions"].items())
            + ".",
            "All in one run, contenders in turns, the fastest of their rounds. What each optimisation adds alone is in",
            "[bench/README.md](../bench/README.md).",
            "",
            *headline(found),
            "",
            "## A training step",
            "",
            "SmolLM2-135M, LoRA r = 16 on all linear layers, 8 rows a step, bfloat16 base and float32 adapter, the",
            "same batches. `eager`: with the attention that lcia takes on a CPU; else the library's default.",
            "",
            training.table(found["training"]),
            "",
            "What each way of being fast adds to it: alone, and to all the others.",
            "",
            ablation.table(found["ablation"]),
            "",
            "## The accuracy matrix",
            "",
            matrix.table(found["matrix"]),
            "",
            f"In float32, with fewer rows: {proof['differing']} of {proof['predictions']} predictions differ.",
            "",
            "## Growth with the stream",
            "",
            growth.table(found["growth"]),
            "",
            "![lists of prompts answered against tasks](bench-growth.png)",
            "",
            "## Averaging",
            "",
            "```",
            found["averaging"],
            "```",
            "",
            "## Routing",
            "",
            "```",
            found["routing"],
            "```",
            "",
            "## Start-up",
            "",
            "| | seconds |",
            "|---|---|",
            *(f"| `{name}` | {seconds:.2f} |" for name, seconds in found["start_up"].items()),
            "",
        ]
    )


def machine() -> str:
    """Model, cores and threads."""
    names = [line.partition(":")[2].strip() for line in _processor() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def _processor() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=12, help="of training, a contender and round")
    parser.add_argument("--rows", type=int, default=40, help="of a cell of the matrix")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)

    from lcia.results import library_versions

    place = Path("runs/bench/matrix")
    name = Path(chosen.model).name
    measured: dict[str, Any] = {
        "machine": machine(),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": library_versions(),
        "start_up": start_up(),
        "training": training.measure(chosen.steps, proof_steps=4, rounds=2, model=chosen.model),
        "ablation": ablation.measure(chosen.steps, rounds=2, model=chosen.model),
        "matrix": matrix.measure(
            matrix.trained(place / f"{name}-{chosen.rows}", chosen.model, "bfloat16", steps=24, rows=chosen.rows)
        ),
        "proof": matrix.measure(matrix.trained(place / f"{name}-float32", chosen.model, "float32", steps=2, rows=6)),
        "growth": growth.measure(),
        "averaging": output_of("ema.py"),
        "routing": output_of("grouping.py"),
    }
    growth.draw(measured["growth"], chosen.out / "bench-growth.png")
    (chosen.out / "bench.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    (chosen.out / "bench.md").write_text(page(measured), encoding="utf-8")
    print("\n".join(headline(measured)))
