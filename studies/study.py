"""What studies share: run a list of configurations, one result file each, going on where a study stopped."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from scipy import stats

from lcia.files import write_text
from lcia.jobs import Job, carry_out, run_here
from lcia.report.statistics import paired_t_test

ROOT = Path(__file__).resolve().parents[1]


def run_all(
    study: str, runs: Mapping[str, Mapping[str, Any]], jobs: int = 0, first_task_of: Mapping[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """Run each configuration that has no result file yet, `jobs` at a time, each in a process of its own.

    Run folders lie under runs/studies/STUDY/NAME (not committed); results/STUDY/NAME.json is a run's results.json.
    jobs: 0 = one per CPU core. One thread each: two small models on a core each are faster than one on both.
    first_task_of: {name: finished run whose first task this one takes over instead of training the same again}.

    Returns:
        {name: results}, in the order given.
    """
    shared = first_task_of or {}
    pending = [name for name in runs if not _kept(study, name).is_file()]
    commands = {name: _command(study, name, runs[name], shared.get(name)) for name in pending}
    _carry_out(study, commands, jobs, lambda name: _keep(study, name, runs[name]))
    results = {name: json.loads(_kept(study, name).read_text(encoding="utf-8")) for name in runs}
    unknown = [name for name, found in results.items() if "config" not in found]
    if unknown:
        print(f"note: {len(unknown)} older results do not tell their settings: {', '.join(unknown)}", file=sys.stderr)
    for name, found in results.items():
        _require_same(found, runs[name], _kept(study, name))
    return results


def dev_scores(study: str, names: Sequence[str], jobs: int = 0) -> dict[str, dict[str, float]]:
    """{name: {task: score}} of finished runs on the dev rows, with the weights after the last task.

    Kept as results/STUDY/NAME.dev.json.
    """
    kept = {name: ROOT / "results" / study / f"{name}.dev.json" for name in names}

    def keep(name: str) -> None:
        found = json.loads((run_folder(study, name) / "evaluations" / "dev.json").read_text(encoding="utf-8"))
        write_text(kept[name], json.dumps({"split": "dev", "scores": found["rows"][-1]["scores"]}, indent=1) + "\n")

    pending = [name for name in names if not kept[name].is_file()]
    _carry_out(study, {name: ("eval", str(run_folder(study, name)), "--split", "dev") for name in pending}, jobs, keep)
    return {name: json.loads(path.read_text(encoding="utf-8"))["scores"] for name, path in kept.items()}


def _carry_out(study: str, commands: Mapping[str, tuple[str, ...]], at_once: int, keep: Callable[[str], None]) -> None:
    """{name: arguments of lcia}: each with its share of the cores, `keep(name)` as soon as it is done."""
    at_once = at_once or int(os.environ.get("LCIA_JOBS", 0)) or os.cpu_count() or 1
    threads = max(1, (os.cpu_count() or 1) // at_once)
    jobs = [
        Job(name, arguments, run_folder(study, name) / "log.txt", threads, folder=ROOT)
        for name, arguments in commands.items()
    ]
    failures = carry_out(jobs, partial(run_here, at_once=at_once), Console(stderr=True), lambda job: keep(job.name))
    if failures:
        raise SystemExit(f"{len(failures)} of {len(jobs)} runs failed; the same command goes on")


def _require_same(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """A result that was kept must not pass for one of other settings."""
    # results of older studies do not hold their configuration
    known = found.get("config") or {key: found[key] for key in wanted if key != "method" and key in found}
    differing = [key for key in known if known[key] != wanted.get(key)]
    if differing:
        raise SystemExit(
            f"{path} holds a result of other settings ({', '.join(differing)}) than the study's; remove it"
        )


def _kept(study: str, name: str) -> Path:
    return ROOT / "results" / study / f"{name}.json"


def run_folder(study: str, name: str) -> Path:
    return ROOT / "runs" / "studies" / study / name


def _command(study: str, name: str, values: Mapping[str, Any], first_task_of: str | None) -> tuple[str, ...]:
    """Arguments of lcia that begin a run, or go on with it."""
    folder = run_folder(study, name)
    if first_task_of is not None and not (folder / "config.yaml").is_file():
        _branch(run_folder(study, first_task_of), folder, values["method"])
    if (folder / "config.yaml").is_file():
        _require_same({"config": _settings_of(folder, values)}, values, folder)
        return ("resume", str(folder))
    config = folder.with_name(f"{name}.yaml")  # not `with_suffix`: a name may hold a dot
    write_text(config, yaml.safe_dump({**values, "output_dir": str(folder)}))
    return ("train", str(config))


def _keep(study: str, name: str, values: Mapping[str, Any]) -> None:
    folder = run_folder(study, name)
    document = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    document["config"] = _settings_of(folder, values)
    last = folder / "predictions" / str(len(document["tasks"]))
    document["row_scores"] = {task: _scores(last / f"{task}.jsonl") for task in document["tasks"]}
    write_text(_kept(study, name), json.dumps(document, indent=1) + "\n")


def _settings_of(folder: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """What the run began with, of the keys that a study sets; of data it has where they lay then."""
    began = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return {key: value if key in ("stream", "init_stream") else began[key] for key, value in values.items()}


def _scores(predictions: Path) -> dict[str, float]:
    """{row's id: score}: what tests over rows need."""
    lines = predictions.read_text(encoding="utf-8").splitlines()
    return {record["id"]: record["score"] for record in map(json.loads, lines)}


def _branch(source: Path, target: Path, method: Any) -> None:
    """A run interrupted after the first task of `source`, to be gone on with by another method.

    Only for methods whose first task is the same training: nothing is averaged before there is something to keep.
    """
    lines = [json.loads(line) for line in (source / "ledger.jsonl").read_text(encoding="utf-8").splitlines()]
    first = next(line for line in lines if line["event"] == "stage_learned")
    kept = lines[: next(i for i, line in enumerate(lines) if line["event"] == "row_measured" and line["row"] == 1) + 1]
    for folder in (f"history/{first['stage']}", "predictions/0", "predictions/1"):
        shutil.copytree(source / folder, target / folder, dirs_exist_ok=True)
    config = {**kept[0]["config"], "method": method, "output_dir": str(target)}
    kept[0]["config"] = config
    write_text(target / "ledger.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
    write_text(target / "config.yaml", yaml.safe_dump(config))


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


def mean_and_interval(values: Sequence[float]) -> str:
    """`mean ± half the width of the 95 % t interval` over seeds."""
    sample = np.asarray(values, dtype=np.float64)
    if len(sample) < 2:
        return f"{sample.mean():.1f}"
    half = stats.t.ppf(0.975, len(sample) - 1) * sample.std(ddof=1) / len(sample) ** 0.5
    return f"{sample.mean():.1f} ± {half:.1f}"


def paired_p(values: Sequence[float], reference: Sequence[float]) -> str:
    """p of the paired t test over seeds, two-sided."""
    differences = np.asarray(values) - np.asarray(reference)
    if not differences.any():
        return "same runs"
    p = paired_t_test(differences)
    if p is None:  # no spread over the seeds: the test is not defined
        return f"{differences.mean():+.1f} in each seed"
    return f"{differences.mean():+.1f}, p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}"
