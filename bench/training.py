"""`lcia train` against TRL's SFTTrainer and a plain transformers Trainer: the same steps, timed.

    python bench/training.py                       # about twenty minutes on 2 CPU cores
    python bench/training.py --json out.json
    python bench/training.py --contender trl --dtype float32 --steps 1      # one of them, in this process

All train the same LoRA adapter, from the same weights, on the same batches of the assistant stream, task after task,
with the same AdamW (a new one for each task); the base is bfloat16, the adapter float32. Each contender has a process
of its own, several times in turns, and its fastest round counts: other programs make things slower, never faster. Time
is from a task's first step to its last one's end, added up; memory is the highest of the process. What the lcia
command tells the allocator and oneDNN (lcia.machine) is a part of lcia's.

A contender counts only if its float32 losses are lcia's, step by step, to 1e-4.

`trainer` and `trl` take their defaults for attention (sdpa), but no autocast and no gradient checkpointing, which TRL
would turn on; with `eager` they have lcia's attention on a CPU. TRL's loss computes the logits of all positions on a
CPU, in tiles that are made again for the backward pass; on a GPU with Triton those of answer tokens alone.
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

CONTENDERS = ("lcia", "trainer", "trainer-eager", "trl", "trl-eager")
LARGEST_DIFFERENCE = 1e-4  # of a loss
ROWS = 8  # a step
RANK = 16
SEED = 0


def config_of(folder: Path, steps: int, dtype: str, model: str) -> Any:
    from lcia.config import parse_config

    values = {
        "stream": "assistant",
        "model": model,
        "method": "lora",
        "output_dir": str(folder / "run"),
        "seed": SEED,
        "dtype": dtype,
        "max_steps": steps,
        "per_device_train_batch_size": ROWS,
        "lora_r": RANK,
        "learning_rate": 5e-4,
        "logging_steps": 1,
        "save_steps": 10_000,
        "max_eval_examples": 1,
        "max_new_tokens": 1,
    }
    return parse_config(values, where="bench")


def by_lcia(config: Any) -> dict[str, Any]:
    from lcia.machine import limit_kept_kernels
    from lcia.progress import Reporter
    from lcia.run import train

    limit_kept_kernels()  # as the command does
    with Reporter() as reporter:
        results = train(config, reporter)
    log = (Path(config.output_dir) / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    return {"losses": [json.loads(line)["loss"] for line in log], "seconds": results["cost"]["train_s"]}


def by_peer(config: Any, contender: str, folder: Path) -> dict[str, Any]:
    """The adapter that lcia would start from, loaded by PEFT, and trained by a trainer of others."""
    import gc

    import torch
    from datasets import Dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    from lcia.backbone import find_model, load_backbone
    from lcia.seeds import stable_seed
    from lcia.session import load_run_stream, make_pool

    backbone = load_backbone(config.model, config.dtype)
    pool = make_pool(config, backbone)
    pool.add("shared")
    pool.save("shared", folder / "adapter")
    data = {
        task.name: Dataset.from_list(
            [
                {"input_ids": [*row.prompt, *row.answer], "labels": [-100] * len(row.prompt) + list(row.answer)}
                for row in map(backbone.reader.encode, task.train)
            ]
        )
        for task in load_run_stream(config)
    }
    tokenizer = backbone.reader.tokenizer
    attention = {"attn_implementation": "eager"} if contender.endswith("-eager") else {}
    base = AutoModelForCausalLM.from_pretrained(
        find_model(config.model), dtype=getattr(torch, config.dtype), **attention
    )
    del backbone, pool
    gc.collect()  # the peer's peak is its own
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    seconds, losses = 0.0, []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.began = time.monotonic()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            nonlocal seconds
            seconds += time.monotonic() - self.began

    arguments = {
        **config.training_arguments(),
        "output_dir": str(folder / "peer"),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
    }
    for task, rows in data.items():
        arguments["seed"] = stable_seed(config.seed, task, "order")
        if contender.startswith("trl"):
            from trl import SFTConfig, SFTTrainer

            settings = SFTConfig(**{**arguments, "gradient_checkpointing": False, "bf16": False, "max_length": None})
            trainer = SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
        else:
            collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
            trainer = Trainer(model, TrainingArguments(**arguments), train_dataset=rows, data_collator=collator)
        trainer.add_callback(Clock())
        trainer.train()
        losses += [record["loss"] for record in trainer.state.log_history if "loss" in record]
    return {"losses": losses, "seconds": seconds}


def one(contender: str, steps: int, dtype: str, model: str) -> dict[str, Any]:
    from lcia.results import peak_memory_mib

    with tempfile.TemporaryDirectory() as folder:
        config = config_of(Path(folder), steps, dtype, model)
        found = by_lcia(config) if contender == "lcia" else by_peer(config, contender, Path(folder))
    taken = len(found["losses"])
    return {
        **found,
        "steps": taken,
        "examples_per_s": taken * ROWS / found["seconds"],
        "peak_gib": peak_memory_mib() / 1024,
    }


def in_own_process(contender: str, steps: int, dtype: str, model: str) -> dict[str, Any]:
    arguments = ["--contender", contender, "--steps", str(steps), "--dtype", dtype, "--model", model]
    print(f"{contender}, {dtype}, {steps} steps", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{contender}: {done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def answer_tokens(config: Any) -> float:
    """Of a training row of the stream, on average."""
    from lcia.backbone import find_model, load_layout, load_reader
    from lcia.session import load_run_stream

    where = find_model(config.model)
    reader = load_reader(where, config.model, load_layout(where, config.model))
    lengths = [len(reader.encode(row).answer) for task in load_run_stream(config) for row in task.train]
    return sum(lengths) / len(lengths)


def measure(steps: int, proof_steps: int, rounds: int, model: str) -> dict[str, dict[str, Any]]:
    """{contender: {examples_per_s, seconds_per_step, peak_gib, difference}}, the fastest of the rounds.

    Args:
        steps: a task, timed; proof_steps: a task, in float32.
    """
    tokens = answer_tokens(config_of(Path("unused"), 1, "bfloat16", model))
    proof = {name: in_own_process(name, proof_steps, "float32", model)["losses"] for name in CONTENDERS}
    found: dict[str, dict[str, Any]] = {}
    for _ in range(rounds):
        for name in CONTENDERS:
            result = in_own_process(name, steps, "bfloat16", model)
            if name not in found or result["seconds"] < found[name]["seconds"]:
                found[name] = result
    for name, result in found.items():
        if len(proof[name]) != len(proof["lcia"]) or not proof["lcia"]:
            raise SystemExit(f"{name} logged {len(proof[name])} losses, lcia {len(proof['lcia'])}")
        result["difference"] = max(abs(a - b) for a, b in zip(proof[name], proof["lcia"], strict=True))
        result["seconds_per_step"] = result["seconds"] / result["steps"]
        result["answer_tokens_per_s"] = tokens * result["examples_per_s"]
        result["ratio"] = found["lcia"]["examples_per_s"] / result["examples_per_s"]
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| contender | lcia is faster by | examples/s | answer tokens/s | s/step | peak GiB "
        "| largest difference of a float32 loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        counts = "" if one["difference"] <= LARGEST_DIFFERENCE else " (other losses: does not count)"
        lines.append(
            f"| {name} | {one['ratio']:.2f}x | {one['examples_per_s']:.2f} | {one['answer_tokens_per_s']:.0f} "
            f"| {one['seconds_per_step']:.2f} | {one['peak_gib']:.1f} | {one['difference']:.1e}{counts} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=4, help="of a task")
    parser.add_argument("--proof-steps", type=int, default=3, help="of a task, in float32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contender", choices=CONTENDERS, help="only this one, here; --steps and --dtype count")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    chosen = parser.parse_args()
    if chosen.contender:
        if chosen.contender == "lcia":
            start_again_without_small_caches()  # as the command does
        print(json.dumps(one(chosen.contender, chosen.steps, chosen.dtype, chosen.model)))
        sys.exit()
    measured = measure(chosen.steps, chosen.proof_steps, chosen.rounds, chosen.model)
    print(table(measured))
    if chosen.json:
        chosen.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
