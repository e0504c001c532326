"""A run's folder on disk: its ledger, its lock, and the snapshot after each stage.

    runs/mine/
      config.yaml        resolved, frozen
      ledger.jsonl       append-only: what is finished
      history/STAGE/     everything after a stage: GROUP/ adapters (hard links where nothing changed),
                         codebook.json (methods with groups), method.safetensors, method.json
      state/             checkpoints of the task in progress
      init/              of a run with an Init stage: how it was learned, and init/model, the base it left
      pool/GROUP/        the adapters of the last stage: copies, for whoever uses them
      codebook.json      the codebook of the last stage
      predictions/ROW/TASK.jsonl
      evaluations/       what `lcia eval` measured later
      training_log.jsonl
      results.json
      log.txt            what the run printed, where a list of runs or the demo began it (and .log.progress
                         while it works: in one line, how far it is)

The ledger's lines are the truth: a folder that no line names is unfinished work and is made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lcia.adapters import Pool
from lcia.errors import UserError
from lcia.files import append_json_line, file_sha256, move_durably, write_json, write_text
from lcia.methods import Combined
from lcia.processes import on_main

# There before a run begins, where something else begins it.
_BESIDE_A_RUN = {".lock", ".log.progress", "log.txt"}
_CONFIG_PART = ".config.yaml.*.part"  # of a process that was killed while it began a run
_CHANGES = ("extended", "rolled_back", "groups_changed")
_CELLS = ("scores", "routing", "oracle", "too_long")  # of a row: {task: value}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class RunFolder:
    """Reads and writes one run folder; knows nothing of training or evaluation."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.training_log = self.path / "training_log.jsonl"
        self.state = self.path / "state"
        self.init = self.path / "init"
        self.log = self.path / "log.txt"
        self._ledger = self.path / "ledger.jsonl"
        self._history = self.path / "history"

    def require_run(self) -> RunFolder:
        """Raises UserError unless a run lies here."""
        if not self.config.is_file():
            raise UserError(f"{self.path}: not a run folder (no config.yaml in it)")
        return self

    @on_main
    def require_free(self) -> RunFolder:
        """Raises UserError unless a new run can begin here."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"output_dir {self.path}: a file of this name exists")
        if self.config.exists():
            raise UserError(
                f"output_dir {self.path} holds another run; choose another output_dir, "
                f"or go on with `lcia resume {self.path}`"
            )
        if self.path.exists() and any(
            entry.name not in _BESIDE_A_RUN and not entry.match(_CONFIG_PART) for entry in self.path.iterdir()
        ):
            raise UserError(f"output_dir {self.path} is not empty and holds no run; choose another output_dir")
        return self

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One run that writes at a time, of however many processes; a line that the one before left cut is removed.

        The operating system lets the lock go with its process, however that ends.

        Raises:
            UserError: another process has it, or nothing can be written here.
        """
        with contextlib.ExitStack() as held:

            @on_main
            def take() -> None:
                try:
                    self.path.mkdir(parents=True, exist_ok=True)
                    file = held.enter_context((self.path / ".lock").open("w"))
                except OSError as error:
                    raise UserError(f"{self.path}: nothing can be written here: {error.strerror}") from error
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    message = f"{self.path}: another process is writing this run; wait for it or stop it"
                    raise UserError(message) from None

            take()
            self.cut_unconfirmed()
            yield

    # --- the ledger

    def records(self, *events: str) -> list[dict[str, Any]]:
        """The ledger's lines of these events, oldest first, without what was rolled back.

        A last line cut by a crash was never confirmed.

        Raises:
            UserError: another line than the last is damaged.
        """
        return [record for record in self._effective() if record["event"] in events]

    def _effective(self) -> list[dict[str, Any]]:
        text = self._ledger.read_text(encoding="utf-8", errors="replace") if self._ledger.is_file() else ""
        found: list[dict[str, Any]] = []
        for number, line in enumerate(text.split("\n")[:-1], start=1):  # behind the last newline: empty, or cut
            try:
                record = json.loads(line)
                event = record["event"]
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{self._ledger}, line {number}: damaged; restore the file or start a new run"
                ) from None
            if event == "rolled_back":
                found = _rolled_back(found, record["to"])
            found.append(record)
        return found

    def snapshots(self) -> list[dict[str, Any]]:
        """The lines that have a folder in history/, oldest first."""
        return self.records("stage_learned", "groups_changed")

    def rows(self) -> dict[int, dict[str, Any]]:
        """The measured rows of the matrix: several lines of one row were measured at different times.

        A change of the groups by hand makes the last row a thing of the past.
        """
        rows: dict[int, dict[str, Any]] = {}
        for record in self.records("row_measured", "groups_changed"):
            if record["event"] == "groups_changed":
                del rows[max(rows)]
                continue
            row = rows.setdefault(record["row"], {"row": record["row"]})
            for key in _CELLS:
                row[key] = {**row.get(key, {}), **record[key]}
            for key in ("eval_s", "evaluations_run", "evaluations_reused"):
                row[key] = row.get(key, 0) + record[key]
            spent = row.setdefault("method_cost", {})
            for key, value in record.get("method_cost", {}).items():  # lines of older versions have none
                spent[key] = spent.get(key, 0) + value
            row["peak_memory_mib"] = max(row.get("peak_memory_mib", 0.0), record["peak_memory_mib"])
            row["at"] = record["at"]
        return rows

    @on_main
    def confirm(self, event: str, **facts: Any) -> dict[str, Any]:
        """Append a line: from now on this is finished."""
        if event in _CHANGES:  # results.json tells of another run until that one is brought to its end
            (self.path / "results.json").unlink(missing_ok=True)
        record = {"event": event, "at": now(), **facts}
        append_json_line(self._ledger, record)
        return record

    def base_sha256(self) -> str | None:
        """The weights that the run's adapters belong to; None before the ledger's first line."""
        known = self.records("run_began", "init_learned")
        return str(known[-1]["base_sha256"]) if known else None

    def reader_sha256(self, versions: Mapping[str, str]) -> str | None:
        """Of what made tokens and pixels when the run began; None before that, of an older run, or where transformers
        is another one by now, which may write the same settings otherwise.
        """
        known = self.records("run_began")
        same = known and known[-1]["versions"].get("transformers") == versions["transformers"]
        return known[-1].get("reader_sha256") if same else None

    def init_model(self) -> Path | None:
        """The model that the Init stage left; None where there is no such stage, or it is not finished.

        Raises:
            UserError: one of its files is missing or was altered.
        """
        learned = self.records("init_learned")
        return _check_files(self.init / "model", learned[0]["files"]) if learned else None

    @on_main
    def cut_unconfirmed(self) -> None:
        """Remove a last line without its newline, or the next line would be glued to it."""
        text = self._ledger.read_text(encoding="utf-8", errors="replace") if self._ledger.is_file() else ""
        if text and not text.endswith("\n"):
            write_text(self._ledger, text[: text.rfind("\n") + 1])

    @on_main
    def tidy(self) -> None:
        """Remove what no line of the ledger names, and let pool/ show the last snapshot."""
        self.cut_unconfirmed()
        for partial in [*self.path.rglob(".*.part")]:  # of a process that was killed while it wrote
            if partial.relative_to(self.path).parts[0] == "evaluations":
                continue  # `lcia eval` takes no lock, and may be writing now
            if partial.is_dir():
                shutil.rmtree(partial)
            else:
                partial.unlink(missing_ok=True)
        snapshots = self.snapshots()
        known = {record["stage"] for record in snapshots}
        if self._history.is_dir():
            for folder in self._history.iterdir():
                if folder.name not in known:
                    shutil.rmtree(folder)
        if snapshots:
            self.publish(snapshots[-1]["stage"])
        measured = {(str(row), task) for row, cells in self.rows().items() for task in cells["scores"]}
        for file in (self.path / "predictions").glob("*/*.jsonl"):
            if (file.parent.name, file.stem) not in measured:
                file.unlink()
                if not any(file.parent.iterdir()):
                    file.parent.rmdir()
        if self.training_log.is_file():
            for task in {json.loads(line)["task"] for line in self._logged()} - known:
                self.forget_log_of(task)

    def _logged(self) -> list[str]:
        """The whole lines of the training log; a crash may have cut its last one."""
        lines = self.training_log.read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n")]

    @on_main
    def append_log(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records of training steps to the training log."""
        with self.training_log.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)

    @on_main
    def forget_log_of(self, task: str) -> None:
        """Remove the training log of a task that was interrupted or rolled back."""
        if self.training_log.is_file():
            kept = "".join(line for line in self._logged() if json.loads(line)["task"] != task)
            if kept != self.training_log.read_text(encoding="utf-8"):
                write_text(self.training_log, kept)

    # --- snapshots

    @on_main
    def save_snapshot(
        self, stage: str, pool: Pool, method: Combined, model_card: Callable[[str], str]
    ) -> dict[str, str]:
        """Write history/STAGE, complete or not at all.

        Adapters that did not change are hard links into the snapshot before. Returns {file: sha256}.
        """
        before = self.snapshots()
        if stage in {record["stage"] for record in before}:
            raise ValueError(f"{self.path}: {stage!r} was learned already")  # its files may be what this one links to
        final, partial = self._history / stage, self._history / f".{stage}.part"
        for leftover in (final, partial):  # of an attempt that the ledger does not know
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        unchanged = before[-1]["sha256"] if before else {}
        for name in pool.names:
            if unchanged.get(name) == pool.sha256(name):
                source = self._history / before[-1]["stage"] / name
                shutil.copytree(source, partial / name, copy_function=_link_or_copy)
            else:
                pool.save(name, partial / name)
                write_text(partial / name / "README.md", model_card(name))
        _save_method(method, partial)
        return move_durably(partial, final)

    @on_main
    def publish(self, stage: str) -> None:
        """Let pool/ and codebook.json show a stage: copies, which can be made again from history/ at any time."""
        source, target, partial = self._history / stage, self.path / "pool", self.path / ".pool.part"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for folder in source.iterdir():
            if folder.is_dir():
                shutil.copytree(folder, partial / folder.name)  # no links: what a user writes there must not get here
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        if (source / "codebook.json").is_file():
            write_text(self.path / "codebook.json", (source / "codebook.json").read_text(encoding="utf-8"))

    def load_snapshot(
        self, record: Mapping[str, Any], pool: Pool, method: Combined, adapters: Collection[str] | None = None
    ) -> None:
        """Load what `save_snapshot` wrote, of the adapters all or those named. Raises UserError as `check_snapshot`."""
        self.load_adapters(record, pool, adapters)
        folder = self._history / record["stage"]
        _check_files(folder, {name: digest for name, digest in record["files"].items() if "/" not in name})
        _load_method(method, folder)

    def load_adapters(self, record: Mapping[str, Any], pool: Pool, adapters: Collection[str] | None = None) -> None:
        """Load the adapters that `save_snapshot` wrote, or those named. Raises UserError as `check_snapshot` does."""
        for name in record["sha256"]:
            if adapters is None or name in adapters:
                files = {file: digest for file, digest in record["files"].items() if file.startswith(f"{name}/")}
                pool.load(name, _check_files(self._history / record["stage"], files) / name)

    def check_snapshot(self, record: Mapping[str, Any]) -> Path:
        """The folder of a snapshot, each file compared with the hash in its ledger line.

        Raises:
            UserError: a file is missing or was altered.
        """
        return _check_files(self._history / record["stage"], record["files"])


def _rolled_back(lines: list[dict[str, Any]], to: str) -> list[dict[str, Any]]:
    """The ledger's lines as they were behind the stage `to`: without cells of tasks that were to come later, too."""
    end = max(i for i, line in enumerate(lines) if line.get("stage") == to) + 1
    while end < len(lines) and lines[end]["event"] in ("row_measured", "went_on"):
        end += 1
    while lines[end - 1]["event"] == "went_on":  # with what comes behind, which goes
        end -= 1
    learned = {task for line in lines[:end] if line["event"] == "stage_learned" for task in line["placements"]}
    return [
        {**line, **{key: {task: line[key][task] for task in line[key] if task in learned} for key in _CELLS}}
        if line["event"] == "row_measured"
        else line
        for line in lines[:end]
    ]


def _check_files(folder: Path, files: Mapping[str, str]) -> Path:
    """The folder. Raises UserError where a file is missing or has not its hash of `files`."""
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing; restore it from a copy or start a new run")
        if file_sha256(path) != digest:
            raise UserError(f"{path}: its content is not what the ledger recorded; restore it from a copy")
    return folder


def _link_or_copy(source: str, target: str) -> None:
    """A hard link where the file system has them: an adapter that did not change takes no new space."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _save_method(method: Combined, folder: Path) -> None:
    state = method.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    there = set()  # groups that were split share tensors, and safetensors saves each piece of memory once
    for key, value in state.items():
        if isinstance(value, torch.Tensor):
            tensors[key] = value.clone() if value.data_ptr() in there else value.contiguous()
            there.add(value.data_ptr())
    values = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
    save_file(tensors, folder / "method.safetensors")
    write_json(folder / "method.json", values)
    if method.codebook is not None:
        method.codebook.save(folder / "codebook.json")


def _load_method(method: Combined, folder: Path) -> None:
    state = json.loads((folder / "method.json").read_text(encoding="utf-8"))
    with safe_open(folder / "method.safetensors", framework="pt") as file:
        state.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 - not a mapping
    method.load_state_dict(state)
