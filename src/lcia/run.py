"""One run: learn the stream stage by stage, keep every state, measure every row of the matrix."""

from __future__ import annotations

import hashlib
import json
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerBase

from lcia.adapters import AdapterPool
from lcia.backbone import Backbone, Encoded, cache_dir, encode_row, load_backbone
from lcia.config import RunConfig, load_config
from lcia.errors import UserError
from lcia.evaluation import AnswerCache, Decoding, evaluate_task
from lcia.files import write_json, write_text
from lcia.grouping import Match
from lcia.methods import Combined, Placement, build_method
from lcia.progress import Reporter
from lcia.results import assemble_results, library_versions, machine, method_name, peak_memory_mib
from lcia.run_folder import RunFolder
from lcia.seeds import stable_seed
from lcia.stream import Row, Stream, Task, load_stream
from lcia.training import learn_task


@dataclass
class Session:
    """A run folder with its model in memory."""

    folder: RunFolder
    config: RunConfig
    stream: Stream
    backbone: Backbone
    pool: AdapterPool
    method: Combined
    placements: dict[str, Placement] = field(default_factory=dict)  # task name → where it was learned

    @property
    def decoding(self) -> Decoding:
        config = self.config
        return Decoding(config.max_new_tokens, config.per_device_eval_batch_size, config.max_length)


def load_run_stream(config: RunConfig) -> Stream:
    """The configuration's stream, its tasks and its limits applied.

    Training rows are a draw that depends on the run's seed; evaluation rows are the same for every seed, and so
    is the split of data without splits, so that runs can be compared row by row.
    """
    stream = load_stream(config.stream, tasks=config.tasks, skip_bad_rows=config.skip_bad_rows)
    tasks = []
    for task in stream:
        train = _draw(task.train, config.max_train_examples, stable_seed(config.seed, task.name, "train"))
        test = _draw(task.test, config.max_eval_examples, stable_seed(0, task.name, "test"))
        dev = _draw(task.dev, config.max_eval_examples, stable_seed(0, task.name, "dev"))
        if config.eval_split == "dev" and not dev:
            raise UserError(f"task {task.name!r}: eval_split is dev, and its dev split is empty")
        tasks.append(Task(task.name, task.instructions, train, dev, test, task.scorer))
    return Stream(stream.name, tuple(tasks), stream.notes)


def _draw(rows: tuple[Row, ...], limit: int | None, seed: int) -> tuple[Row, ...]:
    if limit is None or limit >= len(rows):
        return rows
    chosen = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return tuple(rows[i] for i in chosen)


def train(config: RunConfig, reporter: Reporter) -> dict[str, Any]:
    """Begin a new run and finish it.

    Raises:
        UserError: before any training, when the data, the model or the output folder cannot be used.
    """
    config = config.with_absolute_paths()
    stream = load_run_stream(config)
    check_text_only(stream, config.model)
    folder = RunFolder(config.output_dir).require_free()
    backbone = load_backbone(config.model, config.dtype, config.attn_implementation)
    check_lengths(stream, backbone.tokenizer, config.max_length)
    _check_target_modules(backbone, config.lora_target_modules)
    with folder.lock():
        folder.require_free()  # another process may have begun here while the model was loading
        write_text(folder.config, config.as_yaml())
        _begin(folder, stream, backbone)
        return _finish(_open(folder, config, stream, backbone), reporter)


def _begin(folder: RunFolder, stream: Stream, backbone: Backbone) -> None:
    """The ledger's first line: on what, and with what, everything that follows was made."""
    folder.confirm(
        "run_began",
        versions=library_versions(),
        machine=machine(),
        base_sha256=backbone.fingerprint,
        data_sha256={task.name: _rows_sha256(task) for task in stream},
    )


