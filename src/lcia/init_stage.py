"""The Init stage (CITB, Zhang et al., Findings of EMNLP 2023): some tasks learned at once before the stream begins.

Their adapter is merged into the base model, and the run stands on that from then on: row 0 of the matrix is the model
after Init, no method sees its tasks, and no rollback goes behind it.

    RUN/init/         a run folder of its own, of the method multi_task on the Init tasks; nothing is measured in it
    RUN/init/model/   the merged base, an ordinary model folder; it counts with the line `init_learned` in RUN's ledger
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Any

from lcia.adapters import AdapterPool, language_targets
from lcia.adapters.merging import check_mergeable, merge_active, write_model
from lcia.adapters.targets import linear_layers
from lcia.backbone import Backbone, find_model, load_backbone
from lcia.config import RunConfig
from lcia.files import move_durably, write_text
from lcia.learning import learn_stage
from lcia.methods import MultiTask
from lcia.processes import on_main
from lcia.progress import Reporter
from lcia.run_folder import RunFolder
from lcia.session import (
    Session,
    begin,
    check_images,
    check_lengths,
    current_stream,
    frozen_config,
    load_run_stream,
    open_session,
)
from lcia.stream import Stream


def init_stream(config: RunConfig, reporter: Reporter) -> Stream | None:
    """The tasks of the Init stage; None where the configuration has none.

    Raises:
        UserError: the data cannot be used.
    """
    if config.init_stream is None:
        return None
    stream = load_run_stream(init_config(config), reporter)
    check_images(stream, config.model, reporter)
    return stream


def check_init(stream: Stream, config: RunConfig, backbone: Backbone, reporter: Reporter) -> None:
    """Raises UserError for what would stop the Init stage once the run has begun."""
    check_lengths(stream.tasks, backbone.reader, backbone.layout, config, reporter, measured=False)
    targets: str | Sequence[str] = config.lora_target_modules
    if backbone.layout.sees:
        targets = language_targets(backbone.model, targets)
    check_mergeable(backbone.model, linear_layers(backbone.model, targets).values())


def initialise(folder: RunFolder, config: RunConfig, backbone: Backbone, reporter: Reporter) -> Backbone:
    """The base that the stream is learned on: `backbone`, or what an Init stage, learned now, makes of it.

    An interrupted stage goes on behind its last checkpoint.

    Args:
        backbone: of `lcia.session.base_model`; where the stage has to be learned its weights are changed.
    """
    if config.init_stream is None or folder.records("init_learned"):
        return backbone
    with RunFolder(folder.init).lock():  # it is a run of its own, which somebody else may resume
        session = _open(RunFolder(folder.init), config, backbone)
        tasks = session.stream.tasks
        if not session.folder.records("stage_learned"):
            for note in session.stream.notes:
                reporter.done(f"  note: Init: {note}")
            rows = sum(len(task.train) for task in tasks)
            reporter.done(f"  Init: {len(tasks)} tasks at once, {rows} training rows")
            learn_stage(session, tasks, reporter)
        learned = session.folder.records("stage_learned")[0]
        rounding, files = _merge(session)
    made = load_backbone(str(folder.init / "model"), config.dtype, config.attn_implementation)
    reporter.done(f"  Init: merged into the base; rounding took {rounding:.1%} of the change")
    folder.confirm(
        "init_learned",
        base_sha256=made.fingerprint,
        files=files,
        tasks=[task.name for task in tasks],
        rounding=rounding,
        **{key: learned[key] for key in ("train_s", "left_out", "peak_memory_mib", "trained_parameters")},
    )
    return made


def init_config(config: RunConfig) -> RunConfig:
    """The configuration of the run in RUN/init."""
    source, tasks = config.init_source()
    changes: dict[str, Any] = {"method": MultiTask.name, "stream": source, "tasks": tasks, "init_stream": None}
    changes |= {"output_dir": str(RunFolder(config.output_dir).init), "eval_split": "test"}
    changes["early_stopping_patience"] = None  # CITB stops the tasks of the stream, not Init
    if config.init_num_train_epochs is not None:
        changes["max_steps"] = -1  # the run's own limit was meant for the stream
    for key in ("max_train_examples", "num_train_epochs", "max_steps", "learning_rate"):
        own = getattr(config, f"init_{key}")
        if own is not None:
            changes[key] = own
        changes[f"init_{key}"] = None
    return config.model_copy(update=changes)


def _open(init: RunFolder, config: RunConfig, backbone: Backbone) -> Session:
    """The run in RUN/init, begun if it is not yet."""
    if not init.config.is_file():
        on_main(write_text)(init.config, init_config(config).as_yaml())
    own = frozen_config(init)
    stream = current_stream(init, own)
    init.tidy()
    if not init.records("run_began"):
        begin(init, own, stream, backbone)
    return open_session(init, own, stream, backbone)


@on_main
def _merge(session: Session) -> tuple[float, dict[str, str]]:
    """Write RUN/init/model. Returns the share of the change that rounding took, and {file: sha256}."""
    pool, backbone, final = session.pool, session.backbone, session.folder.path / "model"
    assert isinstance(pool, AdapterPool)
    (adapter,) = pool.names
    partial = final.with_name(".model.part")
    for leftover in (final, partial):  # of an attempt that the ledger does not know
        shutil.rmtree(leftover, ignore_errors=True)
    with pool.active(adapter) as model:
        rounding = merge_active(model, None)
    write_model(pool, backbone.reader, find_model(backbone.name), partial, projector=adapter)
    return rounding, move_durably(partial, final)
