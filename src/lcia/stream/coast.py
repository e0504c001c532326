"""The benchmark COAST (Continual LLaVA, arXiv 2411.02564), reconstructed from manifests that a user can edit.

Published are the names of the tasks and their order. Sizes, splits and templates are not: whatever comes out here is
not comparable with published COAST numbers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lcia.errors import UserError, did_you_mean
from lcia.stream.coin import KINDS, RELEASED, STRICT, TASKS, CoinFolder
from lcia.stream.formats import Draft, Faults, decode_utf8, read_bytes
from lcia.stream.task_source import DATA, Found, TaskSource, chosen, data_folder, task_at

CONFIGURATIONS = ("domain", "capability", "dataset")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TaskEntry(_Strict):
    """One task; paths are relative to the data folder."""

    name: str
    rows: str | None = None  # a file, or a folder with a file a split; of CoIN's tasks it is known
    images: str | None = None  # null: beside the rows, else the data folder
    instruction: str | None = None
    scorer: str | None = None
    train: int | None = Field(None, ge=1)  # at most so many rows, drawn where there are more; null: all
    dev: int | None = Field(None, ge=1)
    test: int | None = Field(None, ge=1)

    def at_most(self) -> dict[str, int]:
        sizes = {"train": self.train, "dev": self.dev, "test": self.test}
        return {split: size for split, size in sizes.items() if size is not None}


class CoinOptions(_Strict):
    """How the tasks of CoIN are taken, where the manifest's tasks are CoIN's."""

    instructions: str = "origin"
    scoring: str = STRICT


class Manifest(_Strict):
    """One of COAST's three sequences of tasks, as far as it is known and as somebody filled in the rest."""

    name: str
    version: int = Field(ge=1)  # raise it with every change: results name it
    reconstruction: Literal[True]
    about: str = ""
    dev_share: float = Field(0.0, ge=0, lt=1)  # of the training rows, where the data have no dev rows
    coin: CoinOptions | None = None
    tasks: list[TaskEntry] = Field(min_length=1)


def coast(*, configuration: str = "domain", path: str | None = None) -> Found:
    """One of COAST's three sequences of tasks.

    Args:
        configuration: domain | capability | dataset.
        path: the folder with the data, as the manifest names them; `$LCIA_DATA/coast` if not given. A manifest
            `domain.yaml` (capability.yaml, dataset.yaml) in it goes before the one that comes with lcia.

    Raises:
        UserError: there is no such folder or configuration, or the manifest is wrong.
    """
    file, manifest = find_manifest(configuration, path)
    data = data_folder("coast", path)
    tasks = []
    for entry in manifest.tasks:
        found = _own_task(entry, data, file) if manifest.coin is None else _coin_task(entry, manifest.coin, data, file)
        tasks.append(replace(found, at_most=entry.at_most(), dev_share=manifest.dev_share, every_answer=True))
    note = (
        f"coast: {manifest.name}, version {manifest.version}, a reconstruction ({file}): sizes, splits and templates "
        "of COAST are unpublished, so nothing here is comparable with published COAST numbers"
    )
    return Found("coast", tuple(tasks), (note,))


def find_manifest(configuration: str, path: str | None) -> tuple[Path, Manifest]:
    """The manifest in use and where it lies; arguments and errors as of `coast`."""
    configuration = chosen("coast", "configuration", configuration, CONFIGURATIONS)
    file = manifest_file(data_folder("coast", path), configuration)
    return file, read_manifest(file)


def manifest_file(data: Path, configuration: str) -> Path:
    own = data / f"{configuration}.yaml"
    return own if own.is_file() else DATA / "coast" / f"{configuration}.yaml"


def read_manifest(file: Path) -> Manifest:
    """Raises UserError naming the key that is wrong."""
    try:
        content = yaml.safe_load(decode_utf8(read_bytes(file), file))
        return Manifest.model_validate(content)
    except yaml.YAMLError as error:
        raise UserError(f"{file}: not valid YAML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        valid = TaskEntry if "tasks" in first["loc"] else CoinOptions if "coin" in first["loc"] else Manifest
        unknown = first["type"] == "extra_forbidden"
        hint = f". {did_you_mean(str(first['loc'][-1]), valid.model_fields)}" if unknown else ""
        raise UserError(f"{file}: {place or 'manifest'}: {first['msg']}{hint}") from None


def _own_task(entry: TaskEntry, data: Path, file: Path) -> TaskSource:
    """A task whose rows lie in the data folder, in any format that lcia reads."""
    if entry.rows is None:
        raise UserError(f"{file}: task {entry.name!r} has no 'rows': name its file or folder in the data folder")
    place = data / entry.rows
    try:
        if not place.exists():
            raise UserError(f"task {entry.name!r}: {place} does not exist ({file} names it)")
        images = None if entry.images is None else data / entry.images
        return task_at(
            entry.name, str(place), data, instruction=entry.instruction, scorer=entry.scorer, image_folder=images
        )
    except UserError as error:
        # told when the task is read: the others can be learned without it
        return TaskSource(entry.name, ((place, None),), reader=_Raising(error))


def _coin_task(entry: TaskEntry, options: CoinOptions, data: Path, file: Path) -> TaskSource:
    """A task of CoIN, whose download is the data folder."""
    if entry.name not in TASKS:
        raise UserError(f"{file}: CoIN has no task {entry.name!r}. {did_you_mean(entry.name, TASKS)}")
    for key in ("rows", "images", "instruction", "scorer"):
        if getattr(entry, key) is not None:
            raise UserError(f"{file}: task {entry.name!r}: {key!r} is CoIN's; leave it out, or leave out 'coin'")
    kind = chosen("coast", "instructions", options.instructions, tuple(KINDS))
    scoring = chosen("coast", "scoring", options.scoring, (STRICT, RELEASED))
    return CoinFolder(data, kind, scoring).task(TASKS[entry.name])


class _Raising:
    """Reader of a task that cannot be read."""

    def __init__(self, error: UserError) -> None:
        self.error = error

    def __call__(self, path: Path, split: str | None, faults: Faults, notes: list[str]) -> list[Draft]:
        raise self.error