def resume(path: Path, reporter: Reporter) -> dict[str, Any]:
    """Go on with a run that was interrupted; a finished run gives its results again."""
    folder = RunFolder(path).require_run()
    config = load_config(folder.config)
    with folder.lock():
        stream = load_run_stream(config)
        began = folder.records("run_began")
        for task in stream:
            if began and began[0]["data_sha256"].get(task.name) != _rows_sha256(task):
                raise UserError(
                    f"{path}: the rows of task {task.name!r} are not those the run began with; restore the data, "
                    "or start a new run"
                )
        backbone = load_backbone(config.model, config.dtype, config.attn_implementation)
        if not began:  # interrupted before its first line
            _begin(folder, stream, backbone)
        return _finish(_open(folder, config, stream, backbone), reporter)


def open_run(path: Path) -> Session:
    """A run's model, pool and method as its last finished stage left them, for answering requests."""
    folder = RunFolder(path).require_run()
    config = load_config(folder.config)
    backbone = load_backbone(config.model, config.dtype, config.attn_implementation)
    return _open(folder, config, Stream("none", ()), backbone)


def check_text_only(stream: Stream, model: str) -> None:
    """Raises UserError naming the first image row: this model reads text."""
    for task in stream:
        for rows in (task.train, task.dev, task.test):
            for row in rows:
                if row.images:
                    raise UserError(f"{row.source}: an image row, and model {model!r} reads text only")


