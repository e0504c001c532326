"""One run folder: learn the stream task by task, keep every state, measure every row of the matrix.

    runs/mine/
      config.yaml        resolved, frozen
      ledger.jsonl       append-only: what is finished
      history/STAGE/     everything after a stage: GROUP/ adapters (hard links where nothing changed),
                         codebook.json (methods with groups), method.safetensors, method.json
      pool/GROUP/        the adapters of the last stage
      codebook.json      the codebook of the last stage
      predictions/ROW/TASK.jsonl
      training_log.jsonl
      results.json

The ledger's lines are the truth: a folder that no line names is unfinished work and is made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from lcia.adapters import AdapterPool
from lcia.backbone import Backbone, cache_dir, encode_row, load_backbone
from lcia.config import RunConfig, load_config
from lcia.errors import UserError
from lcia.evaluation import AnswerCache, Decoding, evaluate_task
from lcia.files import append_json_line, file_sha256, sync_folder, write_json, write_text
from lcia.grouping import Match
from lcia.methods import Combined, Placement, build_method
from lcia.metrics import accuracy_metrics
from lcia.progress import Reporter
from lcia.seeds import stable_seed
from lcia.stream import Row, Stream, Task, load_stream
from lcia.training import learn_task

LIBRARIES = ("lcia", "torch", "transformers", "peft", "accelerate", "scikit-learn", "rouge-score", "safetensors")


@dataclass
class Session:
    """A run folder with its model in memory."""

    folder: Path
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

    Training rows are a draw that depends on the run's seed; evaluation rows are the same for every seed, so that
    runs can be compared row by row.
    """
    # The split of a folder without splits must not change with the run's seed either.
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
    stream = load_run_stream(config)
    check_text_only(stream, config.model)
    folder = Path(config.output_dir)
    check_output_dir(folder)
    backbone = load_backbone(config.model, config.dtype, config.attn_implementation)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        write_text(folder / "config.yaml", config.as_yaml())
        append_json_line(folder / "ledger.jsonl", {"event": "run_began", "at": _now(), "versions": _versions()})
        return _finish(_session(folder, config, stream, backbone), reporter)


def resume(folder: Path, reporter: Reporter) -> dict[str, Any]:
    """Go on with a run that was interrupted; a finished run gives its results again."""
    config = load_config(require_run(folder) / "config.yaml")
    with lock(folder):
        stream = load_run_stream(config)
        backbone = load_backbone(config.model, config.dtype, config.attn_implementation)
        return _finish(_session(folder, config, stream, backbone), reporter)


def check_text_only(stream: Stream, model: str) -> None:
    """Raises UserError naming the first image row: this model reads text."""
    for task in stream:
        for rows in (task.train, task.dev, task.test):
            for row in rows:
                if row.images:
                    raise UserError(f"{row.source}: an image row, and model {model!r} reads text only")


def check_output_dir(folder: Path) -> None:
    """Raises UserError unless a new run can begin in `folder`."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder}: a file of this name exists")
    if folder.exists() and any(folder.iterdir()):
        if (folder / "config.yaml").exists():
            raise UserError(
                f"output_dir {folder} holds another run; choose another output_dir, or go on with `lcia resume {folder}`"
            )
        raise UserError(f"output_dir {folder} is not empty and holds no run; choose another output_dir")


def open_run(folder: Path) -> Session:
    """A run's model, pool and method as its last finished stage left them, for answering requests."""
    config = load_config(require_run(folder) / "config.yaml")
    backbone = load_backbone(config.model, config.dtype, config.attn_implementation)
    session = _session(folder, config, Stream("none", ()), backbone)
    stages = [record for record in read_ledger(folder) if record["event"] == "stage_learned"]
    if stages:
        _restore(session, stages[-1])
    return session


def require_run(folder: Path) -> Path:
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: not a run folder (no config.yaml in it)")
    return folder


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One writer at a time. The operating system lets the lock go with its process, however that ends."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is writing this run; wait for it or stop it") from None
        yield


