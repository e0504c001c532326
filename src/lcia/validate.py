"""What `lcia validate` tells before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lcia.backbone import find_model, fit_demonstrations, load_layout, load_reader
from lcia.config import RunConfig
from lcia.grouping import Codebook
from lcia.init_stage import init_stream
from lcia.methods import build_method
from lcia.progress import Reporter
from lcia.remarks import about_groups, remarks
from lcia.session import check_images, check_lengths, load_run_stream
from lcia.stream import Stream, StreamSummary, describe, load_stream


def validate_config(config: RunConfig, reporter: Reporter) -> StreamSummary:
    """The stream in numbers, checked as `lcia train` would; the model's weights and output_dir are not looked at.

    Raises:
        UserError: configuration or data that `lcia train` would refuse.
    """
    stream = load_run_stream(config, reporter)
    check_images(stream, config.model, reporter)
    init = init_stream(config, reporter)
    codebook = build_method(config.method_parts()).codebook
    where = find_model(config.model)
    layout = load_layout(where, config.model)
    reader = load_reader(where, config.model, layout).with_padding(config.image_padding)
    too_long = check_lengths(stream.tasks, reader, layout, config, reporter)
    stream = replace(stream, notes=(*stream.notes, *too_long))
    if init is not None:
        check_lengths(init.tasks, reader, layout, config, reporter, measured=False)
        rows = sum(len(task.train) for task in init)
        told = f"Init: {len(init)} tasks, learned at once before the stream: {rows} training rows"
        stream = replace(stream, notes=(*stream.notes, *(f"Init: {note}" for note in init.notes), told))
    stream = fit_demonstrations(stream, reader, layout, config)
    stream = replace(stream, notes=(*stream.notes, *remarks(config, stream)))
    return describe(
        stream,
        count_tokens=lambda row: layout.length(reader.encode(row)),
        max_length=config.max_length,
        groups=None if codebook is None else planned_groups(stream, codebook),
    )


def validate_folder(folder: Path, model: str | None = None) -> StreamSummary:
    """A folder's rows in numbers, counted in the model's tokens when one is named, and the groups lcia would form."""
    stream = load_stream(folder)
    groups = planned_groups(stream, Codebook())
    told = about_groups({task: group for task, (group, _) in groups.items()})
    stream = replace(stream, notes=(*stream.notes, *told))
    if model is None:
        return describe(stream, groups=groups)
    where = find_model(model)
    layout = load_layout(where, model)
    reader = load_reader(where, model, layout)
    limit = RunConfig.model_fields["max_length"].default
    return describe(
        stream,
        count_tokens=lambda row: layout.length(reader.encode(row)),
        max_length=limit,
        groups=groups,
    )


def planned_groups(stream: Stream, codebook: Codebook) -> dict[str, tuple[str, float | None]]:
    """{task: (group it would join, similarity)} when the tasks arrive in the stream's order; fills the codebook."""
    planned: dict[str, tuple[str, float | None]] = {}
    for task in stream:
        match = codebook.match(task.instructions)
        group = match.group or task.name
        planned[task.name] = (group, match.score if match.scores else None)
        codebook.add(group, task.instructions)
    return planned
