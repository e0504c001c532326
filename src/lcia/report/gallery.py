"""Figures on their way out: PNG files into a folder, SVG drawings into the page."""

from __future__ import annotations

import html
import re
from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure

from lcia.report.figures import WIDTH_IN, save_png, svg

_LEAST_REM = 44  # of a figure of the page's width: on a narrow screen it scrolls rather than shrinks further


class Gallery:
    """Gives each figure of a chapter a name, writes its PNG and returns its HTML."""

    def __init__(self, folder: Path, prefix: str) -> None:
        self._folder, self._prefix = folder, prefix
        self._names: set[str] = set()

    def keep(self, name: str, figure: Figure) -> str:
        """Only the PNG file: for figures that the page shows as tables. Returns the name it got."""
        slug = self._prefix + (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "figure")
        while slug in self._names:  # `a b` and `a_b` are two figures
            slug += "-"
        self._names.add(slug)
        self._folder.mkdir(parents=True, exist_ok=True)
        save_png(figure, self._folder / f"{slug}.png")
        return slug

    def hang(self, name: str, figure: Figure, caption: str) -> Markup:
        """The PNG file, and a <figure> element for the page.

        Args:
            caption: one sentence that says what is shown, also for those who do not see it.
        """
        slug = self.keep(name, figure)
        escaped = html.escape(caption)
        drawing = svg(figure, slug).replace("<svg ", f'<svg role="img" aria-label="{escaped}" ', 1)
        share = figure.get_figwidth() / WIDTH_IN
        size = f"--width:{share:.0%};--least:{_LEAST_REM * share:.0f}rem"
        return Markup(
            f'<figure style="{size}"><div class="drawing">{drawing}</div><figcaption>{escaped}</figcaption></figure>'
        )
