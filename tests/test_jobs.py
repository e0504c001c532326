"""Lists of runs: how many work at a time, what becomes of failures and interruptions, and that the number of processes
changes no result. Most of it with a small script in place of lcia; Ray with a stand-in of its documented functions, and
itself where it is installed.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from lcia import bench_list, jobs, learning, progress
from lcia.bench import bench_config
from lcia.bench_list import bench_runs, outstanding, parse_list, parse_seeds
from lcia.errors import UserError
from lcia.files import write_text
from lcia.jobs import Job, carry_out, run_here, run_on_ray, threads_each, visible_devices
from lcia.progress import Reporter
from lcia.run import train
from lcia.run_folder import RunFolder
from lcia.stream.sources import DATA
from report_runs import make_run
from test_run import Killed, hashes, without_cost

Run = Callable[..., tuple[int, str, str]]
TASKS = json.loads((DATA / "instrdialog/orders.json").read_text(encoding="utf-8"))["1"]

# Stands for `python -m lcia`: what it does is in its arguments.
SCRIPT = """
import os, signal, sys, time
what, *rest = sys.argv[1:]
print("threads", os.environ["OMP_NUM_THREADS"], "device", os.environ.get("CUDA_VISIBLE_DEVICES"))
if what == "work":  # FILE SECONDS: when it worked
    begin = time.monotonic()
    time.sleep(float(rest[1]))
    with open(rest[0], "w") as file:
        file.write(f"{begin} {time.monotonic()}")
elif what == "meet":  # MINE OTHER: ends when both are at work
    open(rest[0], "w").close()
    while not os.path.exists(rest[1]):
        time.sleep(0.01)
elif what == "fail":  # CODE
    for number in range(9):
        print("line", number, file=sys.stderr)
    sys.exit(int(rest[0]))
elif what == "die":
    os.kill(os.getpid(), signal.SIGKILL)
