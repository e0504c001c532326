"""What each way of being fast adds to a training step: alone, and to all the others.

    python bench/ablation.py                # about ten minutes on 2 CPU cores
    python bench/ablation.py --json out.json

Each is switched off by what stands there without it. `alone`: all off, against all off but this one. `together`: all
on but this one, against all on. Steps as in bench/training.py, each variant in a process of its own, in turns, the
fastest round counts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

from training import ROWS, by_lcia, config_of

WAYS = {
    "prefix": "what all rows of a batch begin with is computed once",
    "logits": "logits of answer tokens alone, asked for by index",
    "attention": "eager attention on a CPU, where fused attention's backward pass is slow in bfloat16",
    "memory": "freed memory is kept for the next step",
}


def whole_logits(self: Any, model: Any, batch: Mapping[str, Any]) -> Any:
    """The logits of every token, of which those before an answer token are taken."""
    from lcia.backbone.layout import IGNORED, _behind

    cache = self._prefix(model, batch)
    mask, shared = _behind(cache, batch)
    length = batch["input_ids"].shape[1] - shared
    logits = model(
        input_ids=batch["input_ids"][:, -length:],
        attention_mask=mask,
        position_ids=batch["position_ids"][:, -length:],
        past_key_values=cache,
        use_cache=cache is not None,
    ).logits[:, -batch["labels"].shape[1] :]
    targets = batch["labels"][:, 1:]
    kept = targets != IGNORED
    return logits[:, :-1][kept].float(), targets[kept]


def seconds_per_step(off: set[str], steps: int, model: str) -> float:
    with contextlib.ExitStack() as changed, tempfile.TemporaryDirectory() as folder:
        config = config_of(Path(folder), steps, "bfloat16", model)
        if "prefix" in off:
            changed.enter_context(patch("lcia.backbone.prefix.of_batch", lambda *_: None))
        if "logits" in off:
            changed.enter_context(patch("lcia.backbone.layout.DecoderOnly.answer_logits", whole_logits))
        if "attention" in off:
            config.attn_implementation = "sdpa"
        if "memory" in off:
            changed.enter_context(patch("lcia.machine.keep_freed_memory", lambda: False))
        return float(by_lcia(config)["seconds"]) / steps


def measure(steps: int, rounds: int, model: str) -> dict[str, Any]:
    everything = frozenset(WAYS)
    variants = {frozenset(), everything, *(everything - {way} for way in WAYS), *(frozenset({way}) for way in WAYS)}
    fastest: dict[frozenset[str], float] = {}
    for _ in range(rounds):
        for off in sorted(variants, key=sorted):
            print(f"without {', '.join(sorted(off)) or 'nothing'}", file=sys.stderr, flush=True)
            arguments = ["--off", ",".join(off), "--steps", str(steps), "--model", model]
            environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
            done = subprocess.run(
                [sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, check=True, env=environment
            )
            fastest[off] = min(float(done.stdout.splitlines()[-1]), fastest.get(off, float("inf")))
    none, whole = fastest[everything], fastest[frozenset()]
    return {
        "rows": ROWS,
        "seconds": {"all": whole, "none": none},
        "alone": {way: none / fastest[everything - {way}] for way in WAYS},
        "together": {way: fastest[frozenset({way})] / whole for way in WAYS},
    }


def table(found: dict[str, Any]) -> str:
    seconds = found["seconds"]
    lines = ["| | alone | together |", "|---|---|---|"]
    lines += [f"| {what} | {found['alone'][way]:.2f}x | {found['together'][way]:.2f}x |" for way, what in WAYS.items()]
    lines.append(f"| all of them: {seconds['none']:.2f} s a step → {seconds['all']:.2f} s | | ")
    lines[-1] += f"{seconds['none'] / seconds['all']:.2f}x |"
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--off", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.off is not None:
        print(seconds_per_step(set(filter(None, chosen.off.split(","))), chosen.steps, chosen.model))
        sys.exit()
    measured = measure(chosen.steps, chosen.rounds, chosen.model)
    print(table(measured))
    if chosen.json:
        chosen.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
