"""A run folder with its model in memory: stream, pool and method as one of its stages left them."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

import lcia.adapters
import lcia.backbone
import lcia.evaluation
import lcia.grouping
import lcia.methods
from lcia.adapters import Pool, find_projector, language_targets
from lcia.backbone import Backbone, Encoded, Layout, Reader, find_model, fit_demonstrations, load_backbone, load_layout
from lcia.backbone.images import image_size, open_image
from lcia.backbone.layout import ENCODER_DECODER
from lcia.config import RunConfig, load_config
from lcia.ema.sharding import whole
from lcia.errors import UserError
from lcia.evaluation import Decoding
from lcia.files import file_sha256
from lcia.grouping import Match
from lcia.methods import Combined, Placement, build_method
from lcia.processes import is_sharding
from lcia.progress import Reporter
from lcia.results import circumstances, library_versions, machine, version_if_there
from lcia.run_folder import RunFolder
from lcia.seeds import stable_seed
from lcia.stream import Row, Stream, Task, find, load_stream


@cache
def _decoding_code() -> str:
    """Hash of the sources that make a prediction of weights and prompt: an answer kept by others is not reused."""
    parts = (lcia.backbone, lcia.adapters, lcia.grouping, lcia.methods)
    packages = [Path(str(package.__file__)).parent for package in parts]
    files = [*(file for package in packages for file in sorted(package.rglob("*.py"))), Path(lcia.evaluation.__file__)]
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()


def _sha256(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


@dataclass
class Session:
    """A run folder with its model in memory."""

    folder: RunFolder
    config: RunConfig
    stream: Stream
    backbone: Backbone
    pool: Pool
    method: Combined
    placements: dict[str, Placement] = field(default_factory=dict)  # task name → where it was learned

    @property
    def decoding(self) -> Decoding:
        config = self.config
        return Decoding(config.max_new_tokens, config.per_device_eval_batch_size, config.max_length)

    def engine(self) -> str:
        """What beside the weights' and the prompts' content can change a prediction, down to its last digits."""
        model = self.backbone.model
        facts = {
            "base": self.backbone.fingerprint,
            "config": {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"},
            "attention": model.config._attn_implementation,
            "generation": model.generation_config.to_dict(),
            "reader": self.backbone.reader.settings(),
            "lora_alpha": self.config.lora_alpha,
            "code": _decoding_code(),
            "versions": {**library_versions(), "torchvision": version_if_there("torchvision")},
            "machine": {key: value for key, value in machine().items() if key != "averages"},
            "float32": (self.config.model_extra or {}).get("tf32"),
            "spaces": self.backbone.reader.tokenizer.clean_up_tokenization_spaces,
        }
        return _sha256(facts)

    def fitted(self, stream: Stream) -> Stream:
        """The stream with prompts that fit the model, where they have demonstrations to do without."""
        return fit_demonstrations(stream, self.backbone.reader, self.backbone.layout, self.config)

    def go_to(self, snapshot: dict[str, Any] | None, adapters: Collection[str] | None = None) -> None:
        """Method and pool as the ledger's line `snapshot` left them; None: before anything was learned.

        Args:
            adapters: only these are loaded.
        """
        self.method = build_method(self.config.method_parts())
        self.method.attach(self.pool, self.backbone)
        if snapshot is not None:
            self.folder.load_snapshot(snapshot, self.pool, self.method, adapters)

    def route(self, rows: Sequence[Row]) -> list[Match]:
        """The group that answers each row; of a run that was opened without its adapters, theirs are loaded now."""
        matches = self.method.route(rows)
        missing = {match.group for match in matches if match.group is not None} - set(self.pool.names)
        if missing and self.method.codebook is not None:
            self.folder.load_adapters(self.folder.snapshots()[-1], self.pool, missing)
        return matches

    def load_anew(self, placement: Placement) -> None:
        """Model, pool and method whole again in every process, behind a task learned with all weights sharded (FSDP2).

        `fully_shard` cannot be undone in place: the base and what was learned before come from their files.
        """
        carried = self.method.state_dict()
        learned = {name: whole(value.detach()).cpu() for name, value in self.pool.parameters(placement.adapter).items()}
        name = self.backbone.name
        del self.backbone, self.pool, self.method  # there may be no room for both
        gc.collect()
        torch.cuda.empty_cache()
        backbone = load_backbone(name, self.config.dtype, self.config.attn_implementation)
        self.backbone = _as_configured(backbone, self.config)
        self.pool = make_pool(self.config, self.backbone)
        self.go_to(None)
        self.method.load_state_dict(carried)
        snapshots = self.folder.snapshots()
        if snapshots:
            self.folder.load_adapters(snapshots[-1], self.pool)
        if placement.is_new:
            self.pool.add(placement.adapter)
        with torch.no_grad():
            for key, parameter in self.pool.parameters(placement.adapter).items():
                parameter.copy_(learned[key])


def open_session(
    folder: RunFolder, config: RunConfig, stream: Stream, backbone: Backbone, adapters: Collection[str] | None = None
) -> Session:
    """The run as its last snapshot left it.

    Args:
        adapters: only these are loaded.

    Raises:
        UserError: the model's weights are not those the run began with, or a snapshot's file was altered.
    """
    if folder.base_sha256() not in (None, backbone.fingerprint):
        raise UserError(
            f"{folder.path}: the weights of model {backbone.name} are not those the run began with; its adapters "
            "belong to the old ones"
        )
    backbone = _as_configured(backbone, config)
    if folder.reader_sha256(library_versions()) not in (None, _sha256(backbone.reader.settings())):
        raise UserError(
            f"{folder.path}: the tokenizer or image processor of model {backbone.name} is not the one the run began "
            "with, or another library scales its images now (torchvision was installed or removed); its adapters "
            "learned from the old one's tokens and pixels"
        )
    session = Session(
        folder, config, stream, backbone, make_pool(config, backbone), build_method(config.method_parts())
    )
    session.stream = session.fitted(stream)
    snapshots = folder.snapshots()
    session.go_to(snapshots[-1] if snapshots else None, adapters)
    for record in snapshots:
        for task, placement in record["placements"].items():
            session.placements[task] = Placement(**placement)
    return session


def _as_configured(backbone: Backbone, config: RunConfig) -> Backbone:
    """The model with a reader that shows images as the configuration says."""
    return replace(backbone, reader=backbone.reader.with_padding(config.image_padding))


def begin(folder: RunFolder, config: RunConfig, stream: Stream, backbone: Backbone) -> None:
    """The ledger's first line: on what, and with what, everything that follows was made."""
    folder.confirm(
        "run_began",
        config=config.model_dump(),
        **circumstances(),
        base_sha256=backbone.fingerprint,
        reader_sha256=_sha256(_as_configured(backbone, config).reader.settings()),
        **data_facts(stream.tasks),
    )


