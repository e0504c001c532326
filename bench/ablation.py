"""What each way of being fast adds: to a training step and to answering, alone and to all the others.

    python bench/ablation.py                # about twenty minutes on 2 CPU cores
    python bench/ablation.py --json out.json

Each is switched off by what stands there without it. `alone`: all off, against all off but this one. `together`: all
on but this one, against all on. Training steps are those of bench/training.py; answers are those of the untrained model
to sixty requests of each task, in batches of the default size. Each variant has a process of its own, in turns, and the
fastest round counts. A variant whose losses are not the others', but for bfloat16's rounding, or whose replacement was
never called, stops everything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lcia.machine import start_again_without_small_caches
from training import by_lcia, config_of

WAYS = {
    "packing": "a batch's tokens in one line: no padding, and what all rows begin with once",
    "logits": "logits of answer tokens alone, asked for by index",
    "lora": "LoRA added in the output's memory, scaled where it is narrow (lcia.adapters.lora)",
    "attention": "eager attention on a CPU, where fused attention's backward pass is slow in bfloat16",
}
ANSWERING = {
    "packing": "prompts in one line, what all begin with once; who has ended leaves the batch",
    "logits": "logits of the last token, asked for by index",
    "lora": "LoRA in the base model's dtype, added in the output's memory (lcia.adapters.lora)",
    "sorting": "batches of like length",
}
ANSWERING_FLOAT32 = {"products": "float32 products by oneDNN instead of MKL (backbone/products.py)"}
PROMPTS = 60  # a task: a batch and a half
NEW_TOKENS = 12
CLOSE = 0.02  # Σ|difference| / Σ loss of all steps, up to which it is bfloat16's: single losses differ by up to 6 %


def whole_logits(self: Any, model: Any, batch: Mapping[str, Any]) -> Any:
    """The logits of every token, of which those before an answer token are taken."""
    from lcia.backbone import packing
    from lcia.backbone.layout import IGNORED

    targets = batch["labels"][:, 1:]
    kept = targets != IGNORED
    packed = self._packed(packing.of_batch, model, batch)
    if packed is not None:
        with packing.passing(model, packed) as mask:
            logits = model(**self._line(batch, packed), attention_mask=mask, use_cache=False).logits
        return logits[0, packed.asked].float(), targets[kept]
    passed = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    logits = model(**passed, use_cache=False).logits[:, -batch["labels"].shape[1] :]
    return logits[:, :-1][kept].float(), targets[kept]


class WithLogitsOfAll:
    """A model that is never asked by index: for the last logits of one token, or for those of all."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, logits_to_keep: Any, **options: Any) -> Any:
        if options["input_ids"].shape[1] == 1:
            return self._model(**options, logits_to_keep=1)
        output = self._model(**options)
        output.logits = output.logits[:, logits_to_keep]
        return output


@contextlib.contextmanager
def without(name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """`replacement` in the place of the function of that name; it must be called."""
    calls = 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return replacement(*arguments, **options)

    with patch(name, counted, create=True):  # a built-in function is found in a module only when it is put there
        yield
    if not calls:
        raise SystemExit(f"{name} was replaced and never asked for: this switch switches nothing")


def train(off: set[str], steps: int, model: str) -> dict[str, Any]:
    with contextlib.ExitStack() as changed, tempfile.TemporaryDirectory() as folder:
        config = config_of(Path(folder), steps, "bfloat16", model)
        if "packing" in off:
            changed.enter_context(without("lcia.backbone.packing.of_batch", lambda *_: None))
        if "logits" in off:
            changed.enter_context(without("lcia.backbone.layout.DecoderOnly.answer_logits", whole_logits))
        if "lora" in off:
            changed.enter_context(without("lcia.adapters.pool.use_own_forward", lambda _: None))
        if "attention" in off:
            config.attn_implementation = "sdpa"
        found = by_lcia(config)
    return {"seconds": found["seconds"] / len(found["losses"]), "losses": found["losses"]}


def answer(off: set[str], model: str, dtype: str) -> dict[str, Any]:
    from torch.nn.functional import linear
    from transformers.generation.utils import GenerationMixin

    from lcia.adapters import AdapterPool
    from lcia.backbone import load_backbone
    from lcia.backbone.decoding import greedy
    from lcia.config import RunConfig
    from lcia.evaluation import Decoding, generate_answers
    from lcia.machine import limit_kept_kernels
    from lcia.stream import load_stream

    limit_kept_kernels()
    backbone = load_backbone(model, dtype)
    reader = backbone.reader
    lists = [[reader.encode_prompt(row) for row in task.test[:PROMPTS]] for task in load_stream("assistant")]
    decoding = Decoding(NEW_TOKENS, RunConfig.model_fields["per_device_eval_batch_size"].default, 1024)
    generate = GenerationMixin.generate

    def sliced(self: Any, *arguments: Any, logits_to_keep: Any, **options: Any) -> Any:
        return generate(self, *arguments, **options, logits_to_keep=1)

    def of_all(model: Any, *arguments: Any) -> Any:
        return greedy(WithLogitsOfAll(model), *arguments)

    with contextlib.ExitStack() as changed:
        if "packing" in off:
            changed.enter_context(without("lcia.backbone.packing.of_prompts", lambda *_: None))
        if "logits" in off and "packing" in off:
            changed.enter_context(without("transformers.generation.utils.GenerationMixin.generate", sliced))
        elif "logits" in off:
            changed.enter_context(without("lcia.backbone.layout.greedy", of_all))
        if "products" in off:
            changed.enter_context(without("lcia.backbone.products._multiply", linear))
        if "sorting" in off:
            changed.enter_context(without("lcia.evaluation.sorted", lambda part, key=None: list(part)))
        if "lora" in off:
            changed.enter_context(without("lcia.adapters.pool.use_own_forward", lambda _: None))
        pool = AdapterPool(backbone.model, {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}, model, 0)
        pool.add("one")
        began = time.monotonic()
        answers = [one for asked in lists for one in generate_answers(pool, reader, ["one"] * PROMPTS, asked, decoding)]
        seconds = time.monotonic() - began
    return {"seconds": seconds, "answers": answers}


def compare(ways: Mapping[str, str], run: Callable[[frozenset[str]], dict[str, Any]], rounds: int) -> dict[str, Any]:
    """{seconds: {all, none}, alone, together: {way: ratio}, others: by variant, what else it gave}."""
    everything = frozenset(ways)
    variants = {frozenset(), everything, *(everything - {way} for way in ways), *(frozenset({way}) for way in ways)}
    fastest: dict[frozenset[str], float] = {}
    gave: dict[frozenset[str], dict[str, Any]] = {}
    for _ in range(rounds):
        for off in sorted(variants, key=sorted):
            print(f"without {', '.join(sorted(off)) or 'nothing'}", file=sys.stderr, flush=True)
            gave[off] = run(off)
            fastest[off] = min(gave[off].pop("seconds"), fastest.get(off, float("inf")))
    none, whole = fastest[everything], fastest[frozenset()]
    return {
        "seconds": {"all": whole, "none": none},
        "alone": {way: none / fastest[everything - {way}] for way in ways},
        "together": {way: fastest[frozenset({way})] / whole for way in ways},
        "gave": {"+".join(sorted(off)): values for off, values in gave.items()},
    }


def apart(*arguments: str) -> Callable[[frozenset[str]], dict[str, Any]]:
    """`train` or `answer`, with the arguments, in a process of its own."""

    def run(off: frozenset[str]) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, __file__, *arguments, "--off", ",".join(off)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )
        return dict(json.loads(done.stdout.splitlines()[-1]))

    return run


