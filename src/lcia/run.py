"""The life of a run: train, resume, extend, roll back, regroup, measure again. The ledger says how far it is."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lcia.backbone import cache_dir, load_backbone
from lcia.checkpoint import check_processes, clear_checkpoints
from lcia.config import RunConfig, absolute_stream, load_config
from lcia.errors import GateError, UserError
from lcia.evaluation import AnswerCache
from lcia.files import write_json, write_text
from lcia.init_stage import check_init, init_stream, initialise
from lcia.learning import learn_stage
from lcia.measuring import measure_row
from lcia.metrics import forgetting_by_task
from lcia.processes import on_main
from lcia.progress import Reporter
from lcia.remarks import remarks
from lcia.results import assemble_results, circumstances, method_name, metrics_of, parameter_counts
from lcia.run_folder import RunFolder
from lcia.session import (
    Session,
    additional_stream,
    base_model,
    begin,
    check_images,
    check_lengths,
    check_sharding,
    check_target_modules,
    current_stream,
    data_facts,
    frozen_config,
    load_run_stream,
    make_pool,
    not_in_the_run,
    open_session,
    require_same_config,
)
from lcia.stream import Stream, Task


def train(config: RunConfig, reporter: Reporter) -> dict[str, Any]:
    """Begin a new run and finish it.

    Raises:
        UserError: before any training, when the data, the model or the output folder cannot be used.
    """
    config = config.with_absolute_paths()
    check_sharding(config)
    stream = load_run_stream(config, reporter)
    stream = replace(stream, notes=(*stream.notes, *remarks(config, stream)))
    check_images(stream, config.model, reporter)
    init = init_stream(config, reporter)
    folder = RunFolder(config.output_dir).require_free()
    backbone = load_backbone(config.model, config.dtype, config.attn_implementation)
    notes = check_lengths(stream.tasks, backbone.reader, backbone.layout, config, reporter)
    stream = replace(stream, notes=(*stream.notes, *notes))
    check_target_modules(backbone, config.lora_target_modules)
    make_pool(config, backbone)  # refuses now what would not fit once the run has begun
    if init is not None:
        check_init(init, config, backbone, reporter)
    with folder.lock():
        folder.require_free()  # another process may have begun here while the model was loading
        on_main(write_text)(folder.config, config.as_yaml())
        begin(folder, config, stream, backbone)
        backbone = initialise(folder, config, backbone, reporter)
        return finish(open_session(folder, config, stream, backbone), reporter)


def resume(path: Path, reporter: Reporter) -> dict[str, Any]:
    """Go on with a run that was interrupted, where it stopped; a finished run gives its results again."""
    folder = RunFolder(path).require_run()
    with folder.lock():
        config = frozen_config(folder)
        check_sharding(config)
        for part in (folder, RunFolder(folder.init)):
            check_processes(part.state, [record["stage"] for record in part.records("stage_learned")])
        stream = current_stream(folder, config, reporter)
        stream = replace(stream, notes=(*stream.notes, *not_in_the_run(config, stream)))
        backbone = load_backbone(base_model(folder, config), config.dtype, config.attn_implementation)
        if not folder.records("run_began"):  # interrupted before its first line
            begin(folder, config, stream, backbone)
        backbone = initialise(folder, config, backbone, reporter)
        return finish(open_session(folder, config, stream, backbone), reporter)


def extend(
    path: Path, source: str, tasks: list[str] | None, reporter: Reporter, config_file: Path | None = None
) -> dict[str, Any]:
    """Learn new tasks behind those of a finished run, as if they had been in its stream from the start.

    Only what is missing of the matrix is measured: the new tasks' cells in the rows that had them ahead, and their
    own rows.

    Args:
        source: a data file, a folder, or a built-in stream.
        tasks: of `source`; None takes all.
        config_file: a configuration that must be the run's own, but for its stream and output_dir.

    Raises:
        UserError: the run is not finished, a task's name is taken, the configuration or the data of the old tasks
            changed, the method learns all tasks at once, or the new data cannot be used.
    """
    folder = RunFolder(path).require_run()
    with folder.lock():
        config = frozen_config(folder)
        if config_file is not None:
            wanted = load_config(config_file).with_absolute_paths()
            began = folder.records("run_began")[0]["config"]
            require_same_config(began, wanted, str(config_file), ignored={"stream", "tasks", "output_dir"})
        check_sharding(config)
        stream = current_stream(folder, config, reporter)
        if not is_finished(folder, stream):
            raise UserError(f"{path}: the run is not finished; first `lcia resume {path}`")
        source = absolute_stream(source)
        added = additional_stream(config, source, tasks, reporter)
        taken = {task.name for task in stream} & {task.name for task in added}
        if taken:
            raise UserError(f"{path}: task {min(taken)!r} was learned already; a new task needs a name of its own")
        check_images(added, config.model, reporter)
        backbone = load_backbone(base_model(folder, config), config.dtype, config.attn_implementation)
        notes = check_lengths(added.tasks, backbone.reader, backbone.layout, config, reporter)
        session = open_session(folder, config, stream, backbone)
        stages = session.method.schedule(stream.tasks)
        if session.method.schedule((*stream.tasks, *added.tasks))[: len(stages)] != stages:
            raise UserError(f"{path}: method {method_name(config)} learns all tasks at once; start a new run")
        groups = () if session.method.codebook is None else session.method.codebook.groups
        for task in added:
            if task.name in groups:
                raise UserError(f"{path}: a group is called {task.name!r} already; give the new task another name")
        session.stream = session.fitted(
            Stream(stream.name, (*stream.tasks, *added.tasks), (*stream.notes, *added.notes, *notes))
        )
        folder.confirm(
            "extended",
            source=source,
            tasks=[task.name for task in added],
            **data_facts(added.tasks),
        )
        return finish(session, reporter)


def rollback(path: Path, to: str, reporter: Reporter) -> dict[str, Any]:
    """Back to the state after task `to`: what was learned behind it is no longer part of the run.

    Raises:
        UserError: `to` was not learned, or not as a stage of its own, or a file of its state is missing or was altered.
    """
    folder = RunFolder(path).require_run()
    with folder.lock():
        config = frozen_config(folder)
        stages = {
            record["stage"]: record
            for record in folder.records("stage_learned")
            if record["stage"] in record["placements"]
        }
        if to not in stages:
            raise UserError(f"{path}: no task {to!r} to go back to; learned one by one: {', '.join(stages) or 'none'}")
        # once confirmed there is no way back
        folder.check_snapshot(stages[to])
        stream = current_stream(folder, config, reporter, to=to)
        backbone = load_backbone(base_model(folder, config), config.dtype, config.attn_implementation)
        lines = folder.records("stage_learned", "groups_changed")
        for line in lines[lines.index(stages[to]) + 1 :]:
            if line["event"] == "groups_changed":
                done = f"groups {line['action']} {line['group']} {line['other']}"
                reporter.done(f"  note: undone too: {done} ({line['reason']})")
        clear_checkpoints(folder.state)
        folder.confirm("rolled_back", to=to)
        return finish(open_session(folder, config, stream, backbone), reporter)


def measure_again(
    path: Path,
    reporter: Reporter,
    split: str = "test",
    source: str | None = None,
    tasks: list[str] | None = None,
    all_rows: bool = False,
    recompute: bool = False,
) -> dict[str, Any]:
    """Measure a finished run again: on another split, on other data, with the weights of every stage, or from scratch.

    Args:
        split: test | dev.
        source: other data, a file, a folder or a built-in stream; None: the run's own tasks.
        tasks: of `source`, or of the run.
        all_rows: every row of the matrix, each with the weights the run had then; else the last one.
        recompute: answer every cell anew, those too whose weights did not change from one row to the next.

    Returns:
        {run, split, source, tasks, metrics, rows}, with all rows the matrix too; it is kept as evaluations/NAME.json,
        predictions beside it. NAME has all that is asked in it, so that another question keeps its own answer.

    Raises:
        UserError: the run is not finished, or the data cannot be used.
    """
    folder = RunFolder(path).require_run()
    config = frozen_config(folder)
    stream = current_stream(folder, config, reporter)
    if not is_finished(folder, stream):
        raise UserError(f"{path}: the run is not finished; first `lcia resume {path}`")
    if source is not None and all_rows:
        raise UserError("eval: rows of the matrix are defined for the run's own tasks; leave out --all-rows or --data")
    asked = list(additional_stream(config, source, tasks, reporter) if source is not None else stream)
    if source is None and tasks is not None:
        unknown = sorted(set(tasks) - {task.name for task in asked})
        if unknown:
            raise UserError(f"{path}: no task {unknown[0]!r}; its tasks: {', '.join(task.name for task in asked)}")
        asked = [task for task in asked if task.name in tasks]
    for task in asked:
        if not (task.dev if split == "dev" else task.test):
            raise UserError(f"task {task.name!r}: its {split} split is empty")
    check_images(Stream("asked", tuple(asked)), config.model, reporter)
    session = open_session(
        folder, config, stream, load_backbone(base_model(folder, config), config.dtype, config.attn_implementation)
    )
    asked = list(session.fitted(Stream("asked", tuple(asked))))
    plan = _stages(session)
    target = folder.path / "evaluations" / _name_of_evaluation(split, source, tasks, all_rows)
    measured = []
    names = [task.name for task in asked]
    title = f"{method_name(config)} · {config.model} · {split} rows → {target}.json"
    reporter.start_run(title, [task.name for task in stream], names)
    cache = AnswerCache(None if recompute else cache_dir() / "answers", session.engine())
    snapshots = folder.records("stage_learned")
    for number, (row, _) in enumerate(plan):
        last = number == len(plan) - 1
        if not (last or all_rows):
            continue
        if not last:
            session.go_to(snapshots[number - 1] if number else None)
        else:
            session.go_to(folder.snapshots()[-1] if folder.snapshots() else None)
        seen = asked if last or row == 0 else [task for task in asked if task in session.stream.tasks[: row + 1]]
        measured.append(measure_row(session, cache, row, seen, split, target, reporter, with_oracle=last))
        reporter.row(row, measured[-1]["scores"])
    scores = measured[-1]["scores"]
    result: dict[str, Any] = {"run": str(path), "split": split, "source": source, "tasks": names, "rows": measured}
    result["metrics"] = {"avg_acc": sum(scores.values()) / len(scores)}
    if all_rows and tasks is None:
        by_row = {record["row"]: record["scores"] for record in measured}
        matrix = [[by_row.get(j, {}).get(name) for name in names] for j in range(len(names) + 1)]
        result |= {"matrix": matrix, "metrics": metrics_of(matrix, _is_sequential(session))}
    on_main(write_json)(target.with_name(f"{target.name}.json"), result)
    return result


def _name_of_evaluation(split: str, source: str | None, tasks: list[str] | None, all_rows: bool) -> str:
    parts = [split]
    if source is not None:  # files of one name lie in many folders
        there = Path(source).absolute()
        parts = [re.sub("[^A-Za-z0-9_-]", "-", there.name), _short_hash(str(there)), split]
    if all_rows:
        parts.append("all-rows")
    if tasks is not None:
        named = "+".join(tasks)
        parts.append(named if len(named) <= 80 else f"{len(tasks)}-tasks-{_short_hash(named)}")
    return "-".join(parts)


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def require_little_forgetting(results: Mapping[str, Any], limit: float, per_task: bool) -> None:
    """The gate: forgetting, in points, within its budget.

    Args:
        per_task: every task must be within it; else their mean.

    Raises:
        GateError: naming the tasks over the budget, worst first.
        UserError: nothing can be forgotten yet.
    """
    forgotten = {
        task: value
        for task, value in zip(results["tasks"], forgetting_by_task(results["matrix"]), strict=False)
        if value is not None
    }
    mean = results["metrics"]["forgetting"]
    if mean is None:
        raise UserError("--max-forgetting: this run has no forgetting to measure (one task, or no order of tasks)")
    over = sorted((task for task, value in forgotten.items() if value > limit), key=lambda task: -forgotten[task])
    if over if per_task else mean > limit:
        tasks = ", ".join(f"{task} {forgotten[task]:.1f}" for task in over)
        what = "tasks over it" if per_task else f"mean {mean:.1f}; tasks over it"
        raise GateError(f"forgetting over the budget of {limit:g} points: {what}: {tasks or 'none alone'}")


def is_finished(folder: RunFolder, stream: Stream) -> bool:
    names = {task.name for task in stream}
    rows = folder.rows()
    return len(stream) in rows and set(rows[len(stream)]["scores"]) == names


def _stages(session: Session) -> list[tuple[int, tuple[Task, ...]]]:
    """(row of the matrix, what is learned before it is measured), row 0 first."""
    tasks = list(session.stream)
    stages = session.method.schedule(tasks)
    plan: list[tuple[int, tuple[Task, ...]]] = [(0, ())]
    plan += [(i if _is_sequential(session) else len(tasks), stage) for i, stage in enumerate(stages, start=1)]
    if not stages:
        plan.append((len(tasks), ()))  # nothing is trained: the last row is the base model's too
    return plan


def _is_sequential(session: Session) -> bool:
    tasks = list(session.stream)
    return session.method.schedule(tasks) == [(task,) for task in tasks]


def finish(session: Session, reporter: Reporter) -> dict[str, Any]:
    """Do what the ledger does not yet hold: learn each stage, measure each cell, write the results."""
    config, folder, tasks = session.config, session.folder, list(session.stream)
    names = [task.name for task in tasks]
    plan = _stages(session)

    def measured() -> dict[int, dict[str, Any]]:
        # a run without stages that was extended has an old last row that is none of the longer one's
        return {row: cells for row, cells in folder.rows().items() if row in dict(plan)}

    folder.tidy()
    rows = measured()
    title = f"{method_name(config)} · {config.model} · {len(tasks)} tasks → {folder.path}"
    reporter.start_run(title, names)
    drifted = _drifted(folder)
    for note in [*session.stream.notes, *drifted]:
        reporter.done(f"  note: {note}")
    for row in sorted(rows):
        reporter.row(row, rows[row]["scores"])

    cache = AnswerCache(cache_dir() / "answers", session.engine())
    learned = folder.records("stage_learned")

    def going_on() -> None:
        """Something is computed now: the ledger tells with what, where that is not what came before."""
        if drifted:
            folder.confirm("went_on", **circumstances())
            drifted.clear()

    for number, (row, stage) in enumerate(plan):
        if stage and number > len(learned):
            going_on()
            learn_stage(session, stage, reporter)
        # After task j the next one is measured too: how well it goes untaught is forward transfer.
        seen = tasks if row == 0 else tasks[: row + 1]
        is_last = row == len(tasks)
        # a row that a rollback made the last one was measured without its oracle
        known = rows.get(row, {}).get("oracle" if is_last else "scores", {})
        missing = [task for task in seen if task.name not in known]
        if missing:
            going_on()
            split, target = config.eval_split, folder.path / "predictions"
            later = 0 < number < len(learned)  # a cell that a rollback took, of a task that was learned again
            if later:
                session.go_to(learned[number - 1])
            facts = measure_row(session, cache, row, missing, split, target, reporter, with_oracle=is_last)
            if later:
                session.go_to(folder.snapshots()[-1])
            folder.confirm("row_measured", **facts)
            rows = measured()
            reporter.row(row, rows[row]["scores"])

    clear_checkpoints(folder.state)  # of a process that was killed between a task's end and its tidying up
    results = assemble_results(
        folder.records("run_began")[0],
        config,
        session.stream,
        session.placements,
        folder.records("stage_learned"),
        rows,
        _is_sequential(session),
        parameter_counts(session.pool),
        next(iter(folder.records("init_learned")), None),
        folder.records("went_on"),
    )
    on_main(write_json)(folder.path / "results.json", results)
    return results


# what lines of older versions do not tell, because there was no other
_UNTOLD = {"float32": "torch", "averages": "torch"}


@on_main  # processes may run on unlike machines, and what follows from this they must do together
def _drifted(folder: RunFolder) -> list[str]:
    """What changed since the run was last worked on: numbers may differ in their last digits, or batches in size."""
    then, now = folder.records("run_began", "went_on")[-1], circumstances()
    told = []
    for fact, what in (("versions", "library versions"), ("machine", "machine")):
        known = _UNTOLD | then[fact]
        changed = [f"{key} {known[key]} → {new}" for key, new in now[fact].items() if known.get(key, new) != new]
        told += [f"another {what} than so far: {', '.join(changed)}"] if changed else []
    before = then.get("processes", now["processes"])  # lines of older versions do not tell
    if before != now["processes"]:
        told.append(f"{now['processes']} processes, and so far {before}: a step has other rows than before")
    return told
