"""A run folder with its model in memory: stream, pool and method as one of its stages left them."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import lcia.backbone
import lcia.evaluation
from lcia.adapters import Pool, find_projector, language_targets
from lcia.backbone import Backbone, Layout, Reader, find_model, fit_demonstrations, load_backbone, load_layout
from lcia.backbone.images import open_image
from lcia.config import RunConfig, load_config
from lcia.errors import UserError
from lcia.evaluation import Decoding
from lcia.files import file_sha256
from lcia.methods import Combined, Placement, build_method
from lcia.progress import Reporter
from lcia.results import library_versions, machine
from lcia.run_folder import RunFolder
from lcia.seeds import stable_seed
from lcia.stream import Row, Stream, Task, load_stream


@cache
def _decoding_code() -> str:
    """Hash of the sources that make a prediction of weights and prompt: an answer kept by others is not reused."""
    package = Path(lcia.backbone.__file__).parent
    files = [*sorted(package.glob("*.py")), Path(lcia.evaluation.__file__)]
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest()


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
        model, tokenizer = self.backbone.model, self.backbone.tokenizer
        facts = {
            "base": self.backbone.fingerprint,
            "config": {key: value for key, value in model.config.to_dict().items() if key != "_name_or_path"},
            "attention": model.config._attn_implementation,
            "generation": model.generation_config.to_dict(),
            "tokenizer": tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab()),
            "lora_alpha": self.config.lora_alpha,
            "code": _decoding_code(),
            "versions": library_versions(),
            "machine": machine(),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    def fitted(self, stream: Stream) -> Stream:
        """The stream with prompts that fit the model, where they have demonstrations to do without."""
        return fit_demonstrations(stream, self.backbone.reader, self.backbone.layout, self.config)

    def go_to(self, snapshot: dict[str, Any] | None) -> None:
        """Method and pool as the ledger's line `snapshot` left them; None: before anything was learned."""
        self.method = build_method(self.config.method_parts())
        self.method.attach(self.pool, self.backbone)
        if snapshot is not None:
            self.folder.load_snapshot(snapshot, self.pool, self.method)


def open_session(folder: RunFolder, config: RunConfig, stream: Stream, backbone: Backbone) -> Session:
    """The run as its last snapshot left it.

    Raises:
        UserError: the model's weights are not those the run began with, or a snapshot's file was altered.
    """
    if folder.base_sha256() not in (None, backbone.fingerprint):
        raise UserError(
            f"{folder.path}: the weights of model {backbone.name} are not those the run began with; its adapters "
            "belong to the old ones"
        )
    session = Session(
        folder, config, stream, backbone, make_pool(config, backbone), build_method(config.method_parts())
    )
    session.stream = session.fitted(stream)
    snapshots = folder.snapshots()
    session.go_to(snapshots[-1] if snapshots else None)
    for record in snapshots:
        for task, placement in record["placements"].items():
            session.placements[task] = Placement(**placement)
    return session


def begin(folder: RunFolder, config: RunConfig, stream: Stream, base_sha256: str) -> None:
    """The ledger's first line: on what, and with what, everything that follows was made."""
    folder.confirm(
        "run_began",
        config=config.model_dump(),
        versions=library_versions(),
        machine=machine(),
        base_sha256=base_sha256,
        data_sha256={task.name: rows_sha256(task) for task in stream},
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


def open_run(path: Path) -> Session:
    """A run's model, pool and method as its last snapshot left them, for answering requests: no data is read."""
    folder = RunFolder(path).require_run()
    config = frozen_config(folder)
    backbone = load_backbone(base_model(folder, config), config.dtype, config.attn_implementation)
    return open_session(folder, config, Stream("none", ()), backbone)


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


def additional_stream(config: RunConfig, source: Any, tasks: list[str] | None) -> Stream:
    """Tasks from elsewhere, with the limits and draws they would have had in the run's own stream."""
    return load_run_stream(config.model_copy(update={"stream": source, "tasks": tasks}))


def current_stream(folder: RunFolder, config: RunConfig) -> Stream:
    """The tasks the run has by now: those of its configuration, what extended it, less what was rolled back.

    Raises:
        UserError: a task's rows are not those it was begun with.
    """
    stream = load_run_stream(config)
    tasks, notes = list(stream.tasks), list(stream.notes)
    digests: dict[str, str] = {}
    for record in folder.records("run_began", "extended", "rolled_back"):
        if record["event"] == "run_began":
            digests.update(record["data_sha256"])
        elif record["event"] == "extended":
            added = additional_stream(config, record["source"], record["tasks"])
            tasks, notes = [*tasks, *added.tasks], [*notes, *added.notes]
            digests.update(record["data_sha256"])
        else:  # rolled_back
            names = [task.name for task in tasks]
            tasks = tasks[: names.index(record["to"]) + 1]
    for task in tasks:
        if task.name in digests and digests[task.name] != rows_sha256(task):
            raise UserError(
                f"{folder.path}: the rows of task {task.name!r} are not those the run began with; restore the data, "
                "or start a new run"
            )
    return Stream(stream.name, tuple(tasks), tuple(notes))


def _draw(rows: tuple[Row, ...], limit: int | None, seed: int) -> tuple[Row, ...]:
    if limit is None or limit >= len(rows):
        return rows
    chosen = sorted(random.Random(seed).sample(range(len(rows)), limit))
    return tuple(rows[i] for i in chosen)


def rows_sha256(task: Task) -> str:
    """What a task teaches and asks, by content."""
    rows = [
        [split, row.id, row.instruction, row.messages, row.outputs, row.images]
        for split, rows in (("train", task.train), ("dev", task.dev), ("test", task.test))
        for row in rows
    ]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


# --- checks before any training


def check_images(stream: Stream, model: str, reporter: Reporter) -> None:
    """Open every image once, before any training.

    Raises:
        UserError: an image cannot be used, or the model reads text only; names the first row.
    """
    rows = [row for task in stream for row in (*task.train, *task.dev, *task.test) if row.images]
    if not rows:
        return
    if not load_layout(find_model(model), model).sees:
        raise UserError(f"{rows[0].source}: an image row, and model {model!r} reads text only")
    shown = {path: row for row in reversed(rows) for path in row.images}  # path → the first row with it
    reporter.start("opening images", total=len(shown))

    def opened(path: str) -> None:
        try:
            open_image(path)
        except UserError as error:
            raise UserError(f"{shown[path].source}: {error}") from None

    with ThreadPoolExecutor() as threads:  # decoding leaves the interpreter free
        for _ in threads.map(opened, reversed(shown)):
            reporter.advance()


def check_lengths(tasks: Sequence[Task], reader: Reader, layout: Layout, config: RunConfig) -> None:
    """Raises UserError before any training for a task of which no row fits."""
    for task in tasks:
        encoded = (reader.encode(row.with_demonstrations(0)) for row in task.train)
        if not any(layout.fits(len(ids.prompt), len(ids.answer), config) for ids in encoded):
            raise UserError(f"task {task.name!r}: no training row fits {layout.limit_text(config)}; raise it")


def check_target_modules(backbone: Backbone, targets: str | list[str]) -> None:
    """Raises UserError for modules that the model does not have; a text is a pattern, as in PEFT."""
    names = [name for name, _ in backbone.model.named_modules()]
    if isinstance(targets, str):
        missing = [] if targets == "all-linear" or any(re.fullmatch(targets, name) for name in names) else [targets]
    else:
        missing = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
    if missing:
        raise UserError(f"key 'lora_target_modules': model {backbone.name} has no module {', '.join(missing)}")