def check_lengths(stream: Stream, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Raises UserError before any training for a task of which no row fits."""
    for task in stream:
        if not any(len(encode_row(tokenizer, row)) <= max_length for row in task.train):
            raise UserError(f"task {task.name!r}: no training row fits max_length {max_length}; raise it")


def _check_target_modules(backbone: Backbone, targets: str | list[str]) -> None:
    """Raises UserError for modules that the model does not have; a text is a pattern, as in PEFT."""
    names = [name for name, _ in backbone.model.named_modules()]
    if isinstance(targets, str):
        missing = [] if targets == "all-linear" or any(re.fullmatch(targets, name) for name in names) else [targets]
    else:
        missing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if missing:
        raise UserError(f"key 'lora_target_modules': model {backbone.name} has no module {', '.join(missing)}")


def _rows_sha256(task: Task) -> str:
    """What a task teaches and asks, by content."""
    rows = [
        [split, row.id, row.instruction, row.messages, row.outputs, row.images]
        for split, rows in (("train", task.train), ("dev", task.dev), ("test", task.test))
        for row in rows
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _open(folder: RunFolder, config: RunConfig, stream: Stream, backbone: Backbone) -> Session:
    """Pool, method and placements as the last finished stage left them."""
    lora = {
        "r": config.lora_r,
        "lora_alpha": config.lora_alpha if config.lora_alpha is not None else 2 * config.lora_r,
        "lora_dropout": config.lora_dropout,
        "target_modules": config.lora_target_modules,
    }
    began = folder.records("run_began")
    if began and began[0]["base_sha256"] != backbone.fingerprint:
        raise UserError(
            f"{folder.path}: the weights of model {config.model} are not those the run began with; its adapters "
            "belong to the old ones"
        )
    pool = AdapterPool(backbone.model, lora, config.model, config.seed)
    method = build_method(config.method_parts())
    method.attach(pool)
    session = Session(folder, config, stream, backbone, pool, method)
    learned = folder.records("stage_learned")
    for record in learned:
        for task, placement in record["placements"].items():
            session.placements[task] = Placement(**placement)
    if learned:
        folder.load_stage(learned[-1], pool, method)
    return session


def _finish(session: Session, reporter: Reporter) -> dict[str, Any]:
    """Do what the ledger does not yet hold: learn each stage, measure each row, write the results."""
    config, folder, tasks = session.config, session.folder, list(session.stream)
    folder.cut_unconfirmed()
    learned = folder.records("stage_learned")
    if learned:
        folder.publish(learned[-1]["stage"])
    rows = {record["row"]: record for record in folder.records("row_measured")}
    title = f"{method_name(config)} · {config.model} · {len(tasks)} tasks → {folder.path}"
    reporter.start_run(title, [task.name for task in tasks])
    for note in session.stream.notes:
        reporter.done(f"  note: {note}")
    for row in sorted(rows):
        reporter.row(row, rows[row]["scores"])

    cache = AnswerCache(cache_dir() / "answers", f"{session.backbone.fingerprint}/{_engine(session)}")
    stages = session.method.schedule(tasks)
    sequential = stages == [(task,) for task in tasks]
    # (row of the matrix, what is learned before it is measured)
    plan: list[tuple[int, tuple[Task, ...]]] = [(0, ())]
    plan += [(i if sequential else len(tasks), stage) for i, stage in enumerate(stages, start=1)]
    if not stages:
        plan.append((len(tasks), ()))  # nothing is trained: the last row is the base model's too
    finished = len(learned)
    for row, stage in plan:
        if stage and finished:
            finished -= 1
        elif stage:
            _learn_stage(session, stage, reporter)
        if row not in rows:
            # After task j the next one is measured too: how well it goes untaught is forward transfer.
            seen = tasks if row == 0 else tasks[: row + 1]
            rows[row] = _measure_row(session, cache, row, seen, reporter)

    results = assemble_results(
        folder.records("run_began")[0],
        config,
        session.stream,
        session.placements,
        folder.records("stage_learned"),
        rows,
        sum(weights.numel() for name in session.pool.names for weights in session.pool.parameters(name).values()),
        sequential,
    )
    write_json(folder.path / "results.json", results)
    return results


def _learn_stage(session: Session, stage: Sequence[Task], reporter: Reporter) -> None:
    """Learn one stage (usually one task), snapshot everything, then confirm it in the ledger."""
    config, method, pool, folder = session.config, session.method, session.pool, session.folder
    task = stage[0] if len(stage) == 1 else _joined(stage)
    placement = method.open_task(task)
    if placement.is_new:
        pool.add(placement.adapter, start=placement.start)
    untouched = {name: pool.sha256(name) for name in pool.names if name != placement.adapter}
    pool.train_only(placement.adapter)
    rows, left_out = _encode(session, method.feed(task.train))
    if left_out:
        reporter.done(f"  {task.name}: {left_out} training rows exceed max_length {config.max_length}, left out")
    arguments = config.training_arguments()
    if config.max_steps > 0:
        arguments["max_steps"] = config.max_steps * len(stage)
    folder.forget_log_of(task.name)
    steps: dict[int, dict[str, Any]] = {}  # what several events tell of one step becomes one line

    def log(record: dict[str, Any]) -> None:
        steps.setdefault(record["step"], {}).update(record)
        reporter.training_step(record)

    reporter.start(f"learning {task.name}", total=None)
    seconds = learn_task(
        pool.model,
        method,
        task,
        placement,
        rows,
        pad_id=session.backbone.pad_id,
        arguments=arguments,
        output_dir=folder.path / "state",
        seed=stable_seed(config.seed, task.name, "order"),
        log=log,
    )
    method.close_task(task)
    for name, before in untouched.items():
        if pool.sha256(name) != before:
            raise RuntimeError(f"learning {task.name!r} changed the adapter {name!r}; nothing was saved")
    with folder.training_log.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in steps.values())
    for learned in stage:
        session.placements[learned.name] = placement
    files = folder.save_stage(task.name, pool, method, lambda group: _model_card(session, group))
    folder.confirm(
        "stage_learned",
        stage=task.name,
        placements={learned.name: vars(placement) for learned in stage},
        sha256={name: pool.sha256(name) for name in pool.names},
        files=files,
        ema=method.report(),
        train_s=seconds,
        left_out=left_out,
        peak_memory_mib=peak_memory_mib(),
    )
    folder.publish(task.name)


def _measure_row(
    session: Session, cache: AnswerCache, row: int, tasks: Sequence[Task], reporter: Reporter
) -> dict[str, Any]:
    """Route, answer and score every row of `tasks`; confirm the row of the matrix in the ledger."""
    on_dev = session.config.eval_split == "dev"
    chosen = {task.name: task.dev if on_dev else task.test for task in tasks}
    reporter.start(f"measuring row {row}", total=sum(map(len, chosen.values())))
    started, run_before, reused_before = time.monotonic(), cache.run, cache.reused
    scores: dict[str, float] = {}
    routing: dict[str, dict[str, int]] = {}
    oracle: dict[str, float] = {}
    too_long: dict[str, int] = {}
    for task in tasks:
        rows = chosen[task.name]
        matches = session.method.route([item.instruction for item in rows])
        result = _evaluate(session, cache, task, rows, matches, reporter)
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in result.records)
        write_text(session.folder.path / "predictions" / str(row) / f"{task.name}.jsonl", lines)
        scores[task.name] = result.score
        if result.too_long:
            too_long[task.name] = result.too_long
            reporter.done(f"  {task.name}: {result.too_long} prompts do not fit max_length; counted as wrong")
        counts = routing[task.name] = {}
        for match in matches:
            counts[match.group or ""] = counts.get(match.group or "", 0) + 1
        placement = session.placements.get(task.name)
        if row == len(session.stream) and placement is not None and set(counts) != {placement.adapter}:
            perfect = [Match(placement.adapter, 1.0, {})] * len(rows)
            oracle[task.name] = _evaluate(session, cache, task, rows, perfect, reporter).score
        else:
            oracle[task.name] = result.score
    reporter.row(row, scores)
    return session.folder.confirm(
        "row_measured",
        row=row,
        scores=scores,
        routing=routing,
        oracle=oracle,
        too_long=too_long,
        eval_s=time.monotonic() - started,
        evaluations_run=cache.run - run_before,
        evaluations_reused=cache.reused - reused_before,
        peak_memory_mib=peak_memory_mib(),
    )


def _evaluate(
    session: Session,
    cache: AnswerCache,
    task: Task,
    rows: Sequence[Row],
    matches: Sequence[Match],
    reporter: Reporter,
) -> Any:
    tokenizer = session.backbone.tokenizer
    return evaluate_task(session.pool, tokenizer, task, rows, matches, cache, session.decoding, reporter.advance)


def _encode(session: Session, rows: Sequence[Row]) -> tuple[list[Encoded], int]:
    """Token ids of the rows that fit, and how many do not."""
    encoded = [encode_row(session.backbone.tokenizer, row) for row in rows]
    fitting = [row for row in encoded if len(row) <= session.config.max_length]
    return fitting, len(encoded) - len(fitting)


def _joined(stage: Sequence[Task]) -> Task:
    """Several tasks as one, for methods that learn them together."""
    instructions = tuple(dict.fromkeys(text for task in stage for text in task.instructions))
    return Task("all", instructions, tuple(row for task in stage for row in task.train), (), (), stage[0].scorer)


def _model_card(session: Session, group: str) -> str:
    tasks = [name for name, placement in session.placements.items() if placement.adapter == group]
    method = yaml.safe_dump(session.config.method, default_flow_style=True).partition("\n")[0]
    return (
        f"---\nbase_model: {session.config.model}\nlibrary_name: peft\n---\n\n# {group}\n\n"
        f"LoRA adapter of one instruction group, trained by lcia {version('lcia')}.\n\n"
        f"- base model: {session.config.model}\n- tasks learned, in order: {', '.join(tasks)}\n- method: {method}\n"
        f"- seed: {session.config.seed}\n"
    )


def _engine(session: Session) -> str:
    """What beside the weights' and the prompts' content can change a prediction, down to its last digits."""
    model, tokenizer = session.backbone.model, session.backbone.tokenizer
    facts = {
        "config": {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"},
        "attention": model.config._attn_implementation,
        "generation": model.generation_config.to_dict(),
        "tokenizer": tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab()),
        "lora_alpha": session.config.lora_alpha,
        "versions": library_versions(),
        "machine": machine(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
