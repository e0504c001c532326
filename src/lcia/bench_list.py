"""A list of a benchmark's runs, methods × orders × seeds: what is left to do of it, and what came out."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lcia import processes
from lcia.bench import bench_config
from lcia.config import RunConfig
from lcia.errors import UserError
from lcia.jobs import Failure, Job, Runner, carry_out
from lcia.report import comparison_json, comparison_tables, load_run
from lcia.run_folder import RunFolder
from lcia.session import frozen_config, require_same_config


def parse_list(texts: Sequence[str]) -> list[str]:
    """The values of an option that can be given again, and takes several with commas between."""
    return [part.strip() for text in texts for part in text.split(",")]


def parse_seeds(texts: Sequence[str]) -> list[int]:
    """Seeds from `0,1` or `0` and `1`."""
    try:
        return [int(seed) for seed in parse_list(texts)]
    except ValueError:
        raise UserError(f"bench: --seed takes whole numbers, as in 0,1,2; not {' '.join(texts)!r}") from None


@dataclass(frozen=True)
class BenchRun:
    """One run of a list, and the arguments of `lcia` that begin it."""

    config: RunConfig
    arguments: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def name(self) -> str:
        return self.folder.name


def bench_runs(
    name: str,
    methods: Sequence[str],
    orders: Sequence[str | None],
    seeds: Sequence[int],
    model: str | None = None,
    data: str | None = None,
    overrides: Sequence[str] = (),
    options: Mapping[str, str] | None = None,
) -> list[BenchRun]:
    """Each method in each order with each seed; seed by seed, so that a part of the list compares all methods.

    The arguments are those of `bench_config`.

    Raises:
        UserError: as `bench_config`, or two runs would go to one folder.
    """
    options = dict(options or {})
    runs: dict[Path, BenchRun] = {}
    for seed, order, method in itertools.product(seeds, orders, methods):
        config = bench_config(name, method, order, seed, model, data, list(overrides), options)
        chosen = {"--method": method, "--order": order, "--seed": seed, "--model": model, "--data": data}
        pairs = [*chosen.items(), *(("--option", f"{key}={value}") for key, value in options.items())]
        words = [word for key, value in pairs if value is not None for word in (key, str(value))]
        run = BenchRun(config, ("bench", "run", name, *words, *overrides))
        if run.folder in runs:
            raise UserError(
                f"bench: two of these runs would go to {run.folder}: runs of one list differ in the method's name, the "
                f"order or the seed; give others a command of their own, with output_dir=FOLDER"
            )
        runs[run.folder] = run
    return list(runs.values())


def outstanding(runs: Sequence[BenchRun], threads: int) -> list[Job]:
    """The runs that are not finished, as jobs: those that began go on, with the threads they began with.

    Raises:
        UserError: a folder holds something else than the run that is asked for, or this process is one of several that
            a launcher began.
    """
    if processes.count() > 1:
        raise UserError("several runs are begun by one process; leave out accelerate launch or torchrun")
    jobs = []
    for run in runs:
        folder, log = RunFolder(run.folder), RunFolder(run.folder).log.absolute()
        if not folder.config.is_file():
            folder.require_free()
            jobs.append(Job(run.name, run.arguments, log, threads))
            continue
        wanted = run.config.with_absolute_paths()
        require_same_config(frozen_config(folder).model_dump(), wanted, str(run.folder), ignored={"output_dir"})
        changes = folder.records("extended", "rolled_back", "groups_changed")
        if changes:
            what = changes[0]["event"].replace("_", " ")
            raise UserError(f"{run.folder}: this run was changed afterwards ({what}); move it away, or leave it out")
        if not (run.folder / "results.json").is_file():
            began = folder.records("run_began")
            threads_then = began[0]["machine"]["threads"] if began else threads
            jobs.append(Job(run.name, ("resume", str(run.folder)), log, threads_then))
    return jobs


@dataclass(frozen=True)
class BenchResults:
    """What came out of a list of runs."""

    benchmark: str
    runs: Sequence[BenchRun]
    begun: frozenset[str]  # names of those that were not finished before
    failures: Mapping[str, Failure]  # by the run's name

    @property
    def finished(self) -> list[BenchRun]:
        return [run for run in self.runs if run.name not in self.failures]

    def machines(self) -> dict[str, list[str]]:
        """{device, kernels and threads: names of the runs of which some was computed there}."""
        found: dict[str, dict[str, None]] = {}
        for run in self.finished:
            results = _results(run)
            for part in (results, *results.get("went_on", ())):
                machine = part["machine"]
                kernels = f" ({machine['kernels']})" if "kernels" in machine else ""  # older versions did not tell
                where = f"{machine['device']}{kernels}, threads: {machine['threads']}"
                found.setdefault(where, {})[run.name] = None
        return {where: list(names) for where, names in found.items()}

    def as_dict(self) -> dict[str, Any]:
        loaded = [load_run(run.folder) for run in self.finished]
        return {
            "benchmark": self.benchmark,
            "runs": [self._run_dict(run) for run in self.runs],
            "comparison": comparison_json(loaded) if loaded else None,
        }

    def _run_dict(self, run: BenchRun) -> dict[str, Any]:
        failure = self.failures.get(run.name)
        state = "failed" if failure else "finished" if run.name in self.begun else "finished before"
        return {
            "run": str(run.folder),
            "state": state,
            "error": "\n".join(failure.last_lines) if failure else None,
            "results": None if failure else _results(run),
        }

    def readable(self) -> list[Any]:
        loaded = [load_run(run.folder) for run in self.finished]
        parts: list[Any] = list(comparison_tables(loaded)) if loaded else []
        if len(self.machines()) > 1:  # in bfloat16 another sum order gives other last digits
            parts += ["Not all runs were computed alike:"]
            parts += [f"  {machine}: {', '.join(names)}" for machine, names in self.machines().items()]
        return parts


def _results(run: BenchRun) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.folder / "results.json").read_text(encoding="utf-8"))
    return found


def run_all(name: str, runs: Sequence[BenchRun], threads: int, runner: Runner, console: Console) -> BenchResults:
    """Bring each run of a benchmark to its end, in a process of its own; a finished one is not run again.

    Args:
        threads: of each run that has not begun.
        runner: where the processes work, such as `lcia.jobs.run_here`.
        console: for progress and the errors of runs that fail.

    Raises:
        UserError: as `outstanding`, before anything is begun.
    """
    jobs = outstanding(runs, threads)
    kept = len(runs) - len(jobs)
    console.print(f"{len(runs)} runs, {kept} finished before", highlight=False)
    failures = carry_out(jobs, runner, console) if jobs else []
    return BenchResults(
        name, runs, frozenset(job.name for job in jobs), {failure.job.name: failure for failure in failures}
    )
