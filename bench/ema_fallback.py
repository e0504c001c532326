"""How often each averaging rule falls back to the constant, and what of the start point it retains.

    python bench/ema_fallback.py                     # results/ema_fallback.md
    python bench/ema_fallback.py --model FOLDER --out page.md
    python bench/ema_fallback.py --networks-only

Rules do not change a training, so all of them watch the same one: two tasks one after the other, of which the second is
reported (`fisher` has its importance from the first). LoRA on all linear layers learns travel_intent, then
banking_intent of the stream `assistant`; the networks are width → width → width with tanh and learn two random
functions. The constant is 0.99: a rule that always falls back retains 0.99^steps. About 4 minutes on one core.

    fell back   share of (tensor, step) pairs whose β was not in (0, 1); the first step of eq* and released counts.
                Of eq12, share of elements.
    retained    mean over tensors of Π β after the second task
    β           median over tensors in the last step
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from lcia.ema import RULES, DynamicEMA

WIDTHS = (64, 128, 256, 512, 1024, 2048)
RANKS = (8, 128)


def watch(
    model: nn.Module, losses: list[Iterator[Callable[[], Tensor]]], steps: int, examples: int
) -> list[DynamicEMA]:
    """Train on one task after the other; the averages of all rules over the last one."""
    importance = None
    watching: list[DynamicEMA] = []
    for task in losses:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        watching = [
            DynamicEMA(
                model.named_parameters(),
                rule=rule,
                total_steps=steps,
                importance=importance if rule == "fisher" else None,
                examples_per_gradient=examples,
            )
            for rule in RULES
        ]
        for _, loss in zip(range(steps), task, strict=False):
            loss().backward()
            optimizer.step()
            for ema in watching:
                ema.step()
            optimizer.zero_grad()
        importance = next(ema.importance for ema in watching if ema.rule == "fisher")
    return watching


def network(width: int, seed: int = 0) -> tuple[nn.Module, list[Iterator[Callable[[], Tensor]]]]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def task() -> Iterator[Callable[[], Tensor]]:
        target = torch.randn(width, width) / width**0.5
        while True:
            x = torch.randn(16, width)
            yield lambda x=x: (net(x) - x @ target).square().mean()

    return net, [task(), task()]


def lora(folder: str, rank: int, rows: int, seed: int = 0) -> tuple[nn.Module, list[Iterator[Callable[[], Tensor]]]]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lcia import load_stream

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    tasks = {task.name: task for task in load_stream("assistant")}

    def task(name: str) -> Iterator[Callable[[], Tensor]]:
        examples = iter(tasks[name].train)
        while True:
            batch = [next(examples) for _ in range(rows)]
            texts = [f"{row.messages[-1][1]}\n{row.outputs[0]}" for row in batch]
            encoded = tokenizer(texts, padding=True, return_tensors="pt")
            labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
            yield lambda encoded=encoded, labels=labels: model(**encoded, labels=labels).loss

    return model, [task("travel_intent"), task("banking_intent")]


def lines(setting: str, watching: list[DynamicEMA]) -> Iterator[str]:
    for ema in watching:
        retained = statistics.fmean(ema.retained_mass.values())
        beta = statistics.median(ema.betas.values())
        yield f"| {setting} | {ema.rule} | {ema.fallback_fraction:.1%} | {retained:.3f} | {beta:.4f} |"


def page(table: list[str], model: str) -> str:
    from lcia.results import library_versions

    versions = ", ".join(f"{name} {number}" for name, number in library_versions().items())
    return "\n".join(
        [
            "# How often the published rules fall back",
            "",
            f"Command: `python bench/ema_fallback.py` ({datetime.now(UTC).date()}, {versions}).",
            f"All rules watch the same training, one seed: LoRA on {model} (travel_intent, then banking_intent), and",
            "random networks of one hidden layer. The second task is reported. The constant is 0.99.",
            "",
            "- fell back: share of (tensor, step) pairs whose β was not in (0, 1), the first step included; of eq12,",
            "  share of elements",
            "- retained: mean over tensors of Π β; a rule that always falls back has 0.99^steps",
            "- β: median over tensors in the last step",
            "",
            *table,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a name, hub id or folder of a causal language model")
    parser.add_argument("--networks-only", action="store_true", help="no model; nothing is written")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "ema_fallback.md")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of each LoRA task")
    parser.add_argument("--network-steps", type=int, default=30, help="optimizer steps of each network task")
    parser.add_argument("--rows", type=int, default=4, help="rows of a LoRA step")
    arguments = parser.parse_args()
    table = ["| trained | rule | fell back | retained | β |", "|---|---|---|---|---|"]

    def show(setting: str, watching: list[DynamicEMA]) -> None:
        found = list(lines(setting, watching))
        table.extend(found)
        print("\n".join(found), flush=True)

    for width in WIDTHS:
        net, losses = network(width)
        steps = arguments.network_steps
        show(f"network of width {width}, {steps} steps", watch(net, losses, steps, examples=16))
    if arguments.networks_only:
        return
    from lcia.backbone import find_model

    for rank in RANKS:
        model, losses = lora(str(find_model(arguments.model)), rank, arguments.rows)
        watching = watch(model, losses, arguments.steps, examples=arguments.rows)
        show(f"{Path(arguments.model).name}, LoRA r={rank}, {arguments.steps} steps", watching)
    arguments.out.write_text(page(table, Path(arguments.model).name), encoding="utf-8")


if __name__ == "__main__":
    main()