def read_ledger(folder: Path) -> list[dict[str, Any]]:
    """The finished lines. A last line cut by a crash is work that was never confirmed: it is made again.

    Raises:
        UserError: another line than the last is damaged.
    """
    path = folder / "ledger.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # the last piece has no newline: empty, or cut
        try:
            records.append(json.loads(line))
        except ValueError:
            raise UserError(f"{path}, line {number}: damaged; restore the file or start a new run") from None
    return records


def _session(folder: Path, config: RunConfig, stream: Stream, backbone: Backbone) -> Session:
    lora = {
        "r": config.lora_r,
        "lora_alpha": config.lora_alpha if config.lora_alpha is not None else 2 * config.lora_r,
        "lora_dropout": config.lora_dropout,
        "target_modules": config.lora_target_modules,
    }
    pool = AdapterPool(backbone.model, lora, config.model, config.seed)
    method = build_method(config.method_parts())
    method.attach(pool)
    return Session(folder, config, stream, backbone, pool, method)


def _finish(session: Session, reporter: Reporter) -> dict[str, Any]:
    """Do what the ledger does not yet hold: learn each stage, measure each row, write the results."""
    _cut_damaged_tail(session.folder / "ledger.jsonl")
    ledger = read_ledger(session.folder)
    learned = [record for record in ledger if record["event"] == "stage_learned"]
    rows = {record["row"]: record for record in ledger if record["event"] == "row_measured"}
    for record in learned:
        for task, placement in record["placements"].items():
            session.placements[task] = Placement(**placement)
    if learned:
        _restore(session, learned[-1])
    names = [task.name for task in session.stream]
    method_name = "+".join(name for name, _ in session.config.method_parts())
    reporter.start_run(f"{method_name} · {session.config.model} · {len(names)} tasks → {session.folder}", names)
    for note in session.stream.notes:
        reporter.done(f"  note: {note}")
    cache = AnswerCache(cache_dir() / "answers", f"{session.backbone.fingerprint}/{_engine(session)}")
    for row in sorted(rows):
        reporter.row(row, rows[row]["scores"])
    stages = session.method.schedule(list(session.stream))
    sequential = stages == [(task,) for task in session.stream]
    if 0 not in rows:
        rows[0] = _measure_row(session, cache, 0, list(session.stream), reporter)
    for number, stage in enumerate(stages, start=1):
        if number > len(learned):
            _learn_stage(session, stage, reporter)
        last = number == len(stages)
        row = number if sequential else len(session.stream)
        if row not in rows:
            # the next task too: how well it goes before it is learned is forward transfer
            seen = list(session.stream)[: row + 1]
            rows[row] = _measure_row(session, cache, row, seen, reporter, final=last)
    if len(session.stream) not in rows:  # nothing was trained: the last row is the base model's
        rows[len(session.stream)] = _measure_row(
            session, cache, len(session.stream), list(session.stream), reporter, final=True
        )
    results = _results(session, method_name, rows, sequential)
    write_json(session.folder / "results.json", results)
    return results


