"""What studies share: run a list of configurations, one result file each, going on where an interrupted study stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lcia.config import parse_config
from lcia.files import write_text
from lcia.machine import keep_freed_memory
from lcia.progress import Reporter
from lcia.run import resume, train

ROOT = Path(__file__).resolve().parents[1]


def run_all(study: str, runs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Run each configuration that has no result file yet.

    Run folders lie under runs/studies/STUDY/NAME (not committed); results/STUDY/NAME.json is a run's results.json.

    Returns:
        {name: results}, in the order given.
    """
    torch.set_num_threads(int(os.environ.get("LCIA_THREADS", os.cpu_count() or 1)))
    keep_freed_memory()
    results: dict[str, dict[str, Any]] = {}
    for name, values in runs.items():
        kept = ROOT / "results" / study / f"{name}.json"
        folder = ROOT / "runs" / "studies" / study / name
        if not kept.is_file():
            config = parse_config({**values, "output_dir": str(folder)}, where=f"{study}/{name}")
            with Reporter() as reporter:
                found = resume(folder, reporter) if (folder / "config.yaml").is_file() else train(config, reporter)
            write_text(kept, json.dumps(found, indent=1) + "\n")
        results[name] = json.loads(kept.read_text(encoding="utf-8"))
    return results


def mean_and_spread(values: list[float | None]) -> str:
    """`mean ± sample standard deviation`, or a dash where it is not defined for the method."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = sum(known) / len(known)
    if len(known) == 1:
        return f"{mean:.1f}"
    spread = (sum((value - mean) ** 2 for value in known) / (len(known) - 1)) ** 0.5
    return f"{mean:.1f} ± {spread:.1f}"
