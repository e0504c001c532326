"""Measure a row of the matrix: every test row routed by what a user sends, answered, scored."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lcia.evaluation import AnswerCache, TaskResult, evaluate_task
from lcia.files import write_text
from lcia.grouping import Match
from lcia.processes import on_main
from lcia.progress import Reporter
from lcia.results import peak_memory_mib
from lcia.session import Session
from lcia.stream import Row, Task


def measure_row(
    session: Session,
    cache: AnswerCache,
    row: int,
    tasks: Sequence[Task],
    split: str,
    predictions: Path,
    reporter: Reporter,
    with_oracle: bool = False,
) -> dict[str, Any]:
    """The facts of one row, as the ledger's `row_measured` line keeps them; predictions go to `predictions`.

    Args:
        row: 0 is the base model, whatever the pool holds by now.
        with_oracle: measure as well what each task's own group would have answered; else `oracle` is empty.
    """
    chosen = {task.name: task.dev if split == "dev" else task.test for task in tasks}
    reporter.start(f"measuring row {row}", total=sum(map(len, chosen.values())))
    started, run_before, reused_before = time.monotonic(), cache.run, cache.reused
    routed_before = session.method.routing_cost()
    scores: dict[str, float] = {}
    routing: dict[str, dict[str, int]] = {}
    oracle: dict[str, float] = {}
    too_long: dict[str, int] = {}

    def evaluate(task: Task, rows: Sequence[Row], matches: Sequence[Match]) -> TaskResult:
        reader = session.backbone.reader
        return evaluate_task(session.pool, reader, task, rows, matches, cache, session.decoding, reporter.advance)

    for task in tasks:
        rows = chosen[task.name]
        matches = session.method.route(rows) if row else [Match(None, 0.0, {})] * len(rows)
        result = evaluate(task, rows, matches)
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in result.records)
        on_main(write_text)(predictions / str(row) / f"{task.name}.jsonl", lines)
        scores[task.name] = result.score
        if result.too_long:
            too_long[task.name] = result.too_long
            reporter.done(f"  {task.name}: {result.too_long} prompts do not fit max_length; counted as wrong")
        counts = routing[task.name] = {}
        for match in matches:
            counts[match.group or ""] = counts.get(match.group or "", 0) + 1
        if not with_oracle:
            continue
        placement = session.placements.get(task.name)
        if placement is not None and set(counts) != {placement.group}:
            perfect = [Match(placement.group, 1.0, {})] * len(rows)
            oracle[task.name] = evaluate(task, rows, perfect).score
        else:
            oracle[task.name] = result.score
    return {
        "row": row,
        "scores": scores,
        "routing": routing,
        "oracle": oracle,
        "too_long": too_long,
        "eval_s": time.monotonic() - started,
        "evaluations_run": cache.run - run_before,
        "evaluations_reused": cache.reused - reused_before,
        "method_cost": {key: value - routed_before.get(key, 0) for key, value in session.method.routing_cost().items()},
        "peak_memory_mib": peak_memory_mib(),
    }
