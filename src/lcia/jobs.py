"""Commands of lcia, each in a process of its own: several at a time on this machine, or on a Ray cluster.

What a job computes does not depend on how many work beside it, as long as its number of threads is the same: in
bfloat16 the order of a sum decides its last digits.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from lcia.errors import UserError
from lcia.progress import PROGRESS_FILE

_COMMAND = (sys.executable, "-m", "lcia")
_POLL_S = 0.1
_GRACE_S = 10.0  # to end after an interruption; a run that is killed goes on just as well
_LINES_SHOWN = 5  # of a job that failed
_TAIL_BYTES = 4096
# How a thread waits for the others of its process: it changes no result. Two runs of two threads on two cores took 72 s
# like this, and 209 and 219 where threads wait at work; with one thread each, 64 and 69.
_WAITING = "OMP_WAIT_POLICY"


@dataclass(frozen=True)
class Job:
    """`lcia ARGUMENTS` in `folder`; all that it prints goes to `log`, behind what is there."""

    name: str
    arguments: tuple[str, ...]
    log: Path
    threads: int
    folder: Path = field(default_factory=Path.cwd)

    @property
    def progress(self) -> Path:
        """A file whose one line says how far it is, while it works."""
        return self.log.with_name(f".{self.log.stem}.progress")


class Finished(NamedTuple):
    job: Job
    exit_code: int  # 0: done; -n: ended by signal n


@dataclass(frozen=True)
class Failure:
    """A job that ended with an error, and the last lines it printed."""

    job: Job
    exit_code: int
    last_lines: tuple[str, ...]

    def __str__(self) -> str:
        how = f"signal {-self.exit_code}" if self.exit_code < 0 else f"exit code {self.exit_code}"
        return "\n    ".join([f"{self.job.name}: failed with {how}; the end of {self.job.log}:", *self.last_lines])


# One after the other what is finished, in whatever order; closing it ends what is at work.
Runner = Callable[[Sequence[Job]], Generator[Finished, None, None]]


def threads_each(threads: int | None, sharers: int = 1) -> int:
    """Threads of one job: as asked for, else its share of those that one alone would have here.

    Args:
        sharers: how many a share is made for; never how many work at a time, on which no result may depend.
    """
    import torch  # here, as below: whoever says how many threads needs no torch

    return threads or max(1, torch.get_num_threads() // sharers)


def visible_devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",") if named else [str(number) for number in range(count)])[:count]


def run_here(jobs: Sequence[Job], at_once: int, devices: Sequence[str] = ()) -> Generator[Finished, None, None]:
    """`at_once` processes at a time, in the order given.

    Args:
        devices: GPUs, dealt out round robin to the `at_once` places: a job sees the one of its place.
    """
    waiting = deque(jobs)
    places: list[dict[str, str]] = [{} for _ in range(at_once)]
    for number, place in enumerate(places):
        if devices:
            place["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
        if at_once > 1 and _WAITING not in os.environ:
            place[_WAITING] = "PASSIVE"
    at_work: list[tuple[Job, subprocess.Popen[bytes], dict[str, str]]] = []
    try:
        while waiting or at_work:
            while waiting and places:
                job, place = waiting.popleft(), places.pop(0)
                at_work.append((job, _start(job, place), place))
            ended = [one for one in at_work if one[1].poll() is not None]
            for one in ended:
                job, process, place = one
                at_work.remove(one)
                places.append(place)
                yield Finished(job, process.returncode)
            if not ended:
                time.sleep(_POLL_S)
    finally:
        _end([process for _, process, _ in at_work])


def run_on_ray(jobs: Sequence[Job]) -> Generator[Finished, None, None]:
    """As many at a time as a Ray cluster has CPUs for, and GPUs where it has any: one for each job.

    The cluster is that of RAY_ADDRESS, else the one this machine belongs to, else one of this machine alone. Its nodes
    must have lcia, and the same files at the same paths.

    Raises:
        UserError: Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise UserError("--ray: Ray is not installed; install it (the extra `ray`), or leave out --ray") from None
    if not ray.is_initialized():
        ray.init()
    gpus = 1 if ray.cluster_resources().get("GPU") else 0
    environment = {name: value for name, value in os.environ.items() if name.startswith("LCIA_")}
    environment.pop(PROGRESS_FILE, None)  # of the driver itself
    waiting = {}
    try:
        for job in jobs:
            task = ray.remote(num_cpus=job.threads, num_gpus=gpus, max_retries=0)(_run)
            waiting[task.remote(job, environment)] = job
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            job = waiting.pop(done)
            try:
                exit_code = ray.get(done)
            except ray.exceptions.RayError as error:  # not the command failed: its node or its worker did
                with _open(job.log) as log:
                    log.write(f"Ray: {error}\n")
                exit_code = 1
            yield Finished(job, exit_code)
    finally:
        for reference in waiting:
            ray.cancel(reference)  # KeyboardInterrupt where it is at work
        if waiting:
            ray.wait(list(waiting), num_returns=len(waiting), timeout=2 * _GRACE_S)