else:  # wait | stubborn
    signal.signal(signal.SIGINT, signal.SIG_IGN if what == "stubborn" else signal.default_int_handler)
    print("ready")
    try:
        time.sleep(120)
    except KeyboardInterrupt:
        print("interrupted")
        sys.exit(130)
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_COMMAND", (sys.executable, "-I", "-S", "-u", "-c", SCRIPT))
    monkeypatch.setattr(jobs, "_POLL_S", 0.01)


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Job]:
    def make(name: str, *arguments: object, threads: int = 1) -> Job:
        return Job(name, tuple(map(str, arguments)), tmp_path / name / "log.txt", threads, tmp_path)

    return make


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def told(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


# --- processes on this machine


def test_so_many_work_at_a_time_each_with_its_threads_and_no_two_on_one_device(script, job, tmp_path) -> None:
    some = [job(f"run{i}", "work", tmp_path / f"times{i}", 0.15, threads=i + 1) for i in range(5)]
    runner = partial(run_here, at_once=2, devices=["GPU-a", "GPU-b"])
    assert carry_out(some, runner, quiet()) == []
    spans, devices = [], []
    for i, one in enumerate(some):
        begin, end = map(float, (tmp_path / f"times{i}").read_text().split())
        spans.append((begin, end))
        *_, last = one.log.read_text().splitlines()
        assert last.startswith(f"threads {i + 1} device GPU-")
        devices.append(last.split()[-1])
    assert devices[:2] == ["GPU-a", "GPU-b"]
    for begin, _ in spans:
        beside = [device for device, (b, e) in zip(devices, spans, strict=True) if b <= begin < e]
        assert len(beside) == len(set(beside)) <= 2


def test_jobs_work_side_by_side(script, job, tmp_path) -> None:
    """Each ends only when the other one is at work."""
    one, two = tmp_path / "one", tmp_path / "two"
    console = quiet()
    assert (
        carry_out([job("a", "meet", one, two), job("b", "meet", two, one)], partial(run_here, at_once=2), console) == []
    )
    assert "[2/2]" in told(console)


def test_more_places_than_devices_share_them_round_robin(script, job) -> None:
    some = [job(f"run{i}", "fail", 0) for i in range(3)]
    carry_out(some, partial(run_here, at_once=3, devices=["4", "7"]), quiet())
    logs = [one.log.read_text() for one in some]
    assert [re.findall(r"device (\d)", log) for log in logs] == [["4"], ["7"], ["4"]]


@pytest.mark.parametrize(("at_once", "own", "told"), [(1, None, False), (2, None, True), (2, "ACTIVE", False)])
def test_threads_of_processes_side_by_side_let_the_others_work(script, job, monkeypatch, at_once, own, told) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if own:
        monkeypatch.setenv("OMP_WAIT_POLICY", own)
    one = job("run", "fail", 0)
    carry_out([one], partial(run_here, at_once=at_once), quiet())
    assert ("OMP_WAIT_POLICY=PASSIVE" in one.log.read_text()) == told


@pytest.mark.parametrize(
    ("named", "count", "found"),
    [
        (None, 2, ["0", "1"]),
        ("5,6,7", 2, ["5", "6"]),
        ("GPU-x,GPU-y", 2, ["GPU-x", "GPU-y"]),
        ("", 0, []),
        (None, 0, []),
    ],
)
def test_devices_keep_the_names_they_are_visible_under(monkeypatch, named, count, found) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert visible_devices() == found


@pytest.mark.parametrize(("asked", "sharers", "each"), [(None, 1, 8), (None, 3, 2), (None, 20, 1), (5, 3, 5)])
def test_threads_are_as_asked_or_a_share_of_what_one_run_would_have(monkeypatch, asked, sharers, each) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert threads_each(asked, sharers) == each


def test_a_failure_stops_nobody_and_is_told(script, job, tmp_path) -> None:
    some = [job("bad", "fail", 3), job("killed", "die"), job("good", "work", tmp_path / "times", 0)]
    write_text(some[0].log, "an attempt before\n")
    done: list[str] = []
    console = quiet()
    failures = carry_out(some, partial(run_here, at_once=1), console, lambda job: done.append(job.name))
    assert done == ["good"]
    assert [(one.job.name, one.exit_code) for one in failures] == [("bad", 3), ("killed", -signal.SIGKILL)]
    assert failures[0].last_lines == ("line 4", "line 5", "line 6", "line 7", "line 8")
    assert "line 0" not in told(console)
    assert "bad: failed with exit code 3" in told(console)
    assert "killed: failed with signal 9" in told(console)
    log = some[0].log.read_text()
    assert log.startswith("an attempt before\n$ OMP_NUM_THREADS=1 lcia fail 3\n")
    assert all(f"line {number}\n" in log for number in range(9))


def when_ready(log: Path, then: Callable[[], None]) -> threading.Thread:
    """Do `then` in another thread as soon as the process is at work."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (log.is_file() and "ready\n" in log.read_text()):
            time.sleep(0.01)
        then()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("what", ["wait", "stubborn"])
def test_an_interruption_ends_what_is_at_work_and_begins_nothing(monkeypatch, script, job, number, what) -> None:
    monkeypatch.setattr(jobs, "_GRACE_S", 60.0 if what == "wait" else 0.1)
    begun = []
    start = jobs._start
    monkeypatch.setattr(jobs, "_start", lambda *arguments: begun.append(start(*arguments)) or begun[-1])
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    some, console = [job("first", what), job("second", what)], quiet()
    thread = when_ready(some[0].log, lambda: os.kill(os.getpid(), number))
    try:
        with pytest.raises(KeyboardInterrupt):
            carry_out(some, partial(run_here, at_once=1), console)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        thread.join()
        for one, handler in before.items():
            signal.signal(one, handler)
    assert len(begun) == 1
    assert begun[0].poll() == (130 if what == "wait" else -signal.SIGKILL)
    assert ("interrupted" in some[0].log.read_text()) == (what == "wait")
    assert not some[1].log.exists()
    assert "the same command goes on" in told(console)


def test_an_error_of_ours_leaves_no_process_behind(monkeypatch, script, job, tmp_path) -> None:
    begun = []
    start = jobs._start
    monkeypatch.setattr(jobs, "_start", lambda *arguments: begun.append(start(*arguments)) or begun[-1])

    def full_disk(job: Job) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        carry_out(
            [job("a", "work", tmp_path / "times-a", 0), job("b", "wait")],
            partial(run_here, at_once=2),
            quiet(),
            full_disk,
        )
    assert len(begun) == 2
    assert all(process.poll() is not None for process in begun)


def test_the_board_shows_the_last_line_of_what_is_at_work(job) -> None:
    some = [job(name, "wait") for name in ("over", "working", "before")]
    write_text(some[2].log, "row 7 of an attempt before\n")
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    board = jobs._Board(some, console)
    write_text(some[0].log, "row 1\n")
    write_text(some[1].log, "row 1\n  row 2: colours 12.5\n\n")
    board.end(some[0])
    console.print(board)
    shown = told(console)
    assert "1/3" in shown
    assert "row 2: colours 12.5" in shown
    assert "over" not in shown
    assert "before" not in shown


def test_the_board_shows_how_far_a_run_is_and_its_last_line_between(job, monkeypatch) -> None:
    one = job("one", "wait")
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    board = jobs._Board([one], console)
    write_text(one.log, "  row 2: colours 12.5\n")
    monkeypatch.setenv("LCIA_PROGRESS_FILE", str(one.progress))
    with Reporter(Console(file=io.StringIO())) as reporter:
        reporter.start("learning colours", total=24)
        assert board._state(one) == "learning colours  0/24"
        monkeypatch.setattr(progress, "_REFRESH_S", 0)
        reporter.training_step({"step": 3, "total_steps": 24, "loss": 0.5, "examples_per_s": 9.0})
        assert board._state(one) == "learning colours  3/24  loss 0.500  9.0 examples/s"
        monkeypatch.setattr(progress, "_REFRESH_S", 3600)
        reporter.training_step({"step": 4, "total_steps": 24, "examples_per_s": 9.0})
        assert "3/24" in board._state(one)  # a file is not written for each of many short steps
    assert board._state(one) == "row 2: colours 12.5"
    write_text(one.progress, "learning colours  4/24")  # of a process that was killed
    assert RunFolder(one.log.parent).require_free()  # a run can begin beside it
    board.end(one)
    assert not one.progress.exists()
    write_text(one.progress, "learning colours  4/24")  # of a command that was killed
    assert jobs._Board([one], console)._state(one) != "learning colours  4/24"


def test_what_begins_is_told_at_once(job, monkeypatch) -> None:
    one = job("one", "wait")
    one.log.parent.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("LCIA_PROGRESS_FILE", str(one.progress))
    with Reporter(Console(file=io.StringIO())) as reporter:
        reporter.start("measuring row 1", total=1)
        reporter.advance()
        reporter.start("learning animals", total=None)  # its first step may take minutes
        assert one.progress.read_text() == "learning animals"


# --- Ray, by a stand-in


class RayError(Exception):
    pass


class StandIn(ModuleType):
    """Its functions that are used here, as Ray documents them; tasks are threads."""

    def __init__(self, resources: dict[str, float], lost: str = "") -> None:
        super().__init__("ray")
        self.exceptions = SimpleNamespace(RayError=RayError)
        self.resources, self.lost = resources, lost
        self.inits, self.options, self.cancelled = 0, [], []

    def init(self) -> None:
        assert not self.inits, "Calling ray.init() again after it has already been called."
        self.inits += 1

    def is_initialized(self) -> bool:
        return self.inits > 0

    def cluster_resources(self) -> dict[str, float]:
        assert self.inits
        return self.resources

    def remote(self, **options: Any) -> Callable[..., Any]:
        self.options.append(options)
        return lambda function: SimpleNamespace(remote=lambda *arguments: Reference(self, function, arguments))

    def wait(self, references: list[Reference], *, num_returns: int = 1, timeout: float | None = None) -> Any:
        assert isinstance(references, list)
        assert len(set(references)) == len(references) >= num_returns
        end = time.monotonic() + (timeout or 60)
        ready: list[Reference] = []
        while len(ready) < num_returns and time.monotonic() < end:
            ready = [one for one in references if not one.thread.is_alive()][:num_returns]
            time.sleep(0.01)
        return ready, [one for one in references if one not in ready]

    def get(self, reference: Reference) -> Any:
        if isinstance(reference.result, Exception):
            raise reference.result
        return reference.result

    def cancel(self, reference: Reference) -> None:
        self.cancelled.append(reference)


class Reference:
    def __init__(self, ray: StandIn, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        function, arguments = pickle.loads(pickle.dumps((function, arguments)))  # noqa: S301 - to another machine
        self.result: Any = None
        self.job = arguments[0]

        def work() -> None:
            self.result = RayError("the node died") if self.job.name == ray.lost else function(*arguments)

        self.thread = threading.Thread(target=work)
        self.thread.start()


@pytest.mark.parametrize(("resources", "gpus"), [({"CPU": 8.0}, 0), ({"CPU": 8.0, "GPU": 2.0}, 1)])
def test_ray_gets_each_job_with_its_needs(monkeypatch, script, job, tmp_path, resources, gpus) -> None:
    ray = StandIn(resources)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setenv("LCIA_DATA", "here")
    some = [job("a", "work", tmp_path / "times-a", 0, threads=3), job("b", "fail", 2)]
    failures = carry_out(some, run_on_ray, quiet())
    assert (tmp_path / "times-a").is_file()
    assert [(one.job, one.exit_code) for one in failures] == [(some[1], 2)]
    assert ray.options == [{"num_cpus": n, "num_gpus": gpus, "max_retries": 0} for n in (3, 1)]
    assert "OMP_NUM_THREADS=3" in some[0].log.read_text()
    assert "LCIA_DATA=here" in some[0].log.read_text()  # a worker has not the environment of this process
    assert carry_out(some[:1], run_on_ray, quiet()) == []
    assert ray.inits == 1


def test_a_lost_node_is_one_failure(monkeypatch, script, job, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "ray", StandIn({"CPU": 1.0}, lost="a"))
    some = [job("a", "work", tmp_path / "times-a", 0), job("b", "work", tmp_path / "times-b", 0)]
    (failure,) = carry_out(some, run_on_ray, quiet())
    assert failure.job == some[0]
    assert failure.last_lines == ("Ray: the node died",)
    assert (tmp_path / "times-b").is_file()


def test_tasks_at_work_are_cancelled_and_waited_for(monkeypatch, script, job, tmp_path) -> None:
    ray = StandIn({"CPU": 2.0})
    monkeypatch.setitem(sys.modules, "ray", ray)
    some = [job("a", "work", tmp_path / "times-a", 0), job("b", "work", tmp_path / "times-b", 0.5)]

    def interrupted(job: Job) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(some, run_on_ray, quiet(), interrupted)
    assert [one.job for one in ray.cancelled] == [some[1]]
    assert (tmp_path / "times-b").is_file()  # it was waited for: the driver's end would kill what a worker is ending


def test_on_a_real_cluster_of_this_machine(job) -> None:
    """Where the extra `ray` is installed: real commands in Ray's own workers."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        some = [job("right", "bench", "list", "--json"), job("wrong", "resume", "nowhere")]
        failures = carry_out(some, run_on_ray, quiet())
    finally:
        ray.shutdown()
    assert [(one.job.name, one.exit_code) for one in failures] == [("wrong", 2)]
    assert json.loads(some[0].log.read_text().split("\n", 1)[1])["coin"]["orders"] == ["origin", "reverse", "alphabet"]
    assert "not a run folder" in some[1].log.read_text()


def test_a_cancelled_task_ends_its_process(monkeypatch, script, job) -> None:
    """Ray raises KeyboardInterrupt in the worker."""
    begun = []
    start = jobs._start
    monkeypatch.setattr(jobs, "_start", lambda *arguments: begun.append(start(*arguments)) or begun[-1])
    one = job("a", "wait")
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = when_ready(one.log, lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        with pytest.raises(KeyboardInterrupt):
            jobs._run(one, {})
    finally:
        thread.join()
        signal.signal(signal.SIGINT, handler)
    assert begun[0].poll() == 130


# --- which runs, and what is left to do of them


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_all_combinations_seed_by_seed() -> None:
    runs = bench_runs("instrdialog", ["lora", "lcia"], ["1", "3"], [0, 7], "m", "d", ["max_steps=1"])
    assert [run.name for run in runs] == [
        f"{method}-order{order}-seed{seed}" for seed in (0, 7) for order in (1, 3) for method in ("lora", "lcia")
    ]
    last = "bench run instrdialog --method lcia --order 3 --seed 7 --model m --data d max_steps=1"
    assert runs[-1].arguments == tuple(shlex.split(last))
    method, options = "{name: lcia, threshold: 0.3}", {"instructions": "diverse"}
    (run,) = bench_runs("coin", [method], [None], [1], options=options)
    assert run.arguments == tuple(
        shlex.split(f"bench run coin --method '{method}' --seed 1 --option instructions=diverse")
    )
    assert run.config == bench_config("coin", method, None, 1, options=options)


def test_lists_are_repeated_or_have_commas() -> None:
    assert parse_list(["1,3", "2"]) == ["1", "3", "2"]
    assert parse_seeds(["0, 1", "5"]) == [0, 1, 5]
    for wrong in ("a", "1.5", "0,"):
        with pytest.raises(UserError, match="--seed takes whole numbers"):
            parse_seeds([wrong])


@pytest.mark.parametrize(
    "arguments",
    [
        {"methods": ["{name: lcia, threshold: 0.3}", "lcia"]},
        {"methods": ["lora"], "seeds": [0, 0]},
        {"methods": ["lora"], "seeds": [0, 1], "overrides": ["seed=5"]},
        {"methods": ["lora", "ewc"], "overrides": ["output_dir=one"]},
    ],
)
def test_no_two_runs_go_to_one_folder(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="two of these runs would go to"):
        bench_runs("instrdialog", orders=[None], **{"seeds": [0], **arguments})


def runs_of(*methods: str, **changes: Any) -> list[bench_list.BenchRun]:
    return bench_runs(
        "instrdialog", methods, [None], [0], overrides=[f"{key}={value}" for key, value in changes.items()]
    )


def begin(run: bench_list.BenchRun, threads: int = 3) -> RunFolder:
    """A run as it is after its first line."""
    folder = RunFolder(run.folder)
    write_text(folder.config, run.config.as_yaml())
    folder.confirm("run_began", config=run.config.model_dump(), machine={"device": "cpu", "threads": threads})
    return folder


def test_what_is_left_to_do(here: Path) -> None:
    fresh, bare, begun, failed, done = runs = runs_of("lora", "lcia", "ewc", "l2", "lwf")
    write_text(RunFolder(bare.folder).config, bare.config.as_yaml())
    begin(begun)
    write_text(RunFolder(failed.folder).log, "lcia: no such model\n")  # before it began
    write_text(begin(done).path / "results.json", "{}")
    left = outstanding(runs, threads=2)
    assert [(one.name, one.arguments, one.threads) for one in left] == [
        (fresh.name, fresh.arguments, 2),
        (bare.name, ("resume", str(bare.folder)), 2),
        (begun.name, ("resume", str(begun.folder)), 3),  # as it began: in bfloat16 it would end differently
        (failed.name, failed.arguments, 2),
    ]
    assert [one.log for one in left] == [here / run.folder / "log.txt" for run in (fresh, bare, begun, failed)]


@pytest.mark.parametrize("event", ["extended", "rolled_back", "groups_changed"])
def test_a_folder_with_another_run_is_refused(here: Path, event: str) -> None:
    (run,) = runs_of("lora")
    folder = begin(run)
    (other,) = runs_of("lora", max_steps=5)
    with pytest.raises(UserError, match=r"max_steps \(began with -1, now 5\)"):
        outstanding([other], threads=1)
    folder.confirm("stage_learned", stage="a", placements={"a": {}})
    folder.confirm("row_measured", row=1, scores={}, routing={}, oracle={}, too_long={})
    facts = {"to": "a"} if event == "rolled_back" else {}
    folder.confirm(event, **facts)
    write_text(folder.path / "results.json", "{}")
    with pytest.raises(UserError, match=r"lora-order1-seed0: this run was changed afterwards"):
        outstanding([run], threads=1)


def test_a_folder_of_something_else_is_refused(here: Path) -> None:
    (run,) = runs_of("lora")
    write_text(run.folder / "notes.txt", "")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        outstanding([run], threads=1)


# --- the command


# Stands for lcia: ewc fails, the others' runs are there at once.
MADE = """
import shutil, sys
method, seed = (sys.argv[sys.argv.index(word) + 1] for word in ("--method", "--seed"))
if method == "ewc":
    sys.exit("lcia: ewc cannot do this")
name = f"{method}-order1-seed{seed}"
shutil.copytree(f"made/{name}", f"runs/bench/instrdialog/{name}", dirs_exist_ok=True)
"""


@pytest.fixture
def made(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for method in ("lora", "lcia"):
        for seed in (0, 1):
            (run,) = bench_runs("instrdialog", [method], [None], [seed])
            config = run.config.model_dump()
            machine = {"device": "cpu", "threads": 2 if (method, seed) == ("lcia", 1) else 1}
            make_run(here / "made" / run.name, method, ("a", "b", "c"), seed, config=config, machine=machine)
            write_text(here / "made" / run.name / "config.yaml", run.config.as_yaml())
    monkeypatch.setattr(jobs, "_COMMAND", (sys.executable, "-I", "-S", "-c", MADE))
    return here


def test_a_list_with_a_failure_keeps_the_rest_and_ends_with_1(lcia: Run, made: Path) -> None:
    command = [
        "bench",
        "run",
        "instrdialog",
        "--method",
        "lora",
        "--method",
        "ewc",
        "--method",
        "lcia",
        "--seed",
        "0,1",
    ]
    code, out, err = lcia(*command, "--jobs", 2, "--json")
    assert code == 1
    assert err.startswith("6 runs, 0 finished before\n")
    assert "ewc-order1-seed0: failed with exit code 1" in err
    assert "    lcia: ewc cannot do this" in err
    assert err.endswith("lcia: 2 of 6 runs failed; the same command goes on\n")
    document = json.loads(out)
    assert [(run["run"].rpartition("/")[2], run["state"]) for run in document["runs"]] == [
        (f"{method}-order1-seed{seed}", "failed" if method == "ewc" else "finished")
        for seed in (0, 1)
        for method in ("lora", "ewc", "lcia")
    ]
    for run in document["runs"]:
        folder = made / run["run"]
        log = (folder / "log.txt").read_text()
        if run["state"] == "failed":
            assert run["results"] is None
            assert run["error"].endswith("lcia: ewc cannot do this")
            assert log.endswith("lcia: ewc cannot do this\n")
        else:
            assert run["results"] == json.loads((folder / "results.json").read_text())
    series = document["comparison"]["comparisons"][0]["series"]
    assert [(one["label"], one["seeds"]) for one in series] == [("lora", [0, 1]), ("lcia", [0, 1])]

    code, out, err = lcia(*command, "--jobs", 2)
    assert code == 1
    assert err.startswith("6 runs, 4 finished before\n")
    assert "Avg.ACC" in out
    assert "cpu, threads: 2: lcia-order1-seed1" in " ".join(out.split())  # not computed like the others


def test_a_list_that_is_finished_begins_nothing(lcia: Run, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["bench", "run", "instrdialog", "--method", "lora", "--seed", "0", "--seed", "1"]
    code, out, _ = lcia(*command)
    assert (code, out.count("Avg.ACC")) == (0, 1)
    assert "computed alike" not in out
    monkeypatch.setattr(jobs, "_start", lambda *_: pytest.fail("a process was begun"))
    code, out, err = lcia(*command, "--json")
    assert (code, err) == (0, "2 runs, 2 finished before\n")
    assert {run["state"] for run in json.loads(out)["runs"]} == {"finished before"}


def test_nothing_but_failures(lcia: Run, made: Path) -> None:
    code, out, _ = lcia("bench", "run", "instrdialog", "--method", "ewc", "--seed", "0,1", "--json")
    assert code == 1
    assert json.loads(out)["comparison"] is None


def test_on_ray(lcia: Run, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single run goes there too."""
    ray = StandIn({"CPU": 4.0})
    monkeypatch.setitem(sys.modules, "ray", ray)
    code, out, _ = lcia("bench", "run", "instrdialog", "--method", "lora", "--ray", "--json")
    assert code == 0
    assert [run["state"] for run in json.loads(out)["runs"]] == ["finished"]
    assert ray.options == [{"num_cpus": 1, "num_gpus": 0, "max_retries": 0}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "0,x"], "--seed takes whole numbers"),
        (["--order", "1,9"], "orders 1, 2, 3, not 9"),
        (["--method", "lora", "--method", "lcai"], "unknown method 'lcai'"),
        (["--method", "lora", "--method", "lora"], "two of these runs would go to"),
        (["--seed", "0,1", "--ray"], "Ray is not installed"),
        (["--seed", "0,1", "--ray", "--jobs", "2"], "leave out --jobs, or --ray"),
        (["--seed", "0,1", "--jobs", "0"], "--jobs"),
    ],
)
def test_mistakes_end_with_2_before_anything_begins(lcia: Run, here: Path, monkeypatch, arguments, message) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # importing it is an ImportError
    monkeypatch.setattr(jobs, "_start", lambda *_: pytest.fail("a process was begun"))
    code, out, err = lcia("bench", "run", "instrdialog", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert not (here / "runs").exists()


def test_processes_of_a_launcher_begin_no_lists(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_list.processes, "count", lambda: 2)
    with pytest.raises(UserError, match="torchrun"):
        bench_list.run_all("instrdialog", runs_of("lora", "ewc"), 1, run_here, quiet())


def test_one_run_takes_its_threads(lcia: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setenv("LCIA_DATA", str(here / "nothing"))
    for arguments in (["--threads", 3], ["--jobs", 4], []):  # of which --jobs changes nothing
        assert lcia("bench", "run", "instrdialog", *arguments)[0] == 2  # there are no data
    assert asked == [3]


# --- the whole of it, with runs that learn


@pytest.fixture
def task_files(tmp_path: Path) -> Path:
    """Super-NI files of InstrDialog's tasks: the answer to the first is always a, to the others b."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for position, name in enumerate(TASKS):
        content = {
            "Definition": [f"Do {name}"],
            "Positive Examples": [{"input": "a", "output": "b"}] * 2,
            "Instances": [{"id": f"i-{n}", "input": f"s{n}", "output": ["b" if position else "a"]} for n in range(110)],
        }
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Of this process, in which tests have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_number_of_processes_changes_no_result(
    lcia: Run, task_files, tiny_model, tmp_path, monkeypatch, two_threads, dtype: str
) -> None:
    """Two runs one after the other, and the same two at a time, of which one was interrupted before."""
    small = ["max_steps=10", "learning_rate=1e-2", "lora_r=2", f"dtype={dtype}", f"tasks=[{', '.join(TASKS[:2])}]"]
    small += ["max_length=400", "max_eval_examples=4", "max_new_tokens=2", "early_stopping_patience=null"]
    command = ["bench", "run", "instrdialog", "--method", "lora", "--method", "lcia", "--data", task_files]
    command += ["--model", tiny_model, "--json", *small]
    found = {}
    for at_once in (1, 2):
        (tmp_path / str(at_once)).mkdir()
        monkeypatch.chdir(tmp_path / str(at_once))
        monkeypatch.setenv("LCIA_CACHE", str(tmp_path / f"cache{at_once}"))  # no answer is taken from the other
        if at_once == 2:
            interrupt(
                monkeypatch, bench_config("instrdialog", "lora", None, 0, str(tiny_model), str(task_files), small)
            )
        code, out, err = lcia(*command, "--jobs", at_once)
        assert code == 0, err
        found[at_once] = json.loads(out)["runs"]
    for one, two in zip(found[1], found[2], strict=True):
        assert one["state"] == two["state"] == "finished"
        assert one["results"]["machine"] == two["results"]["machine"]
        assert one["results"]["machine"]["threads"] == 2
        assert one["results"]["matrix"][1][0] > one["results"]["matrix"][0][0]  # it learned something
        assert without_cost(one["results"]) == without_cost(two["results"])
        folders = [tmp_path / str(at_once) / one["run"] for at_once in (1, 2)]
        assert hashes(folders[0]) == hashes(folders[1])
        assert all("row 2: " in (folder / "log.txt").read_text() for folder in folders)
    resumed = tmp_path / "2/runs/bench/instrdialog/lora-order1-seed0"
    assert "lcia resume runs/bench/instrdialog/lora-order1-seed0" in (resumed / "log.txt").read_text()
    assert len(RunFolder(resumed).records("run_began")) == 1


def interrupt(monkeypatch: pytest.MonkeyPatch, config: Any) -> None:
    """Begin a run in this process, and die in its second task."""
    learn_task, calls = learning.learn_task, []

    def dying(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise Killed
        return learn_task(*arguments, **options)

    with monkeypatch.context() as patch, Reporter() as reporter:
        patch.setattr(learning, "learn_task", dying)
        with pytest.raises(Killed):
            train(config, reporter)