def make_pool(config: RunConfig, backbone: Backbone) -> Pool:
    """The empty pool of the configuration's method.

    Raises:
        UserError: the method's adapters do not fit the model, or the lora_* keys do not fit the method.
    """
    targets: str | Sequence[str] = config.lora_target_modules
    if backbone.layout.sees:
        targets = language_targets(backbone.model, targets)
        backbone = replace(backbone, projector=find_projector(backbone.model, config.projector, backbone.name))
    lora = {
        "r": config.lora_r,
        "lora_alpha": config.lora_alpha if config.lora_alpha is not None else 2 * config.lora_r,
        "lora_dropout": config.lora_dropout,
        "target_modules": targets,
    }
    return build_method(config.method_parts()).make_pool(backbone, lora, config.seed)


def open_run(path: Path, all_adapters: bool = True) -> Session:
    """A run's model, pool and method as its last snapshot left them, for answering requests: no data is read.

    Args:
        all_adapters: False: where a codebook routes, `Session.route` loads those that it sends requests to.
    """
    folder = RunFolder(path).require_run()
    config = frozen_config(folder)
    backbone = load_backbone(base_model(folder, config), config.dtype, config.attn_implementation)
    by_codebook = not all_adapters and build_method(config.method_parts()).codebook is not None
    return open_session(folder, config, Stream("none", ()), backbone, () if by_codebook else None)


def base_model(folder: RunFolder, config: RunConfig) -> str:
    """The model that the run's adapters belong to: the configuration's, or what the Init stage made of it."""
    made = folder.init_model()
    return config.model if made is None else str(made.absolute())


