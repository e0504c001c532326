"""The command: verbs parse, call and print; what they do lives elsewhere."""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.protocol import rich_cast
from rich.text import Text

from lcia import processes
from lcia.errors import GateError, RunsFailed, UserError

if TYPE_CHECKING:
    from lcia.config import RunConfig

_RESUMED = {"train", "resume", "extend", "rollback", "groups"}  # verbs whose work `lcia resume` takes up again
app = typer.Typer(
    help="Continual instruction tuning: learn instruction data sets one after another, forget little.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
bench_app = typer.Typer(help="Published protocols: which there are, and runs under them.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
backbone_app = typer.Typer(help="Models that are built here.", no_args_is_help=True)
app.add_typer(backbone_app, name="backbone")
Against = Annotated[
    str | None, typer.Option(help="The method that every other is tested against; the first one if not given.")
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else there.")]
MaxForgetting = Annotated[
    float | None,
    typer.Option(help="Points of forgetting that are accepted; over them the command ends with exit code 3."),
]
PerTask = Annotated[bool, typer.Option("--per-task", help="--max-forgetting holds for every task, not for the mean.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, over the configuration file")]
StreamOptions = Annotated[
    list[str] | None,
    typer.Option(help="key=value for the benchmark's stream, such as instructions=diverse; can be given again."),
]


def main() -> None:
    """Entry point: errors of the user's input end with one message and exit code 2, a gate with 3."""
    from lcia.machine import limit_kept_kernels

    limit_kept_kernels()
    processes.is_main()  # joins the others, where a launcher has started several
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # redrawn bars of the libraries would fill a log with fragments
    processes.leave(_exit_code())


def _exit_code() -> int:
    """Run the command; what went wrong is told on stderr."""
    try:
        app()
    except (UserError, GateError, RunsFailed) as error:
        if processes.is_main():
            print(f"lcia: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as stop:
        if stop.code == 130:  # what typer makes of Ctrl-C
            print(f"lcia: interrupted{_what_is_kept()}", file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except OSError as error:  # a full disk, a folder that is gone
        print(f"lcia: {error}{_what_is_kept()}", file=sys.stderr)
        return 1
    except Exception as error:  # noqa: BLE001 - the last resort: a message instead of a page of frames
        if os.environ.get("LCIA_DEBUG"):
            traceback.print_exc()
        hint = "" if os.environ.get("LCIA_DEBUG") else " (LCIA_DEBUG=1 shows where)"
        print(f"lcia: {type(error).__name__}: {error}{hint}", file=sys.stderr)
        return 1
    return 0


def _what_is_kept() -> str:
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    return "; what was finished is kept (`lcia resume RUN` goes on)" if verb in _RESUMED else ""


def _emit(as_json: bool, document: Any, *readable: Any) -> None:
    """A result on stdout: for machines, or for people. Of several processes the main one tells it."""
    if not processes.is_main():
        return
    if as_json:
        print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))
        return
    console = Console()
    for part in readable:
        shown = Text(part) if isinstance(part, str) else rich_cast(part)
        # Text as it is: folding is for whoever shows it, and what reads a pipe wants none.
        console.print(shown, soft_wrap=isinstance(shown, Text))


@app.command()
def demo(
    output_dir: Annotated[str, typer.Option(help="Where the two runs and the report go.")] = "runs/demo",
    as_json: Json = False,
) -> None:
    """Learn six real tasks with plain LoRA and with lcia on this machine, and compare what is left."""
    from lcia.demo import run_demo

    result = run_demo(Path(output_dir), Console(stderr=True))
    _emit(as_json, result.as_dict(), *result.readable())


@app.command()
def validate(
    source: Annotated[str, typer.Argument(help="CONFIG.yaml or a folder of data")],
    overrides: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(help="Count tokens as this model does (a folder's rows are counted in words)."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a configuration or a folder of data and print what it holds."""
    from lcia.progress import Reporter
    from lcia.validate import validate_config, validate_folder

    if Path(source).is_dir():
        if overrides:
            raise UserError(f"validate: {overrides[0]!r} belongs to a configuration, and {source} is a folder of data")
        summary = validate_folder(Path(source), model)
    else:
        if model is not None:
            raise UserError(
                f"validate: --model is for a folder of data; {source} names its own (model={model} changes it)"
            )
        with Reporter() as reporter:
            summary = validate_config(_config(source, overrides), reporter)
    _emit(as_json, summary.as_dict(), summary)


@app.command()
def plan(
    config: Annotated[str, typer.Argument(help="CONFIG.yaml")],
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Plan for so many GPUs instead of this machine.")] = None,
    memory: Annotated[float | None, typer.Option(min=0, help="GiB of one device: does it fit?")] = None,
    measure: Annotated[int, typer.Option(min=0, help="Make so many real steps here, and give a time.")] = 0,
    tflops: Annotated[
        float | None, typer.Option(min=0.001, help="10^12 operations a second of a device: compute a time.")
    ] = None,
    as_json: Json = False,
) -> None:
    """What a run will need: memory part by part, disk, steps. No weights are read and nothing is trained."""
    from lcia.planning import plan_run
    from lcia.progress import Reporter

    checked = _config(config, overrides)
    with Reporter() as reporter:
        planned = plan_run(checked, reporter, gpus, memory, measure, tflops)
    _emit(as_json, planned.as_dict(), planned)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="CONFIG.yaml")],
    overrides: Overrides = None,
    max_forgetting: MaxForgetting = None,
    per_task: PerTask = False,
    as_json: Json = False,
) -> None:
    """Learn a stream from its first task to its last, measuring after each."""
    from lcia.progress import Reporter
    from lcia.run import train as run_train

    _check_gate(max_forgetting, per_task)
    checked = _config(config, overrides)
    with Reporter() as reporter:
        results = run_train(checked, reporter)
    _show_results(Path(checked.output_dir), results, as_json, max_forgetting, per_task)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    max_forgetting: MaxForgetting = None,
    per_task: PerTask = False,
    as_json: Json = False,
) -> None:
    """Go on with an interrupted run, where it stopped."""
    from lcia.progress import Reporter
    from lcia.run import resume as run_resume

    _check_gate(max_forgetting, per_task)
    with Reporter() as reporter:
        results = run_resume(run, reporter)
    _show_results(run, results, as_json, max_forgetting, per_task)


@app.command()
def extend(
    run: Annotated[Path, typer.Argument(help="a finished run folder")],
    data: Annotated[str, typer.Argument(help="a data file, a folder, or a built-in stream")],
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of DATA to take, with commas between; all if not given.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="CONFIG.yaml that must be the run's own, but for stream and output_dir.")
    ] = None,
    max_forgetting: MaxForgetting = None,
    per_task: PerTask = False,
    as_json: Json = False,
) -> None:
    """Learn new tasks behind those of a finished run; only what is missing of the matrix is measured."""
    from lcia.progress import Reporter
    from lcia.run import extend as run_extend

    _check_gate(max_forgetting, per_task)
    with Reporter() as reporter:
        results = run_extend(run, data, tasks.split(",") if tasks else None, reporter, config)
    _show_results(run, results, as_json, max_forgetting, per_task)


@app.command()
def rollback(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    to: Annotated[str, typer.Option(help="The task after which the run shall stand again.")],
    as_json: Json = False,
) -> None:
    """Back to the state after a task; what was learned behind it leaves the run (the ledger remembers)."""
    from lcia.progress import Reporter
    from lcia.run import rollback as run_rollback

    with Reporter() as reporter:
        results = run_rollback(run, to, reporter)
    _show_results(run, results, as_json)


@app.command()
def groups(
    run: Annotated[Path, typer.Argument(help="a finished run folder")],
    action: Annotated[str, typer.Argument(help="rename | merge | split")],
    group: Annotated[str, typer.Argument(help="the group to change")],
    other: Annotated[str, typer.Argument(help="its new name | the group to merge it into | the new group")],
    reason: Annotated[str, typer.Option(help="Why; it goes into the ledger.")],
    tasks: Annotated[str | None, typer.Option(help="split: the tasks that leave, with commas between.")] = None,
    as_json: Json = False,
) -> None:
    """Rename, merge or split groups by hand; the last row of the matrix is measured again."""
    from lcia.progress import Reporter
    from lcia.regrouping import regroup

    with Reporter() as reporter:
        results = regroup(run, action, group, other, reason, reporter, tasks.split(",") if tasks else ())
    _show_results(run, results, as_json)


@app.command(name="eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="a finished run folder")],
    split: Annotated[str, typer.Option(help="test | dev")] = "test",
    data: Annotated[str | None, typer.Option(help="Other data: a file, a folder, a built-in stream.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Only these tasks, with commas between.")] = None,
    all_rows: Annotated[bool, typer.Option("--all-rows", help="Every row, with the weights the run had then.")] = False,
    recompute: Annotated[bool, typer.Option("--recompute", help="Answer every cell anew; reuse nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Measure a finished run again, or on other data; the run itself is not changed."""
    from lcia.progress import Reporter
    from lcia.run import measure_again

    if split not in ("test", "dev"):
        raise UserError(f"eval: unknown split {split!r}; test or dev")
    with Reporter() as reporter:
        found = measure_again(run, reporter, split, data, tasks.split(",") if tasks else None, all_rows, recompute)
    scores = found["rows"][-1]["scores"]
    lines = [f"{score:6.1f}  {task}" for task, score in scores.items()]
    _emit(as_json, found, "\n".join([f"{split} rows, after the last task:", *lines]), _metrics_line(found["metrics"]))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders; what holds no finished run is left out and named")],
    out: Annotated[Path | None, typer.Option(help="The HTML file; the first run's report.html if not given.")] = None,
    against: Against = None,
    as_json: Json = False,
) -> None:
    """Write one HTML file (and PNG figures beside it) about one run or several."""
    from lcia.report import load_runs, write_report

    loaded, left_out = load_runs(runs)
    target = out or loaded[0].path / "report.html"
    try:
        written = write_report(loaded, target, against, left_out)
    except OSError as error:
        raise UserError(f"{target}: the report cannot be written here ({error.strerror}); give --out") from error
    document = {"report": str(written), "runs_left_out": [{"path": str(one.path), "why": one.why} for one in left_out]}
    _emit(as_json, document, *(f"left out: {one}" for one in left_out), f"report: {written}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="run folders; what holds no finished run is left out and named")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The HTML file; if not given, comparison.html beside the runs, or here where they lie in several "
            "folders or theirs cannot be written."
        ),
    ] = None,
    against: Against = None,
    as_json: Json = False,
) -> None:
    """Compare methods over seeds and orders: one table and one HTML file, intervals, tests against a reference."""
    from lcia.report import (
        comparison_json,
        comparison_page,
        comparison_tables,
        load_runs,
        without_page,
        write_report,
    )

    loaded, left_out = load_runs(runs)
    page = out or comparison_page(loaded)
    left_out = without_page(left_out, page)
    if as_json:
        document = comparison_json(loaded, against, left_out)
        _emit(as_json, {**document, "report": str(write_report(loaded, page, against, left_out))})
        return
    _emit(as_json, None, *comparison_tables(loaded, against, left_out))
    _emit(as_json, None, f"report: {write_report(loaded, page, against, left_out)}")


@app.command()
def route(
    source: Annotated[Path, typer.Argument(help="a run folder or CONFIG.yaml")],
    request: Annotated[str | None, typer.Argument(help="one request; its last line is the instruction")] = None,
    task: Annotated[Path | None, typer.Option(help="A data file: which group would learn it, and why?")] = None,
    as_json: Json = False,
) -> None:
    """Which group answers a request, or would learn a new task, and why."""
    from lcia.answering import explain_request, explain_task

    if (request is None) == (task is None):
        raise UserError("route: give either a request or --task FILE")
    found = explain_task(source, task) if task is not None else explain_request(source, str(request))
    _emit(as_json, found.as_dict(), found)


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    request: Annotated[str, typer.Argument(help="the request; `-` reads standard input")],
    instruction: Annotated[
        str | None, typer.Option(help="What to do with the request; without it, the request's last line.")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Show this image before the request; several: repeat it.")
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="The system message, as in chat rows; without --instruction it is routed by.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="At most so many tokens.", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Answer one request with the group its instruction belongs to."""
    from lcia.answering import answer_requests

    text = sys.stdin.read().strip() if request == "-" else request
    answer = answer_requests(run, [(text, instruction)], max_new_tokens, image or (), system)[0]
    _emit(as_json, answer.as_dict(), answer)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    out: Annotated[Path, typer.Argument(help="a new folder")],
    group: Annotated[str | None, typer.Option(help="Only this group.")] = None,
    layout: Annotated[str, typer.Option("--as", help="peft | merged | vllm")] = "peft",
    dtype: Annotated[str | None, typer.Option(help="merged: float32 | bfloat16; the run's if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Take the adapters elsewhere: PEFT folders, one merged model, or a folder that vLLM serves."""
    from lcia.export import export_run

    exported = export_run(run, out, layout, group, dtype)
    _emit(as_json, exported.as_dict(), exported)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine has, and which numerics will be used."""
    from lcia.doctor import examine

    findings = examine()
    _emit(as_json, findings.as_dict(), findings)


@bench_app.command(name="list")
def bench_list(as_json: Json = False) -> None:
    """The benchmarks, and the settings of each."""
    from lcia.bench import BENCHMARKS

    lines: list[str | Text] = []
    for name, benchmark in BENCHMARKS.items():
        settings = ", ".join(f"{key} {value}" for key, value in benchmark.settings.items())
        choices = {"order": benchmark.orders, **benchmark.options}
        chosen = "; ".join(f"{key}: {' | '.join(map(str, values))}" for key, values in choices.items() if values)
        title = Text.assemble((name, "bold"), f": {benchmark.title} ({benchmark.source})")
        lines += [title, *([f"  {chosen}"] if chosen else [])]
        lines.append(f"  {settings}")
        lines += [f"  instructions {kind}: groups from {value} on" for kind, value in benchmark.thresholds.items()]
    _emit(as_json, {name: asdict(benchmark) for name, benchmark in BENCHMARKS.items()}, *lines)


@bench_app.command(name="prepare")
def bench_prepare(
    name: Annotated[str, typer.Argument(help="a benchmark; `lcia bench list` shows them")],
    data: Annotated[Path | None, typer.Option(help="The folder with its data; else $LCIA_DATA/NAME.")] = None,
    option: StreamOptions = None,
    as_json: Json = False,
) -> None:
    """Check a download, file by file: what is there, what is missing, and which tasks can run without the rest."""
    from lcia.bench import parse_options, prepare
    from lcia.progress import Reporter

    with Reporter() as reporter:
        inventory = prepare(name, None if data is None else str(data), parse_options(option or []), reporter)
    _emit(as_json, inventory.as_dict(), inventory)
    if not inventory.can_run:
        raise UserError(f"bench prepare: no task of {name} can run on what is there")


@bench_app.command(name="run")
def bench_run(
    name: Annotated[str, typer.Argument(help="a benchmark; `lcia bench list` shows them")],
    overrides: Overrides = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="A method, or {name: METHOD, option: value, ...}; lcia if not given; several: repeat it."),
    ] = None,
    order: Annotated[
        list[str] | None,
        typer.Option(
            help="One of the benchmark's orders of its tasks; its first if not given; several: 1,2 or repeat it."
        ),
    ] = None,
    option: StreamOptions = None,
    seed: Annotated[
        list[str] | None, typer.Option(help="The run's seed; 0 if not given; several: 0,1,2 or repeat it.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A model instead of the protocol's.")] = None,
    data: Annotated[Path | None, typer.Option(help="The folder with its data; else $LCIA_DATA/NAME.")] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Runs at a time; 1 if not given. With GPUs one per visible device if not given: CUDA_VISIBLE_DEVICES "
            "is dealt out to them round robin.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="CPU threads of each run; all if not given, whatever --jobs is, and with GPUs a share for each of "
            "them. In bfloat16 another number gives other last digits.",
        ),
    ] = None,
    ray: Annotated[
        bool,
        typer.Option(
            "--ray", help="On a Ray cluster whose nodes share the files; --threads CPUs each, 1 if not given."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Learn a benchmark's stream under its protocol, into runs/bench/NAME/METHOD-ORDER-OPTIONS-seedS.

    Several methods, orders or seeds: all combinations, each in a process of its own, then their comparison. What is
    finished is not run again, what was interrupted goes on.
    """
    from lcia.bench import BENCHMARKS, parse_options
    from lcia.bench_list import bench_runs, parse_list, parse_seeds, run_all
    from lcia.jobs import run_here, run_on_ray, threads_each, visible_devices
    from lcia.progress import Reporter
    from lcia.run import train as run_train

    if ray and jobs:
        raise UserError("bench run: Ray decides how many runs work at a time; leave out --jobs, or --ray")
    place = None if data is None else str(data)
    orders = parse_list(order) if order else [None]
    seeds, options = parse_seeds(seed or ["0"]), parse_options(option or [])
    runs = bench_runs(name, method or ["lcia"], orders, seeds, model, place, overrides or [], options)
    if len(runs) > 1 or ray:
        devices = [] if ray else visible_devices()
        at_once = jobs or len(devices) or 1
        share = (threads or 1) if ray else threads_each(threads, len(devices) or 1)
        runner = run_on_ray if ray else partial(run_here, at_once=at_once, devices=devices)
        found = run_all(name, runs, share, runner, Console(stderr=True))
        _emit(as_json, found.as_dict(), *found.readable())
        if found.failures:
            raise RunsFailed(f"{len(found.failures)} of {len(runs)} runs failed; the same command goes on")
        return
    if threads:
        import torch

        torch.set_num_threads(threads)
    config = runs[0].config
    with Reporter() as reporter:
        results = run_train(config, reporter)
    _show_results(Path(config.output_dir), results, as_json)
    if not as_json:
        values = {label: results["metrics"][key] for label, key in BENCHMARKS[name].reported.items()}
        print("   ".join(f"{label} {'-' if value is None else f'{value:.1f}'}" for label, value in values.items()))


@backbone_app.command(name="build")
def backbone_build(
    name: Annotated[str, typer.Argument(help="lite-llava")],
    data: Annotated[
        str | None,
        typer.Option(help="A folder of rows with images to align it on; $LCIA_DATA's stream `vision` if not given."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="A new folder; the cache, where `model: lite-llava` finds it, if not given.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of the alignment.")] = 240,
    captions_only: Annotated[
        bool, typer.Option("--captions-only", help="Captions made of labels, without the tasks' questions and answers.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Build the small vision-language model: put its parts together, align its projector once."""
    from lcia.backbone import find_model, lite_llava
    from lcia.progress import Reporter

    if name != lite_llava.NAME:
        raise UserError(f"backbone build: unknown model {name!r}. Valid: {lite_llava.NAME}.")
    settings = lite_llava.Settings(steps=steps, captions_only=captions_only)
    with Reporter() as reporter:
        built = lite_llava.build_model(find_model(lite_llava.LANGUAGE_MODEL), data, output, settings, reporter)
    _emit(as_json, built.as_dict(), str(built))


def _config(path: str, overrides: list[str] | None) -> RunConfig:
    from lcia.config import load_config

    return load_config(path, overrides)


def _check_gate(max_forgetting: float | None, per_task: bool) -> None:
    if per_task and max_forgetting is None:
        raise UserError("--per-task says how --max-forgetting is meant: give that too")


def _show_results(
    folder: Path,
    results: dict[str, Any],
    as_json: bool,
    max_forgetting: float | None = None,
    per_task: bool = False,
) -> None:
    from lcia.report import load_run, matrix_table, write_report
    from lcia.run import require_little_forgetting

    run = load_run(folder)
    written = processes.on_main(write_report)([run], folder / "report.html")
    _emit(as_json, results, matrix_table(run), _metrics_line(results["metrics"]), f"report: {written}")
    if max_forgetting is not None:
        require_little_forgetting(results, max_forgetting, per_task)


def _metrics_line(metrics: dict[str, float | None]) -> str:
    labels = {"avg_acc": "Avg.ACC", "forgetting": "Forgetting", "new_acc": "New.ACC"}
    return "   ".join(f"{label} {metrics[key]:.1f}" for key, label in labels.items() if metrics.get(key) is not None)


if __name__ == "__main__":
    main()
