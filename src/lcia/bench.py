"""Benchmarks by name: a published protocol as a configuration, a run for each method, order and seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lcia.config import RunConfig, apply_overrides, parse_config
from lcia.errors import UserError, did_you_mean
from lcia.methods import build_method
from lcia.progress import Reporter
from lcia.results import method_name
from lcia.stream.coast import find_manifest
from lcia.stream.inventory import Inventory, take_inventory, total_bytes
from lcia.stream.sources import find


@dataclass(frozen=True)
class Benchmark:
    """A stream with orders, and the settings under which methods are compared on it."""

    title: str
    source: str
    settings: dict[str, Any]
    orders: tuple[int | str, ...] = ()  # the first one is the default; empty: there is one order only
    options: dict[str, tuple[str, ...]] = field(default_factory=dict)  # of the stream, and the values of each
    reported: dict[str, str] = field(default_factory=dict)  # the benchmark's name of a metric → ours
    # kind of instructions → the threshold of methods that group by them, where it is not those methods' own
    thresholds: dict[str, float] = field(default_factory=dict)


ACCURACY = {"Avg.ACC": "avg_acc", "Forgetting": "forgetting", "New.ACC": "new_acc"}
# LCIA's settings for LLaVA-1.5 (Appendix J), one batch size for all tasks; its projector was pretrained only, while the
# hub's LLaVA-1.5 has seen much of CoIN in its own instruction tuning: docs/concepts/vision-streams.md.
LLAVA = {
    "model": "llava-hf/llava-1.5-7b-hf",
    # the conversation vicuna_v1, in which LLaVA-1.5, CoIN and LCIA write every prompt
    "system": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions.",
    "image_padding": "square",  # CoIN's boxes are fractions of the padded image; the hub's processor would crop it
    "max_length": 2048,
    "max_new_tokens": 64,
    "lora_r": 128,
    "lora_alpha": 256,
    "lora_dropout": 0.05,
    "learning_rate": 2e-4,
    "projector_learning_rate": 2e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    # 16 rows of a 7B model fit no GPU without, nor do keys and values of 40 prompts beside it: docs/coin-on-gpus.md
    "activation_checkpointing": True,
    "per_device_eval_batch_size": 16,
}
THRESHOLDS = {"diverse": 0.3, "10type": 0.3}  # LCIA §4.4: 0.9 is for original instructions

BENCHMARKS = {
    "instrdialog": Benchmark(
        title="19 dialogue tasks of Super-NaturalInstructions, 500 rows each, definition + 2 examples, ROUGE-L",
        source="CITB, Zhang et al., Findings of EMNLP 2023",
        orders=(1, 2, 3),
        settings={
            "model": "google/t5-small-lm-adapt",
            "max_length": 1024,
            "max_new_tokens": 128,
            "per_device_train_batch_size": 8,
            "num_train_epochs": 15,
            "early_stopping_patience": 3,
            "lr_scheduler_type": "constant",
            # CITB's for its adapters; its 1e-5 is for training all weights, of which LoRA would learn next to nothing
            "learning_rate": 1e-3,
        },
        reported={"AR": "avg_acc", "FWT": "fwt", "BWT": "bwt"},
    ),
    "vision": Benchmark(
        title="six small image tasks: land use, clothing, short answers, boxes, receipts, true or false",
        source="EuroSAT, clothing-dataset-small, COCO, BCCD, SROIE, NLVR; 3,039 rows in all",
        settings={"model": "lite-llava", "max_new_tokens": 40},
        reported=ACCURACY,
    ),
    "coin": Benchmark(
        title="eight image tasks: ScienceQA, TextVQA, ImageNet, GQA, VizWiz, Grounding, VQAv2, OCR-VQA",
        source="CoIN, Chen et al., arXiv 2403.08350; settings of LCIA, Qiao et al., ICML 2025",
        orders=("origin", "reverse", "alphabet"),
        options={"instructions": ("origin", "diverse", "10type"), "scoring": ("strict", "released")},
        settings=LLAVA,
        reported=ACCURACY,
        thresholds=THRESHOLDS,
    ),
    "coast": Benchmark(
        title="domains, capabilities or data sets: a reconstruction, not comparable with published COAST numbers",
        source="Continual LLaVA, Cao et al., arXiv 2411.02564; settings of LCIA",
        options={"configuration": ("domain", "capability", "dataset")},
        settings={**LLAVA, "max_new_tokens": 256},
        reported={"average accuracy": "avg_acc", "average forgetting": "forgetting"},
        thresholds=THRESHOLDS,
    ),
}


def _benchmark(name: str, options: Mapping[str, str]) -> Benchmark:
    if name not in BENCHMARKS:
        raise UserError(f"bench: unknown benchmark {name!r}. {did_you_mean(name, BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    for key, value in options.items():
        if key not in benchmark.options:
            hint = did_you_mean(key, benchmark.options) if benchmark.options else "It takes none."
            raise UserError(f"bench: {name} has no option {key!r}. {hint}")
        if value not in benchmark.options[key]:
            raise UserError(f"bench: {name}: {key} is one of {', '.join(benchmark.options[key])}, not {value!r}")
    return benchmark


def parse_options(pairs: list[str]) -> dict[str, str]:
    """The options of a benchmark's stream from `key=value` texts."""
    options = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator:
            raise UserError(f"bench: --option {pair!r} is not key=value")
        options[key] = value
    return options