def frozen_config(folder: RunFolder) -> RunConfig:
    """The run's configuration.

    Raises:
        UserError: config.yaml is not what the run began with; the keys are named.
    """
    config = load_config(folder.config)
    began = folder.records("run_began")
    if began:
        require_same_config(began[0]["config"], config, str(folder.config), ignored={"output_dir"})
    return config


def require_same_config(
    began: dict[str, Any], config: RunConfig, where: str, ignored: set[str] | frozenset[str] = frozenset()
) -> None:
    """Raises UserError naming the keys in which `config` is not what the run began with."""
    now = json.loads(json.dumps(config.model_dump()))
    differing = [key for key in {**began, **now} if key not in ignored and began.get(key) != now.get(key)]
    if differing:
        changes = ", ".join(f"{key} (began with {began.get(key)!r}, now {now.get(key)!r})" for key in differing)
        raise UserError(f"{where}: not the configuration the run began with: {changes}; restore it, or start a new run")


# --- the stream


def load_run_stream(config: RunConfig, reporter: Reporter | None = None) -> Stream:
    """The configuration's stream, its tasks and its limits applied, its system message in every prompt.

    Training rows are a draw that depends on the run's seed; evaluation rows are the same for every seed, and so
    is the split of data without splits, so that runs can be compared row by row. With `skip_bad_rows` the images of
    what was drawn are opened, of which `reporter` shows a bar.
    """
    stream = load_stream(config.stream, tasks=config.tasks, skip_bad_rows=config.skip_bad_rows)
    tasks = []
    for task in stream:
        train = _draw(task.train, config.max_train_examples, stable_seed(config.seed, task.name, "train"))
        test = _draw(task.test, config.max_eval_examples, stable_seed(0, task.name, "test"))
        dev = _draw(task.dev, config.max_eval_examples, stable_seed(0, task.name, "dev"))
        if config.eval_split == "dev" and not dev:
            raise UserError(f"task {task.name!r}: eval_split is dev, and its dev split is empty")
        train, dev, test = (tuple(with_system(row, config.system) for row in rows) for rows in (train, dev, test))
        tasks.append(Task(task.name, task.instructions, train, dev, test, task.scorer))
    drawn = Stream(stream.name, tuple(tasks), stream.notes)
    return _with_usable_images(drawn, reporter) if config.skip_bad_rows else drawn


def with_system(row: Row, system: str | None) -> Row:
    """The row with this system message, where it has none of its own."""
    if system is None or row.messages[0][0] == "system":
        return row
    return replace(row, messages=(("system", system), *row.messages))


def _with_usable_images(stream: Stream, reporter: Reporter | None) -> Stream:
    """The stream less the rows with an image that cannot be opened, which the notes list.

    Raises:
        UserError: a task has no rows of a split left.
    """
    notes, tasks = list(stream.notes), []
    paths = dict.fromkeys(path for task in stream for row in _rows_of(task) for path in row.images)
    faults = {path: fault for path, fault in _image_faults(paths, reporter) if fault}
    if not faults:
        return stream
    for task in stream:
        bad = {row: faults[path] for row in _rows_of(task) for path in row.images if path in faults}
        splits = {"train": task.train, "dev": task.dev, "test": task.test}
        kept = {split: tuple(row for row in rows if row not in bad) for split, rows in splits.items()}
        told = [f"{row.source}: {fault}" for row, fault in bad.items()]
        for split, rows in splits.items():
            if rows and not kept[split]:
                raise UserError(f"task {task.name!r}: no {split} row is left whose images can be opened: {told[0]}")
        if bad:
            notes += [f"{task.name}: {len(bad)} rows skipped whose image cannot be opened", *told]
        tasks.append(replace(task, train=kept["train"], dev=kept["dev"], test=kept["test"]))
    return Stream(stream.name, tuple(tasks), tuple(notes))


def _rows_of(task: Task) -> tuple[Row, ...]:
    return (*task.train, *task.dev, *task.test)