def _learn_stage(session: Session, stage: Sequence[Task], reporter: Reporter) -> None:
    """Learn one stage (usually one task), snapshot everything, then confirm it in the ledger."""
    config, method, pool = session.config, session.method, session.pool
    task = stage[0] if len(stage) == 1 else _joined(stage)
    placement = method.open_task(task)
    if placement.is_new:
        pool.add(placement.adapter, start=placement.start)
    untouched = {name: pool.sha256(name) for name in pool.names if name != placement.adapter}
    pool.train_only(placement.adapter)
    tokenizer = session.backbone.tokenizer
    encoded = [encode_row(tokenizer, row) for row in method.feed(task.train)]
    fitting = [row for row in encoded if len(row) <= config.max_length]
    left_out = len(encoded) - len(fitting)
    if left_out:
        reporter.done(f"  {task.name}: {left_out} of {len(encoded)} training rows exceed max_length, left out")
    if not fitting:
        raise UserError(f"task {task.name!r}: no training row fits max_length {config.max_length}; raise it")
    arguments = config.training_arguments()
    if config.max_steps > 0:
        arguments["max_steps"] = config.max_steps * len(stage)
    log_path = session.folder / "training_log.jsonl"
    _drop_log_of(log_path, task.name)
    pending: list[dict[str, Any]] = []

    def log(record: dict[str, Any]) -> None:
        pending.append(record)
        reporter.training_step(record)

    steps = arguments["max_steps"] if config.max_steps > 0 else 0
    reporter.start(f"learning {task.name}", total=steps or max(1, len(fitting) // config.per_device_train_batch_size))
    seconds = learn_task(
        pool.model, method, task, placement, fitting, tokenizer.pad_token_id or 0, arguments,
        session.folder / "state", stable_seed(config.seed, task.name, "order"), log,
    )  # fmt: skip
    method.close_task(task)
    for name, before in untouched.items():
        if pool.sha256(name) != before:
            raise RuntimeError(f"learning {task.name!r} changed the adapter {name!r}; nothing was saved")
    with log_path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in _merged(pending))
    for learned in stage:
        session.placements[learned.name] = placement
    _snapshot(session, task.name)
    append_json_line(
        session.folder / "ledger.jsonl",
        {
            "event": "stage_learned",
            "at": _now(),
            "stage": task.name,
            "placements": {learned.name: vars(placement) for learned in stage},
            "sha256": {name: pool.sha256(name) for name in pool.names},
            "files": _file_hashes(session.folder / "history" / task.name),
            "ema": method.report(),
            "train_s": seconds,
            "left_out": left_out,
            "peak_memory_mib": _peak_memory_mib(),
        },
    )
    _publish(session, task.name)


def _measure_row(
    session: Session,
    cache: AnswerCache,
    row: int,
    tasks: Sequence[Task],
    reporter: Reporter,
    final: bool = False,
) -> dict[str, Any]:
    """Route, answer and score every row of `tasks`; confirm the row of the matrix in the ledger."""
    config = session.config
    chosen = {task.name: task.dev if config.eval_split == "dev" else task.test for task in tasks}
    reporter.start(f"measuring row {row}", total=sum(map(len, chosen.values())))
    started, run_before, reused_before = time.monotonic(), cache.run, cache.reused
    scores: dict[str, float] = {}
    routing: dict[str, dict[str, int]] = {}
    oracle: dict[str, float] = {}
    too_long: dict[str, int] = {}
    tokenizer = session.backbone.tokenizer
    for task in tasks:
        rows = chosen[task.name]
        matches = session.method.route([item.instruction for item in rows])
        result = evaluate_task(
            session.pool, tokenizer, task, rows, matches, cache, session.decoding, reporter.advance
        )
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in result.records)
        write_text(session.folder / "predictions" / str(row) / f"{task.name}.jsonl", lines)
        scores[task.name] = result.score
        if result.too_long:
            too_long[task.name] = result.too_long
            reporter.done(f"  {task.name}: {result.too_long} prompts do not fit max_length; counted as wrong")
        if final:
            counts: dict[str, int] = {}
            for match in matches:
                counts[match.group or ""] = counts.get(match.group or "", 0) + 1
            routing[task.name] = counts
            placement = session.placements.get(task.name)
            right = None if placement is None else placement.adapter
            perfect = [Match(right, 1.0, {})] * len(rows)
            oracle[task.name] = (
                result.score
                if set(counts) == {right or ""}
                else evaluate_task(session.pool, tokenizer, task, rows, perfect, cache, session.decoding).score
            )
    record = {
        "event": "row_measured",
        "at": _now(),
        "row": row,
        "scores": scores,
        "routing": routing,
        "oracle": oracle,
        "too_long": too_long,
        "eval_s": time.monotonic() - started,
        "evaluations_run": cache.run - run_before,
        "evaluations_reused": cache.reused - reused_before,
        "peak_memory_mib": _peak_memory_mib(),
    }
    append_json_line(session.folder / "ledger.jsonl", record)
    reporter.row(row, scores)
    return record


