"""The accuracy matrix of a run: as lcia measures it, against the plain way.

    python bench/matrix.py                          # trains six tasks first: about fifteen minutes on 2 CPU cores
    python bench/matrix.py --run runs/demo/lcia     # of a finished run
    python bench/matrix.py --dtype float32 --rows 8 --steps 4     # the proof without bfloat16's rounding

The plain way: after every stage, every cell of the row is answered again, with PEFT's adapters as they are loaded and
one `generate` call a batch, the prompts in their order, with the attention that transformers takes. It gets lcia's
routing for nothing and batches of the same size; its clock counts answering alone, lcia's also routing, scores and
files. `helped` gets its prompts sorted by length and lcia's attention, too. All run from scratch, each in a process of
its own, in turns; the fastest round counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lcia.machine import start_again_without_small_caches
from tiny import fresh_answers

SETTINGS: dict[str, Any] = {
    "stream": "assistant",
    "model": "smollm2-135m",
    "method": "lcia",
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "lora_r": 16,
    "max_new_tokens": 12,
}


# The others read what lcia has answered.
WAYS = {"lcia": "--by-lcia", "plain": "--by-hand", "helped": "--by-helped-hand"}


def trained(folder: Path, model: str, dtype: str, steps: int, rows: int) -> Path:
    """A run of six tasks; the one that is there, where there is one."""
    if (folder / "results.json").is_file():
        return folder
    values = {**SETTINGS, "model": model, "dtype": dtype, "max_steps": steps, "max_eval_examples": rows}
    overrides = [f"{key}={json.dumps(value)}" for key, value in {**values, "output_dir": str(folder)}.items()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = folder.parent / f"{folder.name}.yaml"
    config.write_text("stream: assistant\noutput_dir: unused\n", encoding="utf-8")
    arguments = ["train", str(config), *overrides, "--json"]
    subprocess.run([sys.executable, "-m", "lcia", *arguments], stdout=subprocess.DEVNULL, check=True)
    return folder


def by_lcia(run: Path) -> dict[str, Any]:
    """Every row, no prediction taken over from an earlier run."""
    from lcia.machine import limit_kept_kernels
    from lcia.progress import Reporter
    from lcia.run import measure_again

    limit_kept_kernels()  # as the command does
    with tempfile.TemporaryDirectory() as kept, fresh_answers(Path(kept)), Reporter() as bar:
        rows = measure_again(run, bar, all_rows=True)["rows"]
    return {
        "seconds": sum(row["eval_s"] for row in rows),
        "cells": sum(len(row["scores"]) for row in rows),
        "answered": sum(row["evaluations_run"] for row in rows),
    }


def by_hand(run: Path, helped: bool) -> dict[str, Any]:
    """The same cells with transformers and PEFT; counts the predictions that differ from lcia's."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from lcia.backbone import find_model, load_backbone
    from lcia.run_folder import RunFolder
    from lcia.session import current_stream, frozen_config

    folder = RunFolder(run).require_run()
    config = frozen_config(folder)
    stream = current_stream(folder, config)
    backbone = load_backbone(config.model, config.dtype, config.attn_implementation)
    reader = backbone.reader
    attention = {"attn_implementation": backbone.model.config._attn_implementation} if helped else {}
    generation, dtype, device = (getattr(backbone.model, name) for name in ("generation_config", "dtype", "device"))
    del backbone
    prompts = {task.name: {row.id: reader.encode_prompt(row).prompt for row in task.test} for task in stream}
    pad = reader.tokenizer.pad_token_id
    seconds, differing, cells, written = 0.0, 0, 0, 0
    answers: dict[str, str] = {}
    stages = [None, *(record["stage"] for record in folder.records("stage_learned"))]
    for number, stage in enumerate(stages):
        model: Any = AutoModelForCausalLM.from_pretrained(find_model(config.model), dtype=dtype, **attention)
        model.generation_config = generation
        for adapter in sorted((run / "history" / str(stage)).glob("*/adapter_config.json")):
            name = adapter.parent.name
            if isinstance(model, PeftModel):
                model.load_adapter(adapter.parent, adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, adapter.parent, adapter_name=name)
        model.to(device).eval()
        for file in sorted((run / "evaluations" / "test-all-rows" / str(number)).glob("*.jsonl")):
            records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            cells += 1
            for group in dict.fromkeys(record["group"] for record in records):
                if group is not None:
                    model.set_adapter(group)
                elif isinstance(model, PeftModel):
                    raise SystemExit(f"{file}: answered by the base model, for which an adapter would have to be off")
                mine = [record for record in records if record["group"] == group]
                if helped:
                    mine.sort(key=lambda record: len(prompts[file.stem][record["id"]]))
                for start in range(0, len(mine), config.per_device_eval_batch_size):
                    batch = mine[start : start + config.per_device_eval_batch_size]
                    ids = [prompts[file.stem][record["id"]] for record in batch]
                    length = max(map(len, ids))
                    tokens = torch.tensor([[pad] * (length - len(row)) + list(row) for row in ids])
                    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids])
                    started = time.monotonic()
                    with torch.no_grad():
                        output = model.generate(
                            input_ids=tokens.to(device),
                            attention_mask=mask.to(device),
                            max_new_tokens=config.max_new_tokens,
                        )
                    texts = reader.tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
                    seconds += time.monotonic() - started
                    written += int((output[:, length:] != pad).sum())
                    for text, record in zip(texts, batch, strict=True):
                        answers[f"{number}/{file.stem}/{record['id']}"] = text.strip()
                        differing += text.strip() != record["prediction"]
    return {
        "seconds": seconds,
        "cells": cells,
        "predictions": len(answers),
        "answer_tokens": written,
        "differing": differing,
        "answers": answers,
    }


