"""Where the tasks of a stream lie: a built-in name, a folder, a file, or a list in a configuration."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lcia.errors import UserError, did_you_mean
from lcia.stream.coast import coast
from lcia.stream.coin import coin
from lcia.stream.formats import SUFFIXES, decode_utf8, parse_json, read_bytes
from lcia.stream.hub import super_ni_tasks
from lcia.stream.task_source import (
    DATA,
    Found,
    PositionalSplit,
    TaskSource,
    data_files,
    data_folder,
    is_hub_id,
    is_saved,
    is_split_file,
    looks_like_hub_id,
    task_at,
)
from lcia.stream.vision import vision

TASK_KEYS = ("name", "path", "instruction", "scorer", "image_folder", "examples")
_NOT_UNDERSTOOD = (".csv", ".tsv", ".xlsx", ".arrow", ".gz", ".zst", ".bz2", ".xz", ".zip", ".tar")
_EXAMPLES = "positive_examples"  # of a task, in tasks.json
TASK_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")


def find(source: str | Path | Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Found:
    """The tasks that `source` names.

    Raises:
        UserError: there is no such stream, a task has no data, or names cannot be used or come twice.
    """
    if isinstance(source, str) and source in BUILT_IN:
        found = BUILT_IN[source]()
    elif isinstance(source, str | Path):
        found = _at_path(Path(source).expanduser())
    elif isinstance(source, Mapping):
        found = _with_options(source)
    elif isinstance(source, list | tuple):
        found = Found("list", tuple(_listed(entry, number) for number, entry in enumerate(source)))
    else:
        raise UserError(f"stream must be a name, a folder or a list of tasks, not {type(source).__name__}")
    if not found.tasks:
        raise UserError("stream: the list of tasks is empty; give at least one {name, path}")
    _check_names(task.name for task in (*found.tasks, *found.on_request))
    return found


def stated_options(stream: Any) -> dict[str, Any]:
    """`name` and options of a stream as a configuration states it (no list); of a built-in one with their defaults."""
    options = dict(stream) if isinstance(stream, Mapping) else {"name": stream}
    name = options.get("name")
    known = inspect.signature(BUILT_IN[name]).parameters if isinstance(name, str) and name in BUILT_IN else {}
    return {**{option.name: option.default for option in known.values()}, **options}


def _with_options(source: Mapping[str, Any]) -> Found:
    """A built-in stream with options: {name: instrdialog, order: 2}."""
    options = dict(source)
    name = options.pop("name", None)
    if not isinstance(name, str) or name not in BUILT_IN:
        hint = did_you_mean(str(name), BUILT_IN)
        raise UserError(f"stream: {{name, ...}} is for built-in streams, and {name!r} is none. {hint}")
    known = inspect.signature(BUILT_IN[name]).parameters
    for key in options:
        if key not in known:
            hint = did_you_mean(str(key), known) if known else "It takes none."
            raise UserError(f"stream: {name} has no option {key!r}. {hint}")
    return BUILT_IN[name](**options)


def _at_path(path: Path) -> Found:
    if path.is_dir():
        try:
            return folder(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
    if path.is_file():
        return Found(path.stem, (task_at(path.stem, str(path), None),))
    hint = did_you_mean(str(path), BUILT_IN)
    raise UserError(f"stream {str(path)!r} is neither a built-in stream nor a folder or file. {hint}")


def folder(path: Path) -> Found:
    """The tasks in a folder, in the order of its tasks.json, else alphabetically."""
    if (path / "tasks.json").is_file():
        return _manifest(path)
    inside = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    inside_files = data_files(path)
    if is_saved(path) or (inside_files and all(is_split_file(entry) for entry in inside_files)):
        name = path.resolve().name
        return Found(name, (task_at(name, str(path), None),))
    candidates = inside_files + [entry for entry in inside if entry.is_dir() and (data_files(entry) or is_saved(entry))]
    if not candidates:
        raise UserError(
            f"{path}: no tasks here. A task is a file {' | '.join('NAME' + suffix for suffix in SUFFIXES)}, "
            "or a folder NAME with train, dev and test files."
        )
    # two of one name stay together, so that the check on names sees them
    unread = [entry.name for entry in inside if entry not in candidates and _looks_like_data(entry)]
    candidates.sort(key=lambda entry: entry.name if entry.is_dir() else entry.stem)
    tasks = [task_at(entry.name if entry.is_dir() else entry.stem, str(entry), path) for entry in candidates]
    notes = (f"{path}: not read as a task: {', '.join(unread)}",) if unread else ()
    return Found(path.resolve().name, tuple(tasks), notes)


def _looks_like_data(path: Path) -> bool:
    """Whether a user might take it for a task: tables and archives, and folders that hold data further down."""
    if path.is_dir():
        return any(data_files(inner) for inner in path.iterdir() if inner.is_dir())
    return path.suffix.lower() in {*SUFFIXES, *_NOT_UNDERSTOOD}


def _manifest(path: Path) -> Found:
    """The tasks that tasks.json lists: names, objects with `task` or `name`, or one object keyed by name."""
    file = path / "tasks.json"
    content = parse_json(decode_utf8(read_bytes(file), file), file)
    if isinstance(content, dict) and isinstance(content.get("tasks"), dict | list):
        content = content["tasks"]
    if isinstance(content, dict):
        if not all(isinstance(entry, dict) for entry in content.values()):
            raise UserError(f"{file}: an object must give each task's name an object: {{name: {{instruction: ...}}}}")
        content = [{"name": name, **entry} for name, entry in content.items()]
    if not isinstance(content, list) or not content:
        raise UserError(f"{file}: must be a list of task names, or of objects with 'task' (or 'name')")
    tasks = []
    for number, entry in enumerate(content):
        where = f"{file}: [{number}]"
        entry = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict):
            raise UserError(f"{where} must be a task name, or an object with 'task' (or 'name')")
        named = {_ALIASES.get(key, key): value for key, value in entry.items()}
        if len(named) < len(entry):
            raise UserError(f"{where}: 'task' and 'name', or 'file' and 'path', mean the same; keep one")
        entry = named
        _refuse_typos(entry, where)
        fields = _fields({key: value for key, value in entry.items() if key in TASK_KEYS}, where)
        if "name" not in fields:
            raise UserError(f"{where} has no 'task' (or 'name')")
        tasks.append(replace(_from_fields(fields, path), positive_examples=entry.get(_EXAMPLES)))
    used = {file.resolve() for task in tasks for file, _ in task.files}
    unlisted = [
        entry.name
        for entry in sorted(path.iterdir())
        if entry.suffix in {".jsonl", ".parquet"} and entry.resolve() not in used
    ]
    notes = (f"not in {file}, so not part of the stream: {', '.join(unlisted)}",) if unlisted else ()
    return Found(path.resolve().name, tuple(tasks), notes)


_ALIASES = {"task": "name", "file": "path"}


def _refuse_typos(entry: Mapping[str, Any], where: str) -> None:
    """tasks.json may carry anything about a task (source, licence), but not a known key misspelt."""
    for key in entry:
        near = difflib.get_close_matches(key, TASK_KEYS, n=1, cutoff=0.85)
        if key not in TASK_KEYS and near:
            raise UserError(f"{where}: unknown key {key!r}. Did you mean {near[0]!r}?")


def _listed(entry: Any, number: int) -> TaskSource:
    """A task of the list in a configuration; its paths are relative to the working directory."""
    where = f"stream[{number}]"
    if not isinstance(entry, Mapping):
        keys = ", ".join(key if key in ("name", "path") else f"{key}?" for key in TASK_KEYS)
        raise UserError(f"{where} must be {{{keys}}}, not {entry!r}")
    for key in entry:
        if key not in TASK_KEYS:
            raise UserError(f"{where}: unknown key {key!r}. {did_you_mean(str(key), TASK_KEYS)}")
    fields = _fields(entry, where)
    for key in ("name", "path"):
        if key not in fields:
            raise UserError(f"{where} has no {key!r}; a task is {{name, path, ...}}")
    return _from_fields(fields, None)


def _fields(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keys that have a value: a text, but for `examples`."""
    fields: dict[str, Any] = {}
    for key, value in entry.items():
        value = str(value) if isinstance(value, Path) else value
        if value is None:
            continue
        if key == "examples":
            fields[key] = _example_count(value, where)
            continue
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: {key!r} must be a text that is not empty, not {value!r}")
        fields[key] = value
    return fields