def _results(session: Session, method: str, rows: Mapping[int, Mapping[str, Any]], sequential: bool) -> dict[str, Any]:
    """results.json, from the ledger and the configuration alone."""
    names = [task.name for task in session.stream]
    matrix = [[rows.get(j, {"scores": {}})["scores"].get(name) for name in names] for j in range(len(names) + 1)]
    metrics: dict[str, float | None] = dict(accuracy_metrics(matrix))
    if not sequential:  # without an order there is no new, no forgotten and no transferred
        metrics = {key: value if key == "avg_acc" else None for key, value in metrics.items()}
    stages = [record for record in read_ledger(session.folder) if record["event"] == "stage_learned"]
    final = rows[len(names)]
    groups = {name: placement.adapter for name, placement in session.placements.items()}
    asked = sum(sum(counts.values()) for counts in final["routing"].values())
    right = sum(counts.get(groups.get(name) or "", 0) for name, counts in final["routing"].items())
    averaged = {record["stage"]: record["ema"] for record in stages if record["ema"]}
    shares = [ema["fallback_fraction"] for ema in averaged.values()]
    every = [*stages, *rows.values()]
    return {
        "method": method,
        "method_options": [{"name": name, **options} for name, options in session.config.method_parts()],
        "model": session.config.model,
        "stream": session.stream.name,
        "seed": session.config.seed,
        "eval_split": session.config.eval_split,
        "tasks": names,
        "scorers": {task.name: task.scorer for task in session.stream},
        "groups": {name: groups.get(name) for name in names},
        "group_scores": {name: placement.scores for name, placement in session.placements.items()},
        "matrix": matrix,
        "metrics": metrics,
        "routing": {
            "accuracy": 100.0 * right / asked,
            "oracle_avg_acc": sum(final["oracle"].values()) / len(final["oracle"]),
            "base_model_answers": sum(counts.get("", 0) for counts in final["routing"].values()),
            "confusion": final["routing"],
        },
        "ema": {
            "fallback_fraction": sum(shares) / len(shares) if shares else None,
            "retained_mass": {stage: ema["retained_mass"] for stage, ema in averaged.items()},
        },
        "left_out": {record["stage"]: record["left_out"] for record in stages if record["left_out"]},
        "too_long": final["too_long"],
        "cost": {
            "train_s": sum(record["train_s"] for record in stages),
            "eval_s": sum(record["eval_s"] for record in rows.values()),
            "evaluations_run": sum(record["evaluations_run"] for record in rows.values()),
            "evaluations_reused": sum(record["evaluations_reused"] for record in rows.values()),
            "peak_memory_mib": max(record["peak_memory_mib"] for record in every),
            "trained_parameters": sum(
                parameter.numel() for name in session.pool.names for parameter in session.pool.parameters(name).values()
            ),
        },
        "versions": _versions(),
        "date": _now(),
    }


def _snapshot(session: Session, stage: str) -> None:
    """history/STAGE: complete or absent. Adapters that did not change are hard links into the stage before."""
    history = session.folder / "history"
    final, partial = history / stage, history / f".{stage}.part"
    for leftover in (final, partial):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    before = [record for record in read_ledger(session.folder) if record["event"] == "stage_learned"]
    old = before[-1] if before else None
    for name in session.pool.names:
        if old and old["sha256"].get(name) == session.pool.sha256(name):
            shutil.copytree(history / old["stage"] / name, partial / name, copy_function=os.link)
        else:
            session.pool.save(name, partial / name)
            write_text(partial / name / "README.md", _model_card(session, name))
    _save_method(session.method, partial)
    if session.method.codebook is not None:
        session.method.codebook.save(partial / "codebook.json")
    for path in partial.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    os.replace(partial, final)
    sync_folder(history)