def _run(job: Job, environment: Mapping[str, str]) -> int:
    """The exit code of a job."""
    process = _start(job, environment)
    try:
        return process.wait()
    finally:
        _end([process])


def _start(job: Job, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    settings = {"OMP_NUM_THREADS": str(job.threads), **environment}
    told = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1", PROGRESS_FILE: str(job.progress)}
    with _open(job.log) as log:
        shown = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
        log.write(f"$ {' '.join(shown)} lcia {shlex.join(job.arguments)}\n")
        log.flush()
        return subprocess.Popen(
            [*_COMMAND, *job.arguments],
            cwd=job.folder,
            env={**os.environ, **settings, **told},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,  # Ctrl-C reaches this process alone, which then ends the others once
        )


def _open(log: Path) -> TextIO:
    log.parent.mkdir(parents=True, exist_ok=True)
    return log.open("a", encoding="utf-8")


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Interrupt what still works, as Ctrl-C does; kill what does not listen."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + _GRACE_S
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()


def carry_out(
    jobs: Sequence[Job], run: Runner, console: Console, on_success: Callable[[Job], None] | None = None
) -> list[Failure]:
    """Do all jobs, tell on `console` how far they are, and return those that failed: they do not stop the others.

    SIGTERM and the end of the terminal are like Ctrl-C while this works: the jobs are ended before it is.

    Args:
        on_success: called with each job that is done, at once.
    """
    board = _Board(jobs, console)
    failures = []
    # what is ignored, as under nohup, stays so
    watched = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) == signal.SIG_DFL]
    for number in watched:
        signal.signal(number, signal.default_int_handler)
    try:
        with contextlib.closing(run(jobs)) as finished, board:
            for job, exit_code in finished:
                last_lines = board.new_lines(job)[-_LINES_SHOWN:]
                board.end(job)
                if exit_code:
                    failures.append(Failure(job, exit_code, tuple(last_lines)))
                    board.say(str(failures[-1]))
                    continue
                if on_success is not None:
                    on_success(job)
                board.say(f"{job.name}: done")
    except KeyboardInterrupt:
        board.say("interrupted; the same command goes on with what is not finished")
        raise
    finally:
        for number in watched:
            signal.signal(number, signal.SIG_DFL)
    return failures


class _Board:
    """A bar over all jobs, and below it how far each job at work is, or the last line that it has printed."""

    def __init__(self, jobs: Sequence[Job], console: Console) -> None:
        self._console = console
        self._before = {job: job.log.stat().st_size if job.log.is_file() else 0 for job in jobs}  # bytes
        for job in jobs:
            job.progress.unlink(missing_ok=True)  # of an attempt that was killed
        self._left = list(jobs)
        columns = (TextColumn("runs"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console)
        self._count = self._bar.add_task("runs", total=len(jobs))
        self._live = Live(self, console=console, refresh_per_second=2, transient=True)

    def __enter__(self) -> None:
        if self._console.is_terminal:
            self._live.start()

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        done = self._bar.tasks[0]
        self._console.print(
            f"[{done.completed:.0f}/{done.total:.0f}] {text}", highlight=False, markup=False, soft_wrap=True
        )

    def end(self, job: Job) -> None:
        self._left.remove(job)
        self._bar.advance(self._count)
        job.progress.unlink(missing_ok=True)

    def new_lines(self, job: Job) -> list[str]:
        """The last lines of this attempt; none if it has not begun."""
        if not job.log.is_file():
            return []
        with job.log.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._before[job], end - _TAIL_BYTES))
            lines = log.read().decode("utf-8", errors="replace").splitlines()
        return [line.rstrip() for line in lines if line.strip()]

    def _state(self, job: Job) -> str:
        """In one line; empty if it has not begun."""
        with contextlib.suppress(OSError):
            told = job.progress.read_text(encoding="utf-8", errors="replace")
            if told:  # else it is being written
                return told
        lines = self.new_lines(job)
        return lines[-1].strip() if lines else ""

    def __rich__(self) -> Group:
        states = Table.grid(padding=(0, 2))
        states.add_column(no_wrap=True)
        states.add_column(no_wrap=True, overflow="ellipsis")
        for job in list(self._left):  # another thread asks
            state = self._state(job)
            if state:
                states.add_row(Text(job.name), Text(state))
        return Group(self._bar, states)