def measure_training(steps: int, rounds: int, model: str) -> dict[str, Any]:
    """`compare`, and in `differing` Σ|difference| / Σ loss against all switched on."""
    found = compare(WAYS, apart("--train", "--steps", str(steps), "--model", model), rounds)
    losses = {off: values["losses"] for off, values in found.pop("gave").items()}
    expected = losses[""]
    found["differing"] = {
        off: sum(abs(a - b) for a, b in zip(values, expected, strict=True)) / sum(expected)
        for off, values in losses.items()
    }
    for off, difference in found["differing"].items():
        if difference > CLOSE:
            raise SystemExit(f"without {off} the losses are {losses[off]}, with it {expected}")
    return found


def measure_answering(rounds: int, model: str, dtype: str = "bfloat16") -> dict[str, Any]:
    """`compare`, and how many answers differ in `differing`."""
    ways = ANSWERING if dtype == "bfloat16" else ANSWERING_FLOAT32
    found = compare(ways, apart("--answer", "--model", model, "--dtype", dtype), rounds)
    answers = {off: values["answers"] for off, values in found.pop("gave").items()}
    expected = answers[""]
    found["differing"] = {
        off: sum(a != b for a, b in zip(values, expected, strict=True)) for off, values in answers.items()
    }
    return {**found, "answers": len(expected)}


def _table(found: Mapping[str, Any], ways: Mapping[str, str], unit: str) -> list[str]:
    seconds = found["seconds"]
    lines = [f"| {unit} | alone | together |", "|---|---|---|"]
    lines += [f"| {what} | {found['alone'][way]:.2f}x | {found['together'][way]:.2f}x |" for way, what in ways.items()]
    lines.append(
        f"| all of them: {seconds['none']:.2f} s → {seconds['all']:.2f} s | | {seconds['none'] / seconds['all']:.2f}x |"
    )
    return lines


def table(training: Mapping[str, Any], answering: Mapping[str, Any], answering_float32: Mapping[str, Any]) -> str:
    asked = f"{answering['answers']} answers"
    most = max(answering["differing"].values())
    return "\n".join(
        [
            *_table(training, WAYS, "a training step"),
            "",
            *_table(answering, ANSWERING, asked),
            "",
            f"At most {most} of {asked} differ between two variants, and the losses by at most "
            f"{max(training['differing'].values()):.1%} of their sum: bfloat16 rounds sums in another order otherwise.",
            "",
            *_table(answering_float32, ANSWERING_FLOAT32, f"{answering_float32['answers']} answers in float32"),
            "",
            f"{max(answering_float32['differing'].values())} of them differ.",
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=2, help="of a task")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--off", default="", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.train or chosen.answer:
        start_again_without_small_caches()  # as the command does
    off_ways = set(filter(None, chosen.off.split(",")))
    if chosen.train:
        print(json.dumps(train(off_ways, chosen.steps, chosen.model)))
        sys.exit()
    if chosen.answer:
        print(json.dumps(answer(off_ways, chosen.model, chosen.dtype)))
        sys.exit()
    measured = {
        "training": measure_training(chosen.steps, chosen.rounds, chosen.model),
        "answering": measure_answering(chosen.rounds, chosen.model),
        "answering_float32": measure_answering(chosen.rounds, chosen.model, "float32"),
    }
    print(table(**measured))
    if chosen.json:
        chosen.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