def in_own_process(way: str, run: Path) -> dict[str, Any]:
    print(f"matrix, {way[2:]}, {run}", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, __file__, way, str(run)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(run: Path, rounds: int = 2) -> dict[str, dict[str, Any]]:
    """All ways, in turns: {lcia, plain, helped: the fastest round of each}."""
    found: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for way in WAYS.values():
            result = in_own_process(way, run)
            if way not in found or result["seconds"] < found[way]["seconds"]:
                found[way] = result
    named = {name: found[way] for name, way in WAYS.items()}
    ours, plain = named["lcia"], named["plain"]
    by_hand, by_helped_hand = (named[name].pop("answers") for name in ("plain", "helped"))
    plain["differing_from_helped"] = sum(by_hand[place] != answer for place, answer in by_helped_hand.items())
    for name, one in named.items():
        if one["cells"] != ours["cells"]:
            raise SystemExit(f"lcia measured {ours['cells']} cells, {name} {one['cells']}")
        one["predictions_per_s"] = plain["predictions"] / one["seconds"]
        one["answer_tokens_per_s"] = plain["answer_tokens"] / one["seconds"]
        one["ratio"] = one["seconds"] / ours["seconds"]
    return named


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| | lcia is faster by | seconds | cells | lists answered | predictions/s | answer tokens/s | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        lines.append(
            f"| {name} | {one['ratio']:.2f}x | {one['seconds']:.1f} | {one['cells']} | {one.get('answered', 'all')} "
            f"| {one['predictions_per_s']:.1f} | {one['answer_tokens_per_s']:.0f} | {one['peak_gib']:.1f} |"
        )
    others = [one for name, one in found.items() if name != "lcia"]
    differing = " and ".join(f"{one['differing']:,}" for one in others)
    last = (
        f"{differing} of {others[0]['predictions']:,} predictions differ from lcia's; between the plain way and the "
        f"helped one, {found['plain']['differing_from_helped']:,}."
    )
    return "\n".join([*lines, "", last])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run of the method lcia or lora")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--rows", type=int, default=40)
    parser.add_argument("--json", type=Path)
    for way in WAYS.values():
        parser.add_argument(way, type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.by_lcia or chosen.by_hand or chosen.by_helped_hand:
        if chosen.by_lcia:
            start_again_without_small_caches()  # as the command does
        from lcia.results import peak_memory_mib

        if chosen.by_lcia:
            result = by_lcia(chosen.by_lcia)
        else:
            result = by_hand(chosen.by_hand or chosen.by_helped_hand, helped=chosen.by_hand is None)
        print(json.dumps({**result, "peak_gib": peak_memory_mib() / 1024}))
        sys.exit()
    with tempfile.TemporaryDirectory() as place:
        folder = chosen.run or trained(Path(place) / "run", chosen.model, chosen.dtype, chosen.steps, chosen.rows)
        measured = measure(folder)
    print(table(measured))
    if chosen.json:
        chosen.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
