"""results.json: everything a run measured, from its ledger and its configuration."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from lcia.adapters import Pool, stack_members
from lcia.backbone import products
from lcia.config import RunConfig
from lcia.ema import compiled
from lcia.methods import Placement
from lcia.metrics import accuracy_metrics
from lcia.processes import count
from lcia.stream import Stream

_LIBRARIES = (
    "lcia",
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "accelerate",
    "scikit-learn",
    "safetensors",
    "pillow",
    "rouge-score",
)

CIRCUMSTANCES = ("versions", "machine", "processes")
_INIT = ("tasks", "train_s", "left_out", "rounding", "trained_parameters", "peak_memory_mib")


def assemble_results(
    began: Mapping[str, Any],
    config: RunConfig,
    stream: Stream,
    placements: Mapping[str, Placement],
    stages: Sequence[Mapping[str, Any]],
    rows: Mapping[int, Mapping[str, Any]],
    sequential: bool,
    parameters: Mapping[str, int],
    init: Mapping[str, Any] | None = None,
    went_on: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The document.

    Args:
        began: the ledger's `run_began` line.
        stages: the ledger's `stage_learned` lines.
        rows: matrix row → the ledger's `row_measured` line.
        sequential: the tasks were learned one after another; else only Avg.ACC is defined.
        parameters: see `parameter_counts`.
        init: the ledger's `init_learned` line, of a run with an Init stage.
        went_on: the ledger's `went_on` lines: from there on it was computed elsewhere, or with other libraries.
    """
    names = [task.name for task in stream]
    matrix = [[rows[j]["scores"].get(name) if j in rows else None for name in names] for j in range(len(names) + 1)]
    final = rows[len(names)]
    groups = {name: placements[name].adapter if name in placements else None for name in names}
    averaged = {record["stage"]: record["ema"] for record in stages if record["ema"]}
    shares = [ema["fallback_fraction"] for ema in averaged.values()]
    return {
        "method": method_name(config),
        "method_options": [{"name": name, **options} for name, options in config.method_parts()],
        "model": config.model,
        "stream": stream.name,
        "seed": config.seed,
        "eval_split": config.eval_split,
        "tasks": names,
        "scorers": {task.name: task.scorer for task in stream},
        "groups": groups,
        "group_scores": {name: placement.scores for name, placement in placements.items()},
        "matrix": matrix,
        "metrics": metrics_of(matrix, sequential),
        "routing": _routing(final, groups),
        "ema": {
            "fallback_fraction": sum(shares) / len(shares) if shares else None,
            "retained_mass": {stage: ema["retained_mass"] for stage, ema in averaged.items()},
        },
        **({} if init is None else {"init": {key: value for key, value in init.items() if key in _INIT}}),
        "left_out": {record["stage"]: record["left_out"] for record in stages if record["left_out"]},
        "too_long": final["too_long"],
        "cost": {
            "train_s": sum(record["train_s"] for record in stages),
            "eval_s": sum(record["eval_s"] for record in rows.values()),
            "evaluations_run": sum(record["evaluations_run"] for record in rows.values()),
            "evaluations_reused": sum(record["evaluations_reused"] for record in rows.values()),
            "peak_memory_mib": max(record["peak_memory_mib"] for record in [*stages, *rows.values()]),
            # of the largest adapter that a task trained; of the whole pool as it is now
            "trained_parameters": max((parameters[one.adapter] for one in placements.values()), default=0),
            "stored_parameters": sum(parameters.values()),
            **_method_cost([*stages, *rows.values()]),
        },
        **{key: began[key] for key in CIRCUMSTANCES if key in began},  # lines of older versions tell of no processes
        "went_on": [{key: record[key] for key in ("at", *CIRCUMSTANCES)} for record in went_on],
        "date": max(record["at"] for record in [*stages, *rows.values()]),
    }


def metrics_of(matrix: Sequence[Sequence[float | None]], sequential: bool) -> dict[str, float | None]:
    """The metrics of an accuracy matrix; without an order of tasks nothing is new, forgotten or transferred."""
    metrics = dict(accuracy_metrics(matrix))
    return {key: value if sequential or key == "avg_acc" else None for key, value in metrics.items()}


def parameter_counts(pool: Pool) -> dict[str, int]:
    """{adapter: numbers in its weights}; a task trains those of one adapter, the pool stores them all."""
    return {name: sum(weights.numel() for weights in pool.parameters(name).values()) for name in pool.names}


def _method_cost(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Passes are summed over stages and rows; what is stored is what the last stage left."""
    total: dict[str, float] = {}
    for record in records:
        for key, value in record["method_cost"].items():
            total[key] = value if key.endswith("_stored") else total.get(key, 0) + value
    return total


def _routing(final: Mapping[str, Any], groups: Mapping[str, str | None]) -> dict[str, Any]:
    """How the last row's requests were sent, against the group that learned each task."""
    confusion: Mapping[str, Mapping[str, int]] = final["routing"]
    asked = sum(sum(counts.values()) for counts in confusion.values())
    right = 0
    for name, counts in confusion.items():
        # one stack of adapters answers for the tasks of all of them
        right += sum(n for group, n in counts.items() if (groups[name] or "") in stack_members(group))
    return {
        "accuracy": 100.0 * right / asked,
        "oracle": final["oracle"],  # task → score with the group that learned it
        "oracle_avg_acc": sum(final["oracle"].values()) / len(final["oracle"]),
        "base_model_answers": sum(counts.get("", 0) for counts in confusion.values()),
        "confusion": confusion,  # task → {group, "" for the base model: requests}
    }


def method_name(config: RunConfig) -> str:
    return "+".join(name for name, _ in config.method_parts())


def method_line(config: RunConfig) -> str:
    """The method and its options as the configuration states them, in one line of YAML."""
    # a text alone is followed by a line with the end of the document
    written = yaml.safe_dump(config.method, default_flow_style=True, width=math.inf, sort_keys=False)
    return written.partition("\n")[0]


def library_versions() -> dict[str, str]:
    return {"python": sys.version.split()[0], **{name: version(name) for name in _LIBRARIES}}


def version_if_there(package: str) -> str | None:
    """The installed one."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def circumstances() -> dict[str, Any]:
    """With what a run is computed, and by how many processes, each with a batch of its own."""
    return {"versions": library_versions(), "machine": machine(), "processes": count()}


def machine() -> dict[str, Any]:
    """In bfloat16 the order of a sum decides its last digits: another device or thread count is another run."""
    if torch.cuda.is_available():
        return {"device": "cuda", "kernels": torch.cuda.get_device_name(), "threads": torch.get_num_threads()}
    kernels = f"{torch.backends.cpu.get_cpu_capability()}{', bf16' if torch.cpu._is_avx512_bf16_supported() else ''}"
    return {
        "device": "cpu",
        "kernels": kernels,
        "float32": products.library(),
        "threads": torch.get_num_threads(),
        "averages": "torch" if compiled.library() is None else "compiled",
    }


def peak_memory_mib() -> float:
    """The highest resident memory of this process so far; on a GPU the highest allocation there."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "linux":
        # getrusage has the highest of the process that began this one, too, where that is higher
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (1024 * 1024 if sys.platform == "darwin" else 1024)  # macOS counts bytes