def _image_faults(paths: Collection[str], reporter: Reporter | None) -> Iterator[tuple[str, str | None]]:
    """Each image and why it cannot be used, None where it can; with a bar."""
    if paths and reporter is not None:
        reporter.start("opening images", total=len(paths))
    threads = ThreadPoolExecutor()  # decoding leaves the interpreter free
    try:
        for path, fault in zip(paths, threads.map(_image_fault, paths), strict=True):
            yield path, fault
            if reporter is not None:
                reporter.advance()
    finally:
        threads.shutdown(cancel_futures=True)  # whoever asks may stop at the first fault


def _image_fault(path: str) -> str | None:
    file = Path(path)
    return _fault_as_of(path, file.stat().st_mtime_ns if file.exists() else 0)


@cache
def _fault_as_of(path: str, _changed: int) -> str | None:
    """Remembered: `skip_bad_rows` looks at what the checks before a run will look at again."""
    try:
        open_image(path)
    except UserError as error:
        return str(error)
    return None


def additional_stream(
    config: RunConfig, source: Any, tasks: list[str] | None, reporter: Reporter | None = None
) -> Stream:
    """Tasks from elsewhere, with the limits and draws they would have had in the run's own stream."""
    return load_run_stream(config.model_copy(update={"stream": source, "tasks": tasks}), reporter)


def current_stream(
    folder: RunFolder, config: RunConfig, reporter: Reporter | None = None, to: str | None = None
) -> Stream:
    """The tasks the run has by now: those of its configuration, what extended it, less what was rolled back.

    What its folder was given meanwhile is no part of the run.

    Args:
        to: as it will be when it is rolled back to this task.

    Raises:
        UserError: a task is gone, or its rows, instructions or scorer are not those it was begun with.
    """
    records = folder.records("run_began", "extended", "rolled_back")
    if not records:  # interrupted before its first line
        return load_run_stream(config, reporter)
    sources: list[tuple[Any, list[str]]] = []  # and which tasks of each
    began: dict[str, dict[str, str]] = {"data_sha256": {}, "instructions_sha256": {}, "scorers": {}}
    # older versions learned on `resume` what the stream's folder had been given meanwhile, and noted nothing of it
    named = {name for record in records for name in (*record.get("data_sha256", ()), *record.get("tasks", ()))}
    learned = (task for record in folder.records("stage_learned") for task in record["placements"])
    unnamed = [task for task in learned if task not in named]
    for record in records if to is None else [*records, {"event": "rolled_back", "to": to}]:
        if record["event"] == "run_began":
            sources.append((config.stream, [*record["data_sha256"], *unnamed]))
        elif record["event"] == "extended":
            sources.append((record["source"], record["tasks"]))
        else:
            sources = _up_to(record["to"], sources)
        for fact, values in began.items():
            values.update(record.get(fact, {}))  # lines of older versions have the rows' hash alone
    try:
        parts = [additional_stream(config, _entries_of(source, names), names, reporter) for source, names in sources]
    except UserError as error:
        raise UserError(f"{folder.path}: its data cannot be read as when it began: {error}") from None
    tasks = [task for part in parts for task in part]
    notes = [note for part in parts for note in part.notes]
    for fact, values in data_facts(tasks).items():
        for name, now in values.items():
            before = began[fact].get(name, now)
            if before != now and fact == "scorers":
                raise UserError(
                    f"{folder.path}: task {name!r} was scored by {before} when the run began, and is by {now} now; "
                    "restore its scorer, or start a new run"
                )
            if before != now:
                raise UserError(
                    f"{folder.path}: the rows of task {name!r} are not those the run began with; restore the data, "
                    "or start a new run"
                )
    return Stream(parts[0].name, tuple(tasks), tuple(notes))


def _entries_of(source: Any, names: list[str]) -> Any:
    """Of a list of tasks those: what a rollback took may be there no more."""
    return [entry for entry in source if entry["name"] in names] if isinstance(source, list) else source


def not_in_the_run(config: RunConfig, stream: Stream) -> tuple[str, ...]:
    """A note on the tasks that the configuration's stream was given meanwhile."""
    known = {task.name for task in stream}
    others = [task.name for task in find(config.stream).tasks if task.name not in known] if config.tasks is None else []
    told = f"in {stream.name} by now, and not in this run: {', '.join(others)}; `lcia extend` learns them"
    return (told,) if others else ()