def _example_count(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"{where}: 'examples' must be a whole number from 0, not {value!r}")
    return value


def _from_fields(fields: Mapping[str, Any], root: Path | None) -> TaskSource:
    """The task of one entry; paths are relative to `root`, the folder of tasks.json, where there is one."""
    name = fields["name"]
    if root is None:
        path = fields["path"]
    elif "path" not in fields:
        path = str(_by_name(name, root))
    elif (root / fields["path"]).exists() or not looks_like_hub_id(fields["path"]):
        path = str(root / fields["path"])
    else:
        path = fields["path"]
    image_folder = fields.get("image_folder")
    task = task_at(
        name,
        path,
        root,
        instruction=fields.get("instruction"),
        scorer=fields.get("scorer"),
        image_folder=None if image_folder is None else (root or Path()) / Path(image_folder).expanduser(),
    )
    return replace(task, examples=fields.get("examples"))


def _by_name(name: str, root: Path) -> Path:
    """The one file or folder in `root` that holds the task `name`."""
    _check_names([name])
    places = [root / f"{name}{suffix}" for suffix in SUFFIXES if (root / f"{name}{suffix}").is_file()]
    places += [root / name] if (root / name).is_dir() else []
    if len(places) > 1:
        raise UserError(f"two tasks named {name!r}: {' and '.join(map(str, places))}; rename or remove one")
    if not places:
        there = {entry.stem for entry in root.iterdir() if entry.suffix in SUFFIXES or entry.is_dir()} - {"tasks"}
        hint = did_you_mean(name, there) if there else ""
        raise UserError(f"{root / 'tasks.json'}: no data for the task {name!r} in {root}. {hint}".rstrip())
    return places[0]


