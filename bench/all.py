"""`make bench`: everything that is measured, in one run on one machine, as one page.

    python bench/all.py                 # about 70 minutes on 2 CPU cores; results/bench.md and results/bench.json
    python bench/all.py --smoke         # the same with a tiny model and little of everything: does it run?
    python bench/all.py --out DIR

The machine must have nothing else to do: what runs beside it is measured too. Each part is written when it is there,
and the same command goes on behind the last of an interrupted run of the same code; what is compared is one part's, and
so of one run. The page is written when all is there. Exit code 1: losses or predictions are not the peers'.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ablation
import growth
import matrix
import training
from tiny import tiny_llama

HERE = Path(__file__).resolve().parent
STARTS = {
    "lcia --help": ["-m", "lcia", "--help"],
    "lcia doctor": ["-m", "lcia", "doctor"],
    "import torch, transformers, peft": ["-c", "import torch, transformers, peft; transformers.AutoModelForCausalLM"],
}
REQUEST, INSTRUCTION = "what is the capital of france", "Answer with the intent of the request using a short phrase"
# What a user would write to ask a trained adapter one question.
BY_HAND = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter).to(device)
text = tokenizer.apply_chat_template(
    [{{"role": "user", "content": {REQUEST + chr(10) + INSTRUCTION!r}}}], tokenize=False, add_generation_prompt=True
)
batch = tokenizer(text, return_tensors="pt", add_special_tokens=False).to(device)
print(tokenizer.decode(model.generate(**batch, max_new_tokens=12)[0, batch["input_ids"].shape[1]:]))
"""


def fastest(command: list[str], times: int) -> float:
    """Seconds of a process, from its start to its end."""
    taken = []
    for _ in range(times):
        began = time.monotonic()
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        taken.append(time.monotonic() - began)
    return min(taken)


def start_up(run: Path, model: str, times: int) -> dict[str, float]:
    """Seconds of processes that do next to nothing, and of one question to a trained run."""
    from lcia.backbone import find_model

    adapter = next(iter(sorted((run / "pool").glob("*/adapter_config.json")))).parent
    commands = {
        **STARTS,
        "lcia generate": ["-m", "lcia", "generate", str(run), REQUEST, "--instruction", INSTRUCTION],
        "one answer by hand": ["-c", BY_HAND, str(find_model(model)), str(adapter)],
    }
    return {name: fastest([sys.executable, *arguments], times) for name, arguments in commands.items()}


