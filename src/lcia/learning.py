"""Learn one stage of a run, usually one task: open, train, check that nothing else moved, snapshot, confirm."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from lcia.backbone import Encoded
from lcia.checkpoint import clear_checkpoints, find_checkpoint
from lcia.early_stopping import EarlyStopping
from lcia.evaluation import AnswerCache, evaluate_task
from lcia.grouping import Match
from lcia.methods import Placement
from lcia.processes import is_sharding
from lcia.progress import Reporter
from lcia.results import method_line, parameter_counts, peak_memory_mib
from lcia.seeds import stable_seed
from lcia.session import Session, check_sharded_rows
from lcia.stream import Row, Task
from lcia.training import learn_task


def learn_stage(session: Session, stage: Sequence[Task], reporter: Reporter) -> None:
    """Learn `stage` from its start, or from behind the checkpoint of an interrupted attempt."""
    config, method, pool, folder = session.config, session.method, session.pool, session.folder
    task = stage[0] if len(stage) == 1 else _joined(stage)
    placement = method.open_task(task)
    if placement.is_new:
        pool.add(placement.adapter, start=placement.start)
    untouched = {name: pool.sha256(name) for name in pool.names if name != placement.adapter}
    pool.train_only(placement.adapter, placement.beneath)
    fed = method.feed(task.train, placement)
    check_sharded_rows(task.name, fed)
    rows, left_out = _encode(session, fed)
    if left_out:
        limits = session.backbone.layout.limit_text(config)
        reporter.done(f"  {task.name}: {left_out} training rows exceed {limits}, left out")
    arguments = config.training_arguments()
    if config.max_steps > 0:
        arguments["max_steps"] = config.max_steps * len(stage)
    checkpoint, damaged = find_checkpoint(folder.state, task.name)
    for sentence in damaged:
        reporter.done(f"  note: {sentence}")
    if checkpoint is None:
        if damaged:
            reporter.done(f"  note: {task.name} starts again")
        clear_checkpoints(folder.state)  # parts of one, or of another task
    else:
        reporter.done(f"  {task.name}: going on behind step {checkpoint.step}")

    if is_sharding():
        reporter.done(f"  note: sharded weights: no checkpoint inside {task.name}; interrupted, it starts again")
    reporter.start(f"learning {task.name}", total=None)
    learned = learn_task(
        pool.model,
        method,
        task,
        placement,
        rows,
        collate=session.backbone.reader.collate,
        arguments=arguments,
        state_folder=folder.state,
        checkpoint=checkpoint,
        seed=stable_seed(config.seed, task.name, "order"),
        on_record=reporter.training_step,
        projector=pool.projector_parameters(placement.adapter),
        projector_learning_rate=config.projector_learning_rate,
        early_stopping=_early_stopping(session, stage, placement, reporter),
    )
    if config.early_stopping_patience is not None:
        reporter.done(f"  {task.name}: weights of step {learned.step} kept, of {len(learned.log)}")
    method.close_task(task)
    for name, before in untouched.items():
        if pool.sha256(name) != before:
            raise RuntimeError(f"learning {task.name!r} changed the adapter {name!r}; nothing was saved")
    told, cost = method.report(), method.cost()
    if learned.sharded:
        session.load_anew(placement)
        method, pool = session.method, session.pool
    folder.forget_log_of(task.name)
    folder.append_log(learned.log)
    for member in stage:
        session.placements[member.name] = placement
    files = folder.save_snapshot(task.name, pool, method, lambda group: model_card(session, group))
    folder.confirm(
        "stage_learned",
        stage=task.name,
        placements={member.name: vars(placement) for member in stage},
        sha256={name: pool.sha256(name) for name in pool.names},
        files=files,
        ema=told,
        train_s=learned.seconds,
        step=learned.step,
        left_out=left_out,
        peak_memory_mib=peak_memory_mib(),
        trained_parameters=parameter_counts(pool)[placement.adapter],
        stored_parameters=sum(parameter_counts(pool).values()),
        method_cost=cost,
    )
    clear_checkpoints(folder.state)
    folder.publish(task.name)


def _encode(session: Session, rows: Sequence[Row]) -> tuple[list[tuple[Row, Encoded]], int]:
    """The rows that fit with their token ids, and how many do not."""
    encoded = [(row, session.backbone.reader.encode(row)) for row in rows]
    fits = session.backbone.layout.fits
    fitting = [(row, ids) for row, ids in encoded if fits(len(ids.prompt), len(ids.answer), session.config)]
    return fitting, len(encoded) - len(fitting)


def _early_stopping(
    session: Session, stage: Sequence[Task], placement: Placement, reporter: Reporter
) -> EarlyStopping | None:
    """The configuration's, on the dev rows of the stage's tasks, answered with the weights in training."""
    if session.config.early_stopping_patience is None:
        return None
    matches = [[Match(placement.group, 1.0, {})] * len(task.dev) for task in stage]
    told: set[str] = set()

    def score() -> float:
        pool, reader = session.pool, session.backbone.reader
        nowhere = AnswerCache(None, "")  # weights that change every step: nothing to find again
        results = {
            task.name: evaluate_task(pool, reader, task, task.dev, match, nowhere, session.decoding)
            for task, match in zip(stage, matches, strict=True)
        }
        pool.train_only(placement.adapter, placement.beneath)
        for name, result in results.items():
            if result.too_long and name not in told:
                reporter.done(f"  {name}: {result.too_long} dev prompts do not fit max_length; counted as wrong")
                told.add(name)
        return sum(result.score for result in results.values()) / len(results)

    return EarlyStopping(score, session.config.early_stopping_patience)


def _joined(stage: Sequence[Task]) -> Task:
    """Several tasks as one, for methods that learn them together."""
    instructions = tuple(dict.fromkeys(text for task in stage for text in task.instructions))
    return Task("all", instructions, tuple(row for task in stage for row in task.train), (), (), stage[0].scorer)


def model_card(session: Session, group: str) -> str:
    """README.md of an adapter in the pool."""
    tasks = [name for name, placement in session.placements.items() if placement.adapter == group]
    beneath = next((placement.beneath for placement in session.placements.values() if placement.adapter == group), ())
    stack = f"- learned on top of, and summed with: {', '.join(beneath)}\n" if beneath else ""
    method = method_line(session.config)
    base, own = session.config.model, session.backbone.name
    initialised = "" if own == base else f", after the run's Init stage: {own}"
    return (
        f"---\nbase_model: {base}\nlibrary_name: {session.pool.library}\n---\n\n# {group}\n\n"
        f"{session.pool.kind} of one instruction group, trained by lcia {version('lcia')}.\n\n"
        f"- base model: {base}{initialised}\n- tasks learned, in order: {', '.join(tasks)}\n- method: {method}\n"
        f"- seed: {session.config.seed}\n{stack}"
    )
