"""The report as one HTML file that needs no network, with the figures as PNG files beside it."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lcia.errors import UserError
from lcia.files import write_text
from lcia.report.chapter import build_chapter, build_orders
from lcia.report.compare import METRICS
from lcia.report.figures import COLOURS, MIN_RADAR_TASKS
from lcia.report.gallery import Gallery
from lcia.report.load import LeftOut, Run, left_out_title
from lcia.report.significance import compare_runs
from lcia.report.tables import NOT_RECORDED

FIGURES = "figures"  # the folder beside the page
_UNBROKEN = 12  # characters of a name that stay on one line


def write_report(
    runs: Sequence[Run], out: Path | str, against: str | None = None, left_out: Sequence[LeftOut] = ()
) -> Path:
    """Write the HTML file, and the figures as PNG files into `figures/` beside it.

    Args:
        runs: one or more; what may be compared is compared (see lcia.report.compare).
        out: the HTML file, or a folder that shall hold report.html.
        against: the reference of the tests, see `lcia.report.compare_runs`.
        left_out: what was given beside the runs, see `lcia.report.load_runs`.

    Returns:
        The HTML file.
    """
    if not runs:
        raise UserError("no runs to report: name at least one run folder")
    out = Path(out)
    if out.is_dir():
        out = out / "report.html"
    found = compare_runs(runs, against)
    single = len(found.arenas) == 1
    chapters = [
        build_chapter(arena, scope, number, Gallery(out.parent / FIGURES, prefix="" if single else f"{number}-"))
        for number, (arena, scope) in enumerate(zip(found.arenas, found.scopes, strict=True), start=1)
    ]
    text = (
        _environment()
        .get_template("page.html")
        .render(
            chapters=chapters,
            orders=[build_orders(*pair) for pair in zip(found.orders, found.order_scopes, strict=True)],
            metrics=METRICS,
            min_radar_tasks=MIN_RADAR_TASKS,
            not_recorded=NOT_RECORDED,
            left_out=left_out,
            left_out_title=left_out_title(runs, left_out),
            palette=_palette(),
        )
    )
    write_text(out, text)
    return out


def comparison_page(runs: Sequence[Run]) -> Path:
    """Where a comparison goes that was given no place: beside the runs, where one folder holds all and can be written.

    Else into the working directory.
    """
    folders = {run.path.resolve().parent for run in runs}
    here = Path.cwd()
    folder = folders.pop() if len(folders) == 1 else here
    if not os.access(folder, os.W_OK):
        folder = here
    return (folder.relative_to(here) if folder.is_relative_to(here) else folder) / "comparison.html"


def without_page(left_out: Sequence[LeftOut], page: Path) -> list[LeftOut]:
    """What was given beside the runs, less the page and its figures: `runs/*` finds those of the last comparison."""
    own = {page.resolve(), page.resolve().parent / FIGURES}
    return [one for one in left_out if one.path.resolve() not in own]


def _environment() -> Environment:
    """Everything a template prints is escaped, unless it is Markup."""
    environment = Environment(
        loader=PackageLoader("lcia.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["soft"] = _soft
    return environment


def _soft(name: str) -> Markup:
    """The name, escaped; in a long one, a line may end after an underscore."""
    escaped = html.escape(name)
    return Markup(escaped.replace("_", "_<wbr>") if len(name) > _UNBROKEN else escaped)


def _palette() -> Markup:
    """The colours as CSS variables, on light and on dark paper."""
    light = "".join(f"--{name}:{colours[0]};" for name, colours in COLOURS.items())
    dark = "".join(f"--{name}:{colours[1]};" for name, colours in COLOURS.items())
    return Markup(
        f":root{{{light}color-scheme:light}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}color-scheme:dark}}}}"
    )
