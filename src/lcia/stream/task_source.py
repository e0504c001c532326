"""A task that was found but not read: where its rows and images lie, and what else is known of it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcia.errors import UserError
from lcia.stream.formats import SPLIT_NAMES, SUFFIXES, Draft, Faults

DATA = Path(__file__).parent / "data"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# train.jsonl, or the hub's shards: train-00000-of-00002.parquet
_SPLIT_FILE = re.compile(rf"({'|'.join(SPLIT_NAMES)})(?:-(\d+)-of-(\d+))?")
_SAVED_DATASET = ("dataset_dict.json", "state.json")  # what datasets' save_to_disk leaves

# The rows of one file, for the split it is for; what the user should see goes to the notes.
FileReader = Callable[[Path, str | None, Faults, list[str]], list[Draft]]


@dataclass(frozen=True)
class PositionalSplit:
    """The first `test` rows, the next `dev`, and of the rest a draw of at most `train`."""

    test: int
    dev: int
    train: int


@dataclass(frozen=True)
class TaskSource:
    """A task that was found but not read: its files, each with the split it is for if its name says so.

    `dataset` stands in place of files: a hub id, or a folder written by `datasets`' save_to_disk. Images are
    looked for in `image_folders`, in order, and nowhere else. With `examples` the prompt is Super-NI's, with so many of
    the task's positive examples: `positive_examples` as its file or tasks.json states them.
    """

    name: str
    files: tuple[tuple[Path, str | None], ...] = ()
    dataset: str | None = None
    instruction: str | None = None
    scorer: str | None = None
    image_folders: tuple[Path, ...] = ()
    links: tuple[Path, ...] = ()  # folders elsewhere that a link in the image folders may lead to
    examples: int | None = None
    positive_examples: Any = None
    split: PositionalSplit | None = None  # of rows that state none; None: 80/10/10
    dev_share: float = 0.0  # of the training rows, where the rows' own splits have no dev
    at_most: Mapping[str, int] = field(default_factory=dict)  # split → rows, drawn where there are more
    every_answer: bool = False  # of a conversation is learned, not only the last one
    reader: FileReader | None = None  # of files that need more than `formats.read_file`
    notes: tuple[str, ...] = ()  # on where it was found


@dataclass(frozen=True)
class Found:
    """The tasks of a stream in the order in which they arrive."""

    name: str
    tasks: tuple[TaskSource, ...]
    notes: tuple[str, ...] = ()
    on_request: tuple[TaskSource, ...] = ()  # tasks that come only when they are named


def task_at(
    name: str,
    path: str,
    root: Path | None,
    *,
    instruction: str | None = None,
    scorer: str | None = None,
    image_folder: Path | None = None,
) -> TaskSource:
    """The task whose data lie at `path`: a file, a folder with one file a split, or a hub id.

    Args:
        root: the stream's folder, in which images are looked for as well.

    Raises:
        UserError: there is nothing at `path`, or not one clear set of files.
    """
    place = Path(path).expanduser()
    files: tuple[tuple[Path, str | None], ...] = ()
    unread: list[str] = []
    dataset = None
    home = place
    if place.is_file():
        if place.suffix not in SUFFIXES:
            raise UserError(f"task {name!r}: {place} has an unknown ending; understood: {', '.join(SUFFIXES)}")
        files, home = ((place, None),), place.parent
    elif place.is_dir() and is_saved(place):
        dataset = str(place)
    elif place.is_dir():
        inside = data_files(place)
        files = _split_files(place, inside)
        read = {entry for entry, _ in files}
        unread = [entry.name for entry in inside if entry not in read]
    elif is_hub_id(path):
        dataset, home = path, Path()
    else:
        raise UserError(f"task {name!r}: {place} does not exist (a hub id is written owner/name)")
    if image_folder is not None and not image_folder.is_dir():
        raise UserError(f"task {name!r}: image_folder {image_folder} is not a folder")
    folders = (image_folder,) if image_folder is not None else (home, root) if root is not None else (home,)
    return TaskSource(
        name,
        files,
        dataset,
        instruction=instruction,
        scorer=scorer,
        image_folders=tuple(dict.fromkeys(folders)),
        notes=(f"{name}: data files in {place} that are not read: {', '.join(unread)}",) if unread else (),
    )


def _split_files(path: Path, inside: Sequence[Path]) -> tuple[tuple[Path, str | None], ...]:
    """Of the data files inside a task's folder: train, dev and test by name, else data.*, else the only one."""
    named = [(entry, match) for entry in inside if (match := _SPLIT_FILE.fullmatch(entry.stem))]
    by_split: dict[str, list[tuple[Path, re.Match[str]]]] = {}
    for entry, match in named:
        by_split.setdefault(SPLIT_NAMES[match[1]], []).append((entry, match))
    for split, files in by_split.items():
        _check_shards(path, split, files)
    if named:
        return tuple((entry, SPLIT_NAMES[match[1]]) for entry, match in named)
    chosen = [entry for entry in inside if entry.stem == "data"] or inside
    if len(chosen) != 1:
        raise UserError(
            f"{path}: a task's folder holds train, dev and test files ({', '.join(SUFFIXES)}) or one data "
            f"file; found {', '.join(entry.name for entry in inside) or 'none'}"
        )
    return ((chosen[0], None),)


