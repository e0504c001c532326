"""Writing files so that a crash leaves the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a whole file atomically and durably: temporary name, fsync, rename, fsync of the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # containers that share a folder often have equal process numbers
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """JSON with sorted structure as given, two spaces, no NaN."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def append_json_line(path: Path, value: Any) -> None:
    """Append one JSON line durably."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Wait until no other process is in here with this file, however long; the lock of one that is killed goes with it.

    For what would only be done twice: where the file cannot be written or the file system has no locks, nobody waits.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(lock.open("a"))
            fcntl.flock(file, fcntl.LOCK_EX)
            held.callback(fcntl.flock, file, fcntl.LOCK_UN)  # not when a child of ours ends, too
            held.callback(lock.unlink, missing_ok=True)
        yield


@cache
def warn_once(message: str) -> None:
    """A warning on stderr. Python's own "once" is forgotten as soon as a library changes the filters of warnings."""
    warnings.warn(message, stacklevel=2)


def move_durably(partial: Path, final: Path) -> dict[str, str]:
    """Let the whole folder `partial`, beside it, become `final`, which does not exist. Returns {file in it: sha256}."""
    files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    hashes = {str(path.relative_to(partial)): file_sha256(path) for path in files}
    os.replace(partial, final)
    sync_folder(final.parent)
    return hashes


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
