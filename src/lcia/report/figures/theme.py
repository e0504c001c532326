"""Colours and text of the figures, and a figure as PNG file or as SVG that follows the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

# name → (on light paper, on dark paper). Figures are drawn with the light ones; in the SVG each becomes
# var(--name), so one drawing serves both. Hence: no colour twice, and no other colour in a figure.
COLOURS = {
    "paper": ("#fffffe", "#15181d"),
    "ink": ("#1c2026", "#e8eaed"),
    "faint": ("#5b6470", "#a3adb9"),
    "rule": ("#d5d9df", "#3a414b"),
    "heat": ("#0b6fb0", "#2f8fd6"),
    # Okabe and Ito's colour-blind-safe hues and Tol's, darkened until each stands out 3 : 1 on both papers
    "c0": ("#0072b2", "#4aa8e0"),
    "c1": ("#d55e00", "#ff8f45"),
    "c2": ("#008a65", "#2fc79a"),
    "c3": ("#aa4499", "#e08fd3"),
    "c4": ("#a07400", "#e6b93a"),
    "c5": ("#332288", "#a497f5"),
    "c6": ("#882255", "#ea7fa6"),
    "c7": ("#6b7280", "#b4bcc7"),
}
INK, FAINT, RULE, PAPER, HEAT = (COLOURS[name][0] for name in ("ink", "faint", "rule", "paper", "heat"))
_HUES = [light for name, (light, _) in COLOURS.items() if re.fullmatch(r"c\d", name)]
_MARKERS = "os^DvPX*"
_DASHES = ("solid", (0, (4, 1.5)), (0, (1, 1.2)))
HEAT_ALPHA = 0.68  # of the strongest cell: the ink stays readable on it, light and dark

_STYLE = {
    "axes.edgecolor": FAINT,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "font.size": 8.5,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "hatch.color": RULE,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "svg.fonttype": "path",  # the same widths in every browser, so that what did not overlap never does
    "svg.hashsalt": "lcia",
    "text.color": INK,
    "text.parse_math": False,  # a task may be called $x$
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
}


@contextmanager
def style() -> Iterator[None]:
    """The report's look for what is drawn inside, whatever the user's matplotlibrc says."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def hue(number: int) -> str:
    return _HUES[number % len(_HUES)]


def line_look(number: int) -> dict[str, Any]:
    """Colour, marker and dashes: colour never tells series apart alone, and beyond eight the dashes help."""
    return {
        "color": hue(number),
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number // len(_HUES) % len(_DASHES)],
    }


@cache
def _font() -> FT2Font:
    return font_manager.get_font(font_manager.findfont("DejaVu Sans"))


def drawable(text: str) -> str:
    """One line, with a white square for what the figures' font cannot show (the page's tables can)."""
    line = " ".join(text.split())
    return "".join(c if _font().get_char_index(ord(c)) else "\N{WHITE SQUARE}" for c in line)


def fitted(text: str, width: int, lines: int = 1) -> str:
    """The text on at most so many lines of so many characters; the rest is cut and shown as an ellipsis.

    Names are often joined_with_underscores: a line may end after one.
    """
    rest = drawable(text)
    shown: list[str] = []
    while len(rest) > width and len(shown) + 1 < lines:
        breaks = [i for i in range(1, width + 1) if rest[i - 1] in "_-/. " or rest[i] == " "]
        end = max(breaks, default=width)
        shown.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    shown.append(rest if len(rest) <= width else rest[: width - 1] + "…")
    return "\n".join(shown)


def save_png(figure: Figure, path: Path) -> None:
    """On opaque light paper: a PNG is pasted into documents."""
    with style():
        figure.draw_without_rendering()  # lays it out, once: every later drawing keeps the places
        figure.set_layout_engine("none")
        figure.savefig(path, dpi=150, facecolor=PAPER)


def svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element for one HTML page.

    Args:
        name: unique on the page; it keeps the element's ids apart from other figures' ids.
    """
    buffer = io.StringIO()
    with style():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    drawing = buffer.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    drawing = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", drawing).replace("xlink:href", "href")
    drawing = re.sub(r'\bid="', f'id="{name}-', drawing)
    drawing = re.sub(r'href="#', f'href="#{name}-', drawing).replace("url(#", f"url(#{name}-")
    for colour, (light, _) in COLOURS.items():
        drawing = drawing.replace(light, f"var(--{colour})")
    return re.sub(r"\n\s*", "\n", drawing)


def new_figure(width_in: float, height_in: float) -> Figure:
    """A figure that no global state knows, with an Agg canvas."""
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