def _check_shards(path: Path, split: str, files: Sequence[tuple[Path, re.Match[str]]]) -> None:
    """Raises UserError unless the files of a split are a single one, or the shards 0…N-1 of one set."""
    first, named = files[0]
    name, _, count = named.groups()  # count: None of a file that is no shard
    shards: dict[int, Path] = {}
    for entry, match in files:
        number = int(match[2] or 0)
        if match.group(1, 3) != (name, count) or number in shards:
            both = f"{shards.get(number, first).name} and {entry.name}"
            raise UserError(f"{path}: two files for the split {split}: {both}; keep one, or the shards of one set")
        if number >= int(count or 1):
            raise UserError(f"{path}: {entry.name}: no such shard: {int(count)} are numbered from 0")
        shards[number] = entry
    missing = next((number for number in range(int(count or 1)) if number not in shards), None)
    if missing is not None:
        shard = f"{name}-{missing:0{len(named[2])}}-of-{count}{first.suffix}"
        raise UserError(f"{path}: {shard} is missing, a shard of the split {split}: an incomplete download?")


def is_split_file(path: Path) -> bool:
    return _SPLIT_FILE.fullmatch(path.stem) is not None


def data_files(path: Path) -> list[Path]:
    return sorted(
        entry
        for entry in path.iterdir()
        if entry.suffix in SUFFIXES and entry.is_file() and not entry.name.startswith(".")
    )


def looks_like_hub_id(path: str) -> bool:
    return _HUB_ID.fullmatch(path) is not None and not path.endswith(SUFFIXES)


def is_hub_id(path: str) -> bool:
    """Whether it is owner/name and nothing on this disk.

    Beside an existing folder it is a mistyped path, not worth half a minute of asking the hub.
    """
    place = Path(path).expanduser()
    return looks_like_hub_id(path) and not place.exists() and not place.parent.is_dir()


def is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in _SAVED_DATASET)


def data_folder(name: str, path: str | None, names: Sequence[str] = ()) -> Path:
    """Where the data of a built-in stream lie that do not come with the package.

    Args:
        path: what the user says; None: the first of `names` (the stream's own if none) in `$LCIA_DATA`.

    Raises:
        UserError: neither is given, or there is no such folder.
    """
    root = os.environ.get("LCIA_DATA")
    if path is not None:
        if not isinstance(path, str | Path) or not str(path).strip():
            raise UserError(f"stream: {name}: 'path' must be a text that is not empty, not {path!r}")
        place = Path(path).expanduser()
    elif root:
        places = [Path(root).expanduser() / one for one in names or (name,)]
        place = next((one for one in places if one.is_dir()), places[0])
    else:
        raise UserError(
            f"stream: the data of {name} do not come with lcia: write {{name: {name}, path: FOLDER}}, or set LCIA_DATA "
            f"to the folder in which {name}/ lies"
        )
    if not place.is_dir():
        raise UserError(f"stream: {name}: {place} is not a folder")
    return place


def chosen(stream: str, option: str, value: object, valid: Sequence[str]) -> str:
    """An option of a built-in stream that is one of a few words, whatever its case.

    Raises:
        UserError: it is none of them.
    """
    by_folded = {word.casefold(): word for word in valid}
    word = by_folded.get(str(value).casefold())
    if word is None:
        raise UserError(f"stream: {stream}: {option!r} is one of {', '.join(valid)}, not {value!r}")
    return word


def share(stream: str, value: object) -> float:
    """The option `dev_share` of a built-in stream.

    Raises:
        UserError: it is no number from 0 to under 1.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise UserError(f"stream: {stream}: 'dev_share' is a number from 0 to under 1, not {value!r}")
    return float(value)
