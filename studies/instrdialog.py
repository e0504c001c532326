"""InstrDialog in small: five of its tasks, SmolLM2-135M and a small T5, one seed.

    make study-instrdialog          # LCIA_DATA is the folder in which instrdialog/ lies

Five tasks with short prompts (definition and input), no examples in them, 20 steps of 8 rows a task, 20 test rows:
about 80 CPU minutes. The T5 is random at first and is trained here, all weights, on the other fourteen tasks: what
CITB calls Init, in small.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from study import ROOT, run_all
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from lcia.backbone import Encoded, Reader, answer_loss, find_model
from lcia.files import write_text
from lcia.stream import load_stream

STUDY = "instrdialog"
STREAM = {"name": "instrdialog", "order": 1, "examples": 0}
TASKS = [  # in the order of order 1
    "task565_circa_answer_generation",
    "task1600_smcalflow_sentence_generation",
    "task639_multi_woz_user_utterance_generation",
    "task1603_smcalflow_sentence_generation",
    "task1384_deal_or_no_dialog_classification",
]
COMMON: dict[str, Any] = {
    "stream": STREAM,
    "tasks": TASKS,
    "seed": 0,
    "max_steps": 20,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,  # CITB's for its adapters
    "lora_r": 16,
    "max_eval_examples": 20,
    "max_length": 256,
    "max_new_tokens": 32,
}
METHODS: dict[str, Any] = {
    "lora": "lora",
    "l2": "l2",
    "ewc": "ewc",
    "agem-10": {"name": "agem", "memory": 10},
    "agem-50": {"name": "agem", "memory": 50},
    "replay-10": {"name": "replay", "memory": 10},
    "replay-50": {"name": "replay", "memory": 50},
    "adapter_cl": "adapter_cl",
    "lcia": "lcia",
    "llaca": "llaca",
    "multi_task": "multi_task",
}
# AR, FWT, BWT. CITB, t5-small-lm-adapt, all 19 tasks, order 1: Table 8 of LCIA
PUBLISHED: dict[str, tuple[float | None, ...]] = {
    "lora": (35.7, 18.5, -4.6),
    "l2": (35.6, 17.5, -3.8),
    "ewc": (34.5, 16.8, -6.8),
    "agem-10": (33.2, 19.1, -7.3),
    "agem-50": (34.9, 18.1, -6.0),
    "replay-10": (38.4, 23.7, -1.3),
    "replay-50": (40.4, 22.9, 1.6),
    "adapter_cl": (8.1, 9.4, -21.9),
    "lcia": (39.8, 21.3, 0.8),
    "llaca": (None, None, None),
    "multi_task": (42.1, None, None),
}
T5 = ROOT / "runs" / "studies" / STUDY / "t5-init"
T5_STEPS, T5_BATCH, T5_RATE = 800, 16, 1e-3


def build_t5() -> None:
    """A T5 of 21 million weights with SmolLM2's tokenizer, trained on the fourteen other tasks."""
    if (T5 / "model.safetensors").is_file():
        return
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(find_model("smollm2-135m"))
    tokenizer.chat_template = None
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=256,
        d_kv=64,
        d_ff=1024,
        num_layers=4,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    model = T5ForConditionalGeneration(config)
    reader = Reader(tokenizer, tokenizer)
    rows = [
        encoded
        for task in load_stream(STREAM)
        if task.name not in TASKS
        for encoded in map(reader.encode, task.train)
        if len(encoded.prompt) <= COMMON["max_length"] and len(encoded.answer) <= COMMON["max_new_tokens"]
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=T5_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=T5_STEPS)
    draws = random.Random(0)
    losses = []
    for _ in track(range(T5_STEPS), f"Init of the T5 on {len(rows)} rows", console=None):
        batch: list[Encoded] = draws.sample(rows, T5_BATCH)
        loss = answer_loss(model, reader.collate(batch), sum(len(row.answer) for row in batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"Init: loss {sum(losses[:20]) / 20:.2f} -> {sum(losses[-20:]) / 20:.2f}", file=sys.stderr)
    tokenizer.save_pretrained(T5)
    model.save_pretrained(T5)


def runs(model: str, label: str) -> dict[str, dict[str, Any]]:
    dtype = {"dtype": "float32"} if label == "t5" else {}
    return {f"{label}-{name}": {**COMMON, **dtype, "model": model, "method": spec} for name, spec in METHODS.items()}


def groups(run: dict[str, Any]) -> int:
    return len(set(run["groups"].values()))


def left_out(run: dict[str, Any]) -> str:
    counts = {task: count for task, count in run["left_out"].items() if count}
    return ", ".join(f"{count} of {task.split('_')[0]}" for task, count in counts.items()) or "none"


def write_tables(found: dict[str, dict[str, Any]]) -> None:
    def cells(run: dict[str, Any]) -> str:
        values = (run["metrics"][key] for key in ("avg_acc", "fwt", "bwt"))
        return " | ".join("–" if value is None else f"{value:.1f}" for value in values)

    any_run = next(iter(found.values()))
    dates = sorted(run["date"] for run in found.values())
    lines = [
        "# InstrDialog in small",
        "",
        "Command: `make study-instrdialog`. Five of the nineteen tasks (with short prompts: "
        + ", ".join(name.split("_")[0] for name in TASKS)
        + "), in the",
        f"order of order 1, no examples in the prompt, {COMMON['max_steps']} steps of"
        f" {COMMON['per_device_train_batch_size']} rows a task, learning rate {COMMON['learning_rate']:g}, LoRA"
        f" r = {COMMON['lora_r']},",
        f"{COMMON['max_eval_examples']} test rows a task, one seed, every method with its default settings: nothing was"
        " tuned on this data. ROUGE-L.",
        "AR, FWT, BWT as CITB defines them (docs/concepts/metrics.md).",
        f"Dates {dates[0][:10]} to {dates[-1][:10]}; versions: "
        + ", ".join(f"{name} {number}" for name, number in any_run["versions"].items())
        + ".",
        "",
        "SmolLM2-135M-Instruct is decoder-only and instruction-tuned by its authors. The T5 (21 million weights, 4 + 4",
        f"layers of width 256, SmolLM2's tokenizer) was random and was trained here for {T5_STEPS} steps of {T5_BATCH}"
        " rows on the other fourteen",
        "tasks: Init, in small. One seed and 20 rows: differences of some points mean nothing.",
        "",
        f"`lcia` makes {groups(found['smollm2-lcia'])} groups of the five tasks at its threshold of 0.9. Where each"
        " task has a group",
        "of its own, nothing is averaged, and nothing is forgotten but by routing: one LoRA per task, found again by",
        "its definition. `llaca` is the same average on one adapter for all tasks.",
        "",
        "Training rows left out because prompt or answer is too long (`max_length`, for the T5 `max_new_tokens` too): "
        f"SmolLM2 {left_out(found['smollm2-lora'])}, T5 {left_out(found['t5-lora'])}.",
        "",
        "The last task asks for one of two labels, the four before it for sentences: a method that lets go answers all",
        "of them with a label. That is nearly all that five tasks measure, and why several methods have one AR.",
        "",
        "| method | SmolLM2: AR | FWT | BWT | small T5: AR | FWT | BWT | published: AR | FWT | BWT |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in METHODS:
        published = " | ".join("–" if value is None else f"{value:.1f}" for value in PUBLISHED[name])
        lines.append(f"| `{name}` | {cells(found[f'smollm2-{name}'])} | {cells(found[f't5-{name}'])} | {published} |")
    before = [sum(found[f"{label}-lora"]["matrix"][0]) / len(TASKS) for label in ("smollm2", "t5")]
    lines += [
        f"| before (row 0) | {before[0]:.1f} | – | – | {before[1]:.1f} | – | – | 22.5 | – | – |",
        "",
        "Published: Table 8 of LCIA, t5-small-lm-adapt with all weights trained, all nineteen tasks, two seeds; `lora`",
        "stands beside its fine-tuning after Init. Other model, other data, other size: absolutes are not comparable.",
        "",
    ]
    write_text(ROOT / "results" / f"{STUDY}.md", "\n".join(lines))


if __name__ == "__main__":
    os.environ.setdefault("LCIA_DATA", str(Path("..") / "shared" / "data"))
    os.chdir(ROOT)
    decoder_only = run_all(STUDY, runs("smollm2-135m", "smollm2"))
    build_t5()
    write_tables({**decoder_only, **run_all(STUDY, runs(str(T5.relative_to(ROOT)), "t5"))})