def _publish(session: Session, stage: str) -> None:
    """pool/ and codebook.json show the last stage. Both can be made again from history/ at any time."""
    source, target = session.folder / "history" / stage, session.folder / "pool"
    partial = session.folder / ".pool.part"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name in session.pool.names:
        shutil.copytree(source / name, partial / name, copy_function=os.link)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    if (source / "codebook.json").is_file():
        write_text(session.folder / "codebook.json", (source / "codebook.json").read_text(encoding="utf-8"))


def _restore(session: Session, record: Mapping[str, Any]) -> None:
    """Load the adapters and the method's state of a finished stage, checked against the ledger's hashes."""
    folder = session.folder / "history" / record["stage"]
    for path, digest in record["files"].items():
        if not (folder / path).is_file():
            raise UserError(f"{folder / path}: missing; restore it from a copy or start a new run")
        if file_sha256(folder / path) != digest:
            raise UserError(f"{folder / path}: its content is not what the ledger recorded; restore it from a copy")
    for name in record["sha256"]:
        session.pool.load(name, folder / name)
    _load_method(session.method, folder)
    if not (session.folder / "pool").is_dir():
        _publish(session, record["stage"])


def _save_method(method: Combined, folder: Path) -> None:
    state = method.state_dict()
    tensors = {key: value.contiguous() for key, value in state.items() if isinstance(value, torch.Tensor)}
    values = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
    save_file(tensors, folder / "method.safetensors")
    write_json(folder / "method.json", values)


def _load_method(method: Combined, folder: Path) -> None:
    state = json.loads((folder / "method.json").read_text(encoding="utf-8"))
    with safe_open(folder / "method.safetensors", framework="pt") as file:
        state.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 - not a mapping
    method.load_state_dict(state)


def _file_hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _joined(stage: Sequence[Task]) -> Task:
    """Several tasks as one, for methods that learn them together."""
    instructions = tuple(dict.fromkeys(text for task in stage for text in task.instructions))
    return Task("all", instructions, tuple(row for task in stage for row in task.train), (), (), stage[0].scorer)


def _merged(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of the same step as one line of training_log.jsonl."""
    by_step: dict[int, dict[str, Any]] = {}
    for record in records:
        by_step.setdefault(record["step"], {}).update(record)
    return list(by_step.values())


def _drop_log_of(path: Path, task: str) -> None:
    """Forget lines of a task whose training was interrupted."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["task"] != task]
        if kept != lines:
            write_text(path, "".join(kept))


def _cut_damaged_tail(path: Path) -> None:
    """Remove a last line without its newline, or the next append would be glued to it."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    if text and not text.endswith("\n"):
        write_text(path, text[: text.rfind("\n") + 1])


def _model_card(session: Session, group: str) -> str:
    tasks = [name for name, placement in session.placements.items() if placement.adapter == group]
    method = yaml.safe_dump(session.config.method, default_flow_style=True).strip()
    return (
        f"---\nbase_model: {session.config.model}\nlibrary_name: peft\n---\n\n# {group}\n\n"
        f"LoRA adapter of one instruction group, trained by lcia {version('lcia')}.\n\n"
        f"- base model: {session.config.model}\n- tasks learned, in order: {', '.join(tasks)}\n- method: {method}\n"
        f"- seed: {session.config.seed}\n"
    )


def _engine(session: Session) -> str:
    """What beside weights and prompt can change a prediction's last digits."""
    model = session.backbone.model
    return f"{model.dtype}/{model.config._attn_implementation}/{version('torch')}/{version('transformers')}"


def _versions() -> dict[str, str]:
    return {"python": sys.version.split()[0], **{name: version(name) for name in LIBRARIES}}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _peak_memory_mib() -> float:
    """The process's highest resident memory; on a GPU the highest allocation there."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