def _check_names(names: Iterable[str]) -> None:
    seen: dict[str, str] = {}  # folded name: as written, for file systems that ignore case
    for name in names:
        if not TASK_NAME.fullmatch(name):
            raise UserError(
                f"task name {name!r} cannot be used: it names folders and adapters, so only A-Z a-z 0-9 _ - "
                "(at most 100). Rename the file, or name the task in tasks.json or in the configuration."
            )
        if name.casefold() in seen:
            other = seen[name.casefold()]
            also = "" if other == name else f" (the other is {other!r}; case does not tell them apart)"
            raise UserError(f"two tasks named {name!r}{also}; rename one")
        seen[name.casefold()] = name


_CITB_SPLIT = PositionalSplit(test=50, dev=50, train=500)


def _assistant() -> Found:
    return Found("assistant", folder(DATA / "assistant").tasks)


def _instrdialog(*, order: int = 1, path: str | None = None, examples: int = 2) -> Found:
    """CITB's 19 dialogue tasks (Zhang et al., Findings of EMNLP 2023) in one of its three orders.

    Args:
        order: 1, 2 or 3.
        path: a folder of Super-NI task files, or one with a tasks.json; a mirror of Super-NI on the hub, as its id or
            as the folder in which `datasets` saved it; `$LCIA_DATA/instrdialog` if not given.
        examples: positive examples in the prompt; CITB's 2. A mirror holds none.
    """
    file = DATA / "instrdialog" / "orders.json"
    orders: dict[str, list[str]] = parse_json(decode_utf8(read_bytes(file), file), file)
    if str(order) not in orders:
        raise UserError(f"stream: instrdialog has the orders {', '.join(orders)}, not {order!r}")
    count = _example_count(examples, "stream: instrdialog")
    if isinstance(path, str) and is_hub_id(path):
        data, is_mirror = Path(path), True
    else:
        data = data_folder("instrdialog", path)
        is_mirror = is_saved(data)
    if is_mirror:
        if count:
            raise UserError(
                f"stream: instrdialog: the data set {data} has rows of definition, inputs and targets, and no positive "
                f"examples to show {count} of: set examples: 0, or take Super-NI's own task files"
            )
        tasks = super_ni_tasks(str(data), orders[str(order)], _CITB_SPLIT)
    elif (data / "tasks.json").is_file():
        tasks = _listed_tasks(data)
    else:
        tasks = _task_files(data, orders[str(order)])
    missing = [name for name in orders[str(order)] if name not in tasks]
    if missing:
        raise UserError(f"stream: instrdialog: {data} has no task {missing[0]!r} ({len(missing)} of 19 are missing)")
    chosen = (tasks[name] for name in orders[str(order)])
    return Found("instrdialog", tuple(replace(task, scorer="rouge_l", examples=count) for task in chosen))


def _listed_tasks(path: Path) -> dict[str, TaskSource]:
    return {task.name: task for task in _manifest(path).tasks}


def _task_files(path: Path, names: Sequence[str]) -> dict[str, TaskSource]:
    """The Super-NI task files of these names, with CITB's splits."""
    files = {name: path / f"{name}.json" for name in names}
    return {
        name: replace(task_at(name, str(file), path), split=_CITB_SPLIT)
        for name, file in files.items()
        if file.is_file()
    }


BUILT_IN: dict[str, Callable[..., Found]] = {
    "assistant": _assistant,
    "instrdialog": _instrdialog,
    "vision": vision,
    "coin": coin,
    "coast": coast,
}