def _up_to(last: str, sources: list[tuple[Any, list[str]]]) -> list[tuple[Any, list[str]]]:
    """What of the sources is left when the task `last` is the last one."""
    kept: list[tuple[Any, list[str]]] = []
    for source, names in sources:
        if last in names:
            return [*kept, (source, names[: names.index(last) + 1])]
        kept.append((source, names))
    return kept


def _draw(rows: tuple[Row, ...], limit: int | None, seed: int) -> tuple[Row, ...]:
    if limit is None or limit >= len(rows):
        return rows
    chosen = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return tuple(rows[i] for i in chosen)


def data_facts(tasks: Sequence[Task]) -> dict[str, dict[str, str]]:
    """What a line of the ledger keeps of its tasks' data: {fact: {task: value}}."""
    return {
        "data_sha256": {task.name: rows_sha256(task) for task in tasks},
        # of the training rows that were not drawn, too: tasks are grouped by them
        "instructions_sha256": {task.name: _sha256({"instructions": task.instructions}) for task in tasks},
        "scorers": {task.name: task.scorer for task in tasks},
    }


def rows_sha256(task: Task) -> str:
    """What a task teaches and asks, by content."""
    rows = [
        [split, row.id, row.instruction, row.messages, row.outputs, row.images, *([True] if row.every_answer else [])]
        for split, rows in (("train", task.train), ("dev", task.dev), ("test", task.test))
        for row in rows
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


# --- checks before any training


def check_sharding(config: RunConfig) -> None:
    """Raises UserError for a way of spreading the weights over processes that the run cannot go."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError(
            "the launcher asks for DeepSpeed, whose weights and gradients nobody can read; use DDP or FSDP2"
        )
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if mixed != "no":  # it would stay on the model when that answers, and only once it has been trained
        raise UserError(
            f"the launcher asks for mixed precision in {mixed}; write mixed_precision: no (the base is {config.dtype}, "
            "trained weights are float32)"
        )
    if not is_sharding():
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError("the launcher asks for FSDP1, whose weights nobody can read; set fsdp_version: 2")
    if config.early_stopping_patience is not None:
        raise UserError("early_stopping_patience needs checkpoints inside a task, which FSDP2 has not; train with DDP")
    parts = build_method(config.method_parts()).leaves()
    unable = [part.name for part in parts if not part.works_sharded()]
    if unable:
        raise UserError(
            f"method {unable[0]} looks at weights or gradients that FSDP2 spreads over processes; train it with DDP"
        )


def check_sharded_rows(name: str, rows: Sequence[Row]) -> None:
    """Raises UserError where weights are spread over processes, and only some of the rows that are learned have images.

    A process whose rows have none would not go through the vision tower, for which the others wait.
    """
    seeing = sum(bool(row.images) for row in rows)
    if is_sharding() and 0 < seeing < len(rows):
        raise UserError(
            f"task {name!r}: {seeing} of {len(rows)} rows have images, and under FSDP2 all of them must, or none; use "
            "DDP, or a stream without the others"
        )


def check_images(stream: Stream, model: str, reporter: Reporter) -> None:
    """Open every image once, before any training.

    Raises:
        UserError: an image cannot be used, or the model reads text only; names the first row.
    """
    for task in stream:
        check_sharded_rows(task.name, task.train)
    rows = [row for task in stream for row in _rows_of(task) if row.images]
    if not rows:
        return
    if not load_layout(find_model(model), model).sees:
        raise UserError(f"{rows[0].source}: an image row, and model {model!r} reads text only")
    shown = {path: row for row in reversed(rows) for path in row.images}  # path → the first row with it
    for path, fault in _image_faults(list(reversed(shown)), reporter):
        if fault is not None:
            raise UserError(f"{shown[path].source}: {fault}")


def check_lengths(
    tasks: Sequence[Task],
    reader: Reader,
    layout: Layout,
    config: RunConfig,
    reporter: Reporter | None = None,
    *,
    measured: bool = True,
) -> tuple[str, ...]:
    """What only the model's reader knows: whether it takes images of every size and every row, and whether rows fit.

    Every row that will be learned or asked is encoded, of which `reporter` shows a bar: a row that the model's chat
    template refuses must not stop a run in its fourth task.

    Args:
        measured: whether the tasks' requests will be asked, too; those of an Init stage are not.

    Returns:
        Notes on requests that are too long to be answered.

    Raises:
        UserError: a limit is beyond the model's positions, an image's size is refused, a row cannot be encoded, a task
            has conversations that the model cannot learn, none of its rows fits, or it has no dev row for early
            stopping.
    """
    for key in ("max_length", "max_new_tokens") if layout is ENCODER_DECODER else ("max_length",):
        if reader.positions is not None and getattr(config, key) > reader.positions:
            raise UserError(
                f"{key} is {getattr(config, key)}, and the model {config.model} has {reader.positions} positions: give "
                f"{key}: {reader.positions}; rows that do not fit are left out, and counted"
            )
    reader = reader.with_padding(config.image_padding)
    _check_image_sizes(tasks, reader)
    split = config.eval_split
    asked = {task.name: (task.dev if split == "dev" else task.test) if measured else () for task in tasks}
    if reporter is not None:
        reporter.start("reading rows", total=sum(len(task.train) + len(asked[task.name]) for task in tasks))

    def encoded(rows: Sequence[Row], encode: Callable[[Row], Encoded]) -> Iterator[Encoded]:
        for row in rows:
            yield encode(row.with_demonstrations(0))
            if reporter is not None:
                reporter.advance()

    notes = []
    for task in tasks:
        several = [row for row in task.train if row.every_answer]
        if several and layout is ENCODER_DECODER:
            raise UserError(
                f"{several[0].source}: the answers of a conversation are learned together, which an encoder-decoder "
                "cannot: it reads all questions before it answers"
            )
        learned = [layout.fits(len(ids.prompt), len(ids.answer), config) for ids in encoded(task.train, reader.encode)]
        if not any(learned):
            raise UserError(f"task {task.name!r}: no training row fits {layout.limit_text(config)}; raise it")
        rows = asked[task.name]
        fitting = [
            layout.fits(len(ids.prompt), config.max_new_tokens, config) for ids in encoded(rows, reader.encode_prompt)
        ]
        with_room = f"with room for an answer (max_new_tokens {config.max_new_tokens}), fit {layout.limit_text(config)}"
        if rows and not any(fitting):
            raise UserError(f"task {task.name!r}: none of the {split} requests, {with_room}; nothing could be answered")
        if not all(fitting):
            few = f"{fitting.count(True)} of {len(rows)} {split} requests"
            notes.append(f"{task.name}: {few}, {with_room}; the others count as wrong")
        if config.early_stopping_patience is not None:
            scored = (reader.encode_prompt(row.with_demonstrations(0)) for row in task.dev)
            if not any(layout.fits(len(ids.prompt), config.max_new_tokens, config) for ids in scored):
                problem = "none of its dev rows fits max_length" if task.dev else "it has no dev rows"
                raise UserError(f"task {task.name!r}: {problem}, and early_stopping_patience goes by their score")
    return tuple(notes)


def _check_image_sizes(tasks: Sequence[Task], reader: Reader) -> None:
    shown: dict[str, Row] = {}  # path → the first row with it
    for row in (row for task in tasks for row in _rows_of(task)):
        shown |= {path: row for path in row.images if path not in shown}
    with ThreadPoolExecutor() as threads:
        for (path, row), size in zip(shown.items(), threads.map(image_size, shown), strict=True):
            try:
                reader.check_size(*size)
            except UserError as error:
                raise UserError(f"{row.source}: image {path}: {error}") from None


def check_target_modules(backbone: Backbone, targets: str | list[str]) -> None:
    """Raises UserError for modules that the model does not have; a text is a pattern, as in PEFT."""
    names = [name for name, _ in backbone.model.named_modules()]
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise UserError(
                f"key 'lora_target_modules': {targets!r} is no regular expression ({error}); names go in a list"
            ) from None
        missing = [] if targets == "all-linear" or any(re.fullmatch(targets, name) for name in names) else [targets]
    else:
        missing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if missing:
        raise UserError(f"key 'lora_target_modules': model {backbone.name} has no module {', '.join(missing)}")