def bench_config(
    name: str,
    method: str,
    order: int | str | None = None,
    seed: int = 0,
    model: str | None = None,
    data: str | None = None,
    overrides: list[str] | None = None,
    options: Mapping[str, str] | None = None,
) -> RunConfig:
    """The configuration of one run of a benchmark; it goes to runs/bench/NAME/METHOD-ORDER-OPTIONS-seedS.

    Args:
        method: a name, or YAML with options: `{name: lcia, threshold: 0.3}`.
        order: one of the benchmark's; None: its first.
        model: instead of the protocol's.
        data: the folder with the benchmark's data; None: where the stream looks by itself.
        overrides: key=value, over the protocol.
        options: of the benchmark's stream, such as {"instructions": "diverse"}.

    Raises:
        UserError: an unknown benchmark, order or option, or a value that a configuration refuses.
    """
    options = dict(options or {})
    benchmark = _benchmark(name, options)
    stream: dict[str, Any] = {"name": name}
    label = []
    if benchmark.orders:
        by_text = {str(one): one for one in benchmark.orders}
        chosen = str(benchmark.orders[0] if order is None else order)
        if chosen not in by_text:
            raise UserError(f"bench: {name} has the orders {', '.join(by_text)}, not {order}")
        stream["order"] = by_text[chosen]
        label.append(f"order{chosen}" if isinstance(stream["order"], int) else chosen)
    elif order is not None:
        raise UserError(f"bench: {name} has one order of its tasks; leave out --order")
    stream |= options
    label += options.values()
    try:
        spec = yaml.safe_load(method)
    except yaml.YAMLError:
        raise UserError(f"bench: --method {method!r} is neither a name nor valid YAML") from None
    values = {
        **benchmark.settings,
        "stream": {**stream, **({} if data is None else {"path": data})},
        "method": spec,
        "seed": seed,
        "output_dir": "",
        **({} if model is None else {"model": model}),
    }
    config = parse_config(apply_overrides(values, overrides or []), where=f"bench {name}")
    kind = _kind_of_instructions(config.stream)
    if kind in benchmark.thresholds:
        config.method = _with_threshold(config.method, benchmark.thresholds[kind])
    if not config.output_dir:
        parts = [method_name(config), *label, f"seed{config.seed}"]
        config.output_dir = f"runs/bench/{name}/{'-'.join(parts)}"
    return config


def _kind_of_instructions(stream: Any) -> str:
    """Of CoIN's, where a stream is made of them: the stream's option, or what COAST's manifest says."""
    if not isinstance(stream, dict):
        return ""
    if stream.get("name") == "coast":
        try:
            _, manifest = find_manifest(stream.get("configuration", "domain"), stream.get("path"))
        except UserError:  # a configuration can be made without the data; what is wrong is said when they are read
            return ""
        return "" if manifest.coin is None else manifest.coin.instructions.casefold()
    return str(stream.get("instructions")).casefold()


def _with_threshold(spec: Any, threshold: float) -> Any:
    """A configuration's method with this threshold where it makes groups by instructions and states none."""
    if isinstance(spec, list):
        return [_with_threshold(part, threshold) for part in spec]
    options = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = options.pop("name")
    if "threshold" in options or build_method([(name, options)]).codebook is None:
        return spec
    return {"name": name, **options, "threshold": threshold}


def prepare(name: str, data: str | None, options: Mapping[str, str], reporter: Reporter) -> Inventory:
    """What of a benchmark's data is there.

    Args:
        data: the folder with the data; None: where the stream looks by itself.
        options: of the benchmark's stream: they decide which files are its.

    Raises:
        UserError: an unknown benchmark or option, or no such folder.
    """
    _benchmark(name, options)
    found = find({"name": name, **options, **({} if data is None else {"path": str(Path(data))})})
    megabytes = 1 << 20
    read = 0

    def on_bytes(size: int) -> None:
        nonlocal read
        before, read = read, read + size
        reporter.advance(read // megabytes - before // megabytes)

    reporter.start(f"{name}: MB of rows read", total=total_bytes(found) // megabytes)
    return take_inventory(found, on_bytes)