def output_of(script: str, *arguments: str, threads: int = 1) -> str:
    print(script, *arguments, file=sys.stderr, flush=True)
    command = [sys.executable, str(HERE / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout.strip()


def failures(found: dict[str, Any]) -> list[str]:
    """What must be equal and is not."""
    lines = [
        f"{name}: a float32 loss differs by {one['difference']:.1e}"
        for name, one in found["training"].items()
        if one["difference"] > training.LARGEST_DIFFERENCE
    ]
    lines += [
        f"{name}: {one['differing']} of {one['predictions']} float32 predictions differ"
        for name, one in found["proof"].items()
        if one.get("differing")
    ]
    lines += [
        f"{one['tasks']} tasks: {one['changed']} reused cells differ" for one in found["growth"] if one["changed"]
    ]
    return lines


def headline(found: dict[str, Any]) -> list[str]:
    """Ratios first."""
    ours, peers = found["training"]["lcia"], found["training"]
    lines = ["| what | against | lcia is faster by |", "|---|---|---|"]
    for name in training.CONTENDERS[1:]:
        memory = f"{ours['peak_gib']:.1f} against {peers[name]['peak_gib']:.1f} GiB"
        same = peers[name]["difference"] <= training.LARGEST_DIFFERENCE
        lines.append(
            f"| a training step | {name} | {peers[name]['ratio']:.2f}x ({memory if same else 'OTHER LOSSES'}) |"
        )
    ways = {"plain": "the plain way", "helped": "the same, sorted and with lcia's attention"}
    for what, part in (("the accuracy matrix of six tasks", "matrix"), ("the same in float32", "proof")):
        for name, one in found[part].items():
            if name in ways:
                unlike = f"{one['differing']} of {one['predictions']:,} predictions differ"
                lines.append(f"| {what} | {ways[name]} | {one['ratio']:.2f}x ({unlike}) |")
    last = found["growth"][-1]
    lines.append(
        f"| prompt lists answered, {last['tasks']} tasks in {last['groups']} groups | one per cell; T (T + 1) / 2 | "
        f"{last['cells'] / last['answered']:.2f}x; {last['plain'] / last['answered']:.2f}x fewer |"
    )
    start, by_hand = found["start_up"], "one answer by hand"
    lines.append(f"| `lcia generate`, the whole process | {by_hand} | {start[by_hand] / start['lcia generate']:.2f}x |")
    return lines


def page(found: dict[str, Any]) -> str:
    return "\n".join(
        [
            "# Speed",
            "",
            f"Command: `make bench`. {found['machine']}; "
            + ", ".join(f"{name} {number}" for name, number in found["versions"].items())
            + ".",
            "Each part was there at (UTC), and of this commit: "
            + ", ".join(f"{name} {when}" for name, when in found["times"].items())
            + ".",
            "Contenders of a part take turns (of start-up one after the other), and the fastest of their rounds",
            "counts. What each optimisation adds, and the test that keeps its numbers right:",
            "[bench/README.md](../bench/README.md).",
            "",
            *headline(found),
            "",
            *(f"**Not equal: {line}.**" for line in failures(found)),
            "## A training step",
            "",
            f"{found['model']}, LoRA r = 16 on all linear layers, {training.ROWS} rows a step, bfloat16 base and",
            "float32 adapter, the same batches of the six tasks of the assistant stream. `eager`: with the attention",
            "that lcia takes on a CPU; else the library's default. TRL's own loss computes all positions' logits on",
            "a CPU, on a GPU those of answers alone.",
            "",
            training.table(found["training"]),
            "",
            "What each way of being fast adds: alone, and to all the others.",
            "",
            ablation.table(
                found["ablation_training"], found["ablation_answering"], found["ablation_answering_float32"]
            ),
            "",
            "## The accuracy matrix",
            "",
            matrix.table(found["matrix"]),
            "",
            "In float32, where another order of sums hardly makes a difference (one round):",
            "",
            matrix.table(found["proof"]),
            "",
            "## Growth with the stream",
            "",
            growth.table(found["growth"]),
            "",
            "![lists of prompts answered against tasks](bench-growth.png)",
            "",
            "## Averaging (`bench/ema.py`)",
            "",
            found["averaging"].replace("\n## ", "\n### "),
            "",
            found["averaging_all_threads"].replace("\n## ", "\n### "),
            "",
            "## Routing (`bench/grouping.py`, one thread)",
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
    """Processor, cores and GPU."""
    import torch

    names = [line.partition(":")[2].strip() for line in _processor() if line.startswith("model name")]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores{gpu}"


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _processor() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def code() -> str:
    """A hash of the package's source and of these scripts."""
    import lcia

    package = Path(str(lcia.__file__)).parent
    files = [*sorted(package.rglob("*.py")), *sorted(package.rglob("*.c")), *sorted(HERE.glob("*.py"))]
    return hashlib.sha256(b"".join(f"{file.name}\n".encode() + file.read_bytes() for file in files)).hexdigest()


def commit() -> str:
    """Of the clone that these scripts lie in; empty where they lie in none."""
    asked = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def measure(place: Path, out: Path, model: str, little: bool) -> dict[str, Any]:
    """Everything, one part after the other; each is in bench.part.json as soon as it is there."""
    from lcia.files import write_text
    from lcia.results import library_versions

    found: dict[str, Any] = {
        "machine": machine(),
        "model": Path(model).name,
        "code": code(),
        "versions": {**library_versions(), "trl": version("trl")},
    }
    times: dict[str, str] = {}  # when each part was there, and of which commit
    partial = out / "bench.part.json"
    if partial.is_file():
        before = json.loads(partial.read_text(encoding="utf-8"))
        if all(before.get(name) == value for name, value in found.items()):
            found, times = before, before["times"]
    found["times"] = times

    def keep(name: str, part: Callable[[], Any]) -> None:
        if name in found:
            print(f"{name}: measured before", file=sys.stderr, flush=True)
            return
        began = time.monotonic()
        found[name] = part()
        if code() != found["code"]:
            raise SystemExit(f"{name}: the code was changed while it was measured; measure a clone of it")
        times[name] = f"{datetime.now(UTC):%Y-%m-%dT%H:%M} {commit()}"
        print(f"{name}: {(time.monotonic() - began) / 60:.1f} minutes", file=sys.stderr, flush=True)
        write_text(partial, json.dumps(found, indent=1) + "\n")

    steps, rounds, rows = (1, 1, 2) if little else (4, 2, 40)

    def run() -> Path:
        return matrix.trained(place / "run", model, "bfloat16", steps=1 if little else 24, rows=rows)

    def exact() -> Path:
        return matrix.trained(place / "exact", model, "float32", steps=1 if little else 24, rows=rows)

    keep("training", lambda: training.measure(steps, proof_steps=1 if little else 3, rounds=rounds, model=model))
    keep("matrix", lambda: matrix.measure(run(), rounds))
    keep("proof", lambda: matrix.measure(exact(), rounds=1))
    keep("growth", growth.measure)
    keep("ablation_training", lambda: ablation.measure_training(1 if little else 2, rounds, model))
    keep("ablation_answering", lambda: ablation.measure_answering(rounds, model))
    keep("ablation_answering_float32", lambda: ablation.measure_answering(rounds, model, "float32"))
    less = ["--ranks", "16", "--rounds", "1"] if little else []
    keep("averaging", lambda: output_of("ema.py", "--device", device(), *less))
    cores = os.cpu_count() or 1
    repeats = cores == 1 or device() == "cuda"  # the same again
    keep("averaging_all_threads", lambda: "" if repeats else output_of("ema.py", *less, threads=cores))
    keep("routing", lambda: output_of("grouping.py", *(["--instructions", "1000"] if little else [])))
    keep("start_up", lambda: start_up(run(), model, 1 if little else 3))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, help="results/; with --smoke nothing is kept")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        here = Path(temporary)
        output = chosen.out or (here if chosen.smoke else HERE.parent / "results")
        output.mkdir(parents=True, exist_ok=True)
        taken = str(tiny_llama(here / "tiny")) if chosen.smoke else "smollm2-135m"
        measured = measure(here, output, taken, chosen.smoke)
        growth.draw(measured["growth"], output / "bench-growth.png")
        (output / "bench.md").write_text(page(measured), encoding="utf-8")
        (output / "bench.part.json").replace(output / "bench.json")
        print("\n".join([*headline(measured), *failures(measured)]))
    sys.exit(1 if failures(measured) else 0)
