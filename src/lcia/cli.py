"""The command: verbs parse, call and print; what they do lives elsewhere."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lcia.errors import GateError, UserError

if TYPE_CHECKING:
    from lcia.config import RunConfig

app = typer.Typer(
    help="Continual instruction tuning: learn instruction data sets one after another, forget little.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, nothing else there.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, over the configuration file")]


def main() -> None:
    """Entry point: errors of the user's input end with one message and exit code 2, a gate with 3."""
    from lcia.machine import keep_freed_memory

    keep_freed_memory()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # redrawn bars of the libraries would fill a log with fragments
    try:
        app()
    except (UserError, GateError) as error:
        print(f"lcia: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as stop:
        if stop.code == 130:  # what typer makes of Ctrl-C
            print("lcia: interrupted; what was finished is kept (`lcia resume RUN` goes on)", file=sys.stderr)
        raise
    except Exception as error:  # noqa: BLE001 - the last resort: a message instead of a page of frames
        if os.environ.get("LCIA_DEBUG"):
            traceback.print_exc()
        hint = "" if os.environ.get("LCIA_DEBUG") else " (LCIA_DEBUG=1 shows where)"
        print(f"lcia: {type(error).__name__}: {error}{hint}", file=sys.stderr)
        sys.exit(1)


def _emit(as_json: bool, document: Any, *readable: Any) -> None:
    """A result on stdout: for machines, or for people."""
    if as_json:
        print(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))
        return
    console = Console()
    for part in readable:
        console.print(part)


@app.command()
def demo(
    output_dir: Annotated[str, typer.Option(help="Where the two runs and the report go.")] = "runs/demo",
    as_json: Json = False,
) -> None:
    """Learn six real tasks with plain LoRA and with lcia on this machine, and compare what is left."""
    from lcia.demo import run_demo

    result = run_demo(Path(output_dir))
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
    from lcia.validate import validate_config, validate_folder

    is_folder = Path(source).is_dir()
    summary = validate_folder(Path(source), model) if is_folder else validate_config(_config(source, overrides))
    _emit(as_json, summary.as_dict(), summary)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="CONFIG.yaml")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Learn a stream from its first task to its last, measuring after each."""
    from lcia.progress import Reporter
    from lcia.run import train as run_train

    checked = _config(config, overrides)
    with Reporter() as reporter:
        results = run_train(checked, reporter)
    _show_results(Path(checked.output_dir), results, as_json)


@app.command()
def resume(run: Annotated[Path, typer.Argument(help="a run folder")], as_json: Json = False) -> None:
    """Go on with an interrupted run, from the last thing that was finished."""
    from lcia.progress import Reporter
    from lcia.run import resume as run_resume

    with Reporter() as reporter:
        results = run_resume(run, reporter)
    _show_results(run, results, as_json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders")],
    out: Annotated[Path | None, typer.Option(help="The HTML file; the first run's report.html if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Write one HTML file (and PNG figures beside it) about one run or several."""
    from lcia.report import load_run, write_report

    loaded = [load_run(run) for run in runs]
    written = write_report(loaded, out or runs[0] / "report.html")
    _emit(as_json, {"report": str(written)}, f"report: {written}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="run folders")],
    out: Annotated[Path | None, typer.Option(help="Write an HTML report as well.")] = None,
    as_json: Json = False,
) -> None:
    """One table over several runs; runs that differ only in their seed are averaged."""
    from lcia.report import comparison_json, comparison_table, load_run, write_report

    loaded = [load_run(run) for run in runs]
    if out is not None:
        write_report(loaded, out)
    _emit(as_json, comparison_json(loaded), comparison_table(loaded))


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
    max_new_tokens: Annotated[int | None, typer.Option(help="At most so many tokens.")] = None,
    as_json: Json = False,
) -> None:
    """Answer one request with the group its instruction belongs to."""
    from lcia.answering import answer_requests

    text = sys.stdin.read().strip() if request == "-" else request
    answer = answer_requests(run, [(text, instruction)], max_new_tokens)[0]
    _emit(as_json, answer.as_dict(), answer)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine has, and which numerics will be used."""
    from lcia.doctor import examine

    findings = examine()
    _emit(as_json, findings.as_dict(), findings)


def _config(path: str, overrides: list[str] | None) -> RunConfig:
    from lcia.config import load_config

    return load_config(path, overrides)


def _show_results(folder: Path, results: dict[str, Any], as_json: bool) -> None:
    from lcia.report import load_run, matrix_table, write_report

    run = load_run(folder)
    written = write_report([run], folder / "report.html")
    metrics = "   ".join(
        f"{label} {results['metrics'][key]:.1f}"
        for key, label in (("avg_acc", "Avg.ACC"), ("forgetting", "Forgetting"), ("new_acc", "New.ACC"))
        if results["metrics"][key] is not None
    )
    _emit(as_json, results, matrix_table(run), metrics, f"report: {written}")


if __name__ == "__main__":
    main()
