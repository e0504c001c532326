"""Live progress on stderr: which task, step, loss, speed, time left, and the matrix filling in."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from lcia.processes import is_main

# names a file: a process whose terminal is another's writes there, in one line, how far it is
PROGRESS_FILE = "LCIA_PROGRESS_FILE"
_REFRESH_S = 0.5


class Reporter:
    """What a run tells while it works. On a terminal it is redrawn in place; elsewhere one line an event.

    Of several processes the main one speaks. Where LCIA_PROGRESS_FILE names a file, its one line says how far the
    piece of work is; it is gone when the work is over.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, quiet=not is_main())
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
        )
        self._live: Live | None = None
        named = os.environ.get(PROGRESS_FILE) if is_main() else None
        self._file = Path(named) if named else None
        self._told = float("-inf")  # when the file was written last
        self._title = ""
        self._tasks: list[str] = []
        self._columns: list[str] = []
        self._rows: dict[int, dict[str, float]] = {}
        self._current: Any = None
        self._loss = float("nan")

    def __enter__(self) -> Self:
        if self.console.is_terminal and not self.console.quiet:
            self._live = Live(self._render(), console=self.console, refresh_per_second=4, transient=True)
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)
            self._live = None
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.unlink(missing_ok=True)

    def start_run(self, title: str, tasks: Sequence[str], columns: Sequence[str] | None = None) -> None:
        """A matrix begins.

        Args:
            tasks: all of the run, after which its rows are named.
            columns: the tasks that are measured; None: the run's.
        """
        self._title, self._tasks, self._rows = title, list(tasks), {}
        self._columns = list(tasks if columns is None else columns)
        self._line(title)

    def start(self, what: str, total: int | None) -> None:
        """A piece of work begins, the one before is over. total: its units, None if not yet known."""
        if self._current is not None:
            self._bar.remove_task(self._current)
        self._current = self._bar.add_task(what, total=total, note="")
        self._started = time.monotonic()
        self._loss = float("nan")
        self._told = float("-inf")  # what begins is told at once: its first unit may take minutes
        self._refresh()

    def advance(self, units: int = 1) -> None:
        self._bar.update(self._current, advance=units)
        self._refresh()

    def training_step(self, record: dict[str, Any]) -> None:
        """One record of the training log: a step was taken, or a loss was logged."""
        self._loss = record.get("loss", self._loss)
        if "loss" in record:
            self._bar.update(self._current, note=f"loss {self._loss:.3f}")
        if "examples_per_s" in record:
            self._bar.update(
                self._current,
                completed=record["step"],
                total=record["total_steps"],
                note=f"loss {self._loss:.3f}  {record['examples_per_s']:.1f} examples/s",
            )
        self._refresh()

    def done(self, sentence: str) -> None:
        """A sentence for the record, kept on the screen."""
        self._line(sentence)

    def row(self, row: int, scores: dict[str, float]) -> None:
        """A row of the accuracy matrix is measured."""
        self._rows[row] = scores
        if self._live is None:  # else the table shows it
            self._line(f"  row {row}: " + "  ".join(f"{task} {score:.1f}" for task, score in scores.items()))
        self._refresh()

    def _line(self, text: str) -> None:
        if text:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._render())
        if self._file is not None and self._current is not None and time.monotonic() - self._told > _REFRESH_S:
            self._told = time.monotonic()
            with contextlib.suppress(OSError):  # a line about the work must not end it
                self._file.write_text(self._one_line(), encoding="utf-8")

    def _one_line(self) -> str:
        """The piece of work at hand: `learning travel  12/24  loss 0.310`."""
        task = next(task for task in self._bar.tasks if task.id == self._current)
        count = "" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}"
        return "  ".join(part for part in (task.description, count, task.fields["note"]) if part)

    def _render(self) -> Group:
        table = Table(title=self._title or None, title_justify="left")
        table.add_column("after")
        for task in self._columns:
            table.add_column(task, justify="right")
        for row, scores in sorted(self._rows.items()):
            label = "base model" if row == 0 else self._tasks[min(row, len(self._tasks)) - 1]
            table.add_row(label, *(f"{scores[t]:.1f}" if t in scores else "·" for t in self._columns))
        return Group(*([table] if self._rows else []), self._bar)
