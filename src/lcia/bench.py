"""Benchmarks by name: a published protocol as a configuration, a run for each method, order and seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from lcia.config import RunConfig, apply_overrides, parse_config
from lcia.errors import UserError, did_you_mean
from lcia.results import method_name


@dataclass(frozen=True)
class Benchmark:
    """A stream with orders, and the settings under which methods are compared on it."""

    title: str
    source: str
    orders: tuple[int, ...]
    settings: dict[str, Any]
    reported: dict[str, str]  # the benchmark's name of a metric → ours


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
            "lr_scheduler_type": "constant",
            # CITB's for its adapters; its 1e-5 is for training all weights, of which LoRA would learn next to nothing
            "learning_rate": 1e-3,
        },
        reported={"AR": "avg_acc", "FWT": "fwt", "BWT": "bwt"},
    )
}


def bench_config(
    name: str,
    method: str,
    order: int = 1,
    seed: int = 0,
    model: str | None = None,
    data: str | None = None,
    overrides: list[str] | None = None,
) -> RunConfig:
    """The configuration of one run of a benchmark; it goes to runs/bench/NAME/METHOD-orderN-seedS.

    Args:
        method: a name, or YAML with options: `{name: lcia, threshold: 0.3}`.
        model: instead of the protocol's.
        data: the folder with the benchmark's data; None: where the stream looks by itself.
        overrides: key=value, over the protocol.

    Raises:
        UserError: an unknown benchmark or order, or a value that a configuration refuses.
    """
    if name not in BENCHMARKS:
        raise UserError(f"bench: unknown benchmark {name!r}. {did_you_mean(name, BENCHMARKS)}")
    benchmark = BENCHMARKS[name]
    if order not in benchmark.orders:
        raise UserError(f"bench: {name} has the orders {', '.join(map(str, benchmark.orders))}, not {order}")
    try:
        spec = yaml.safe_load(method)
    except yaml.YAMLError:
        raise UserError(f"bench: --method {method!r} is neither a name nor valid YAML") from None
    values = {
        **benchmark.settings,
        "stream": {"name": name, "order": order, **({} if data is None else {"path": data})},
        "method": spec,
        "seed": seed,
        "output_dir": "",
        **({} if model is None else {"model": model}),
    }
    config = parse_config(apply_overrides(values, overrides or []), where=f"bench {name}")
    if not config.output_dir:
        config.output_dir = f"runs/bench/{name}/{method_name(config)}-order{order}-seed{config.seed}"
    return config
