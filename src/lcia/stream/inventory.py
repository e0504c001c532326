"""What of a benchmark's data is there: file by file, image folder by image folder, task by task."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lcia.errors import UserError
from lcia.stream.formats import Draft, Faults
from lcia.stream.load import ImageFinder, read_task_file, scorable
from lcia.stream.task_source import Found, TaskSource

if TYPE_CHECKING:
    from rich.console import RenderableType

READY, PARTLY, NO = "ready", "partly", "no"


@dataclass(frozen=True)
class FileState:
    """A file of rows. `state`: there | missing | unreadable."""

    path: str
    state: str
    rows: int  # that can be used, as far as the file and the task's scorer tell
    bad_rows: int
    problem: str | None  # why it cannot be read, or the first bad row


@dataclass(frozen=True)
class ImageState:
    """The images below one folder to which a task's rows refer."""

    folder: str
    referenced: int  # distinct images
    found: int
    empty: int  # files of no bytes, not counted as found
    missing: str | None  # the first that is not there, or may not be read
    why: str | None  # what a run would say of that one


@dataclass(frozen=True)
class TaskState:
    """A task. `state`: ready; partly (with skip_bad_rows=true, which leaves out the rows in question); no."""

    name: str
    state: str
    rows: dict[str, int]  # split ("unsplit" where one is drawn later) → rows whose images are there
    rows_without_image: int  # that refer to one which is missing or empty
    files: tuple[FileState, ...]
    images: tuple[ImageState, ...]


@dataclass(frozen=True)
class Inventory:
    """A download as it is; `as_dict()` is plain JSON, and rich can print it."""

    benchmark: str
    tasks: tuple[TaskState, ...]
    notes: tuple[str, ...]

    @property
    def can_run(self) -> list[str]:
        """Tasks that can be learned without the rest, those among them whose rows are not all usable included."""
        return [task.name for task in self.tasks if task.state != NO]

    def as_dict(self) -> dict[str, Any]:
        tasks = [asdict(task) for task in self.tasks]
        return {"benchmark": self.benchmark, "can_run": self.can_run, "tasks": tasks, "notes": list(self.notes)}

    def __rich__(self) -> RenderableType:
        return _render(self)


def take_inventory(found: Found, on_bytes: Callable[[int], None] = lambda read: None) -> Inventory:
    """Look at every file of rows, and for every image they refer to.

    No image is opened: what is cut off or not an image is found when a run begins.

    Args:
        on_bytes: called after each file of rows with its size.
    """
    notes = list(found.notes)
    tasks = tuple(_task_state(task, on_bytes, notes) for task in (*found.tasks, *found.on_request))
    return Inventory(found.name, tasks, tuple(notes))


def total_bytes(found: Found) -> int:
    """Of the files of rows."""
    return sum(_size(path) for task in (*found.tasks, *found.on_request) for path, _ in task.files)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _task_state(task: TaskSource, on_bytes: Callable[[int], None], notes: list[str]) -> TaskState:
    notes += task.notes
    images = _Images(task)
    files = []
    rows: dict[str, int] = {}
    without = 0
    for path, split in task.files:
        file, drafts = _read(task, path, split, notes)
        files.append(file)
        for draft in drafts:
            # every image is looked up: what one row lacks is counted whole
            complete = all([images.has(name) for name in draft.images])
            without += not complete
            key = draft.split or split or "unsplit"
            rows[key] = rows.get(key, 0) + complete
        on_bytes(_size(path))
    # a data set that the library `datasets` reads is not looked into
    usable = task.dataset is not None or (bool(rows.get("train") and rows.get("test")) or rows.get("unsplit", 0) > 1)
    whole = all(file.state == "there" and file.bad_rows == 0 for file in files) and without == 0
    state = NO if not usable else READY if whole else PARTLY
    return TaskState(task.name, state, rows, without, tuple(files), images.states())


def _read(task: TaskSource, path: Path, split: str | None, notes: list[str]) -> tuple[FileState, list[Draft]]:
    faults = Faults(skip=True)
    try:
        drafts = read_task_file(task, path, split, faults, notes)
    except UserError as error:
        if not path.exists():
            return FileState(str(path), "missing", 0, 0, None), []
        return FileState(str(path), "unreadable", 0, 0, str(error)), []
    if task.scorer is not None:
        drafts = list(scorable(drafts, task.name, task.scorer, faults))
    bad = faults.found
    return FileState(str(path), "there", len(drafts), len(bad), bad[0] if bad else None), drafts


class _Images:
    """The images of a task, looked for where a run would."""

    def __init__(self, task: TaskSource) -> None:
        self._finder = ImageFinder(task)
        self._size: dict[str, int | None] = {}  # image as written → bytes; None: not to be had
        self._why: dict[str, str] = {}  # of those that are not to be had

    def has(self, name: str) -> bool:
        if name not in self._size:
            self._size[name] = self._look(name)
        return bool(self._size[name])

    def _look(self, name: str) -> int | None:
        try:
            return os.stat(self._finder.find(name, "")).st_size
        except UserError as error:
            self._why[name] = str(error).removeprefix(": ")
            return None

    def states(self) -> tuple[ImageState, ...]:
        """By the first two folders of the paths as written: COCO2014/train2014."""
        parts: dict[str, list[str]] = {}
        for name in self._size:
            folder = os.path.normpath(os.path.dirname(name) or ".").split(os.sep)[:2]
            parts.setdefault("/".join(folder), []).append(name)
        return tuple(self._state(folder, names) for folder, names in sorted(parts.items()))

    def _state(self, folder: str, names: list[str]) -> ImageState:
        sizes = [self._size[name] for name in names]
        missing = next((name for name, size in zip(names, sizes, strict=True) if size is None), None)
        why = None if missing is None else self._why[missing]
        return ImageState(folder, len(names), sum(map(bool, sizes)), sizes.count(0), missing, why)


_WORDS = {
    READY: "ready",
    PARTLY: "partly: skip_bad_rows=true leaves out rows that are broken or whose image is missing or empty",
    NO: "cannot run",
}


def _render(inventory: Inventory) -> RenderableType:
    # rich is needed for printing only
    from rich.console import Group
    from rich.text import Text

    lines = []
    for task in inventory.tasks:
        lines.append(Text.assemble((task.name, "bold"), f"  {_WORDS[task.state]}"))
        lines += [Text(f"  {_file_line(file)}") for file in task.files]
        lines += [Text(f"  {_image_line(images)}") for images in task.images]
    ready = [task.name for task in inventory.tasks if task.state == READY]
    partly = [task.name for task in inventory.tasks if task.state == PARTLY]
    summary = f"{len(ready)} of {len(inventory.tasks)} tasks ready: {', '.join(ready) or 'none'}"
    if partly:
        summary += f"; partly: {', '.join(partly)}"
    opened = Text("images are opened when a run begins: one that is cut off is found then")
    return Group(*lines, Text(summary, style="bold"), opened, *(Text(f"- {note}") for note in inventory.notes))


def _file_line(file: FileState) -> str:
    if file.state != "there":
        return f"{file.state}: {file.problem or file.path}"
    bad = f", {file.bad_rows} more cannot be used: {file.problem}" if file.bad_rows else ""
    return f"{file.path}: {file.rows:,} rows{bad}"


def _image_line(images: ImageState) -> str:
    line = f"images {images.folder}: {images.found:,} of {images.referenced:,} there"
    if images.missing is not None:
        line += f", {images.referenced - images.found - images.empty:,} missing: {images.why}"
    return line + (f", {images.empty:,} of no bytes: get them again" if images.empty else "")
