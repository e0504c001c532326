"""From run folders to something to look at: console tables, Markdown, JSON, one HTML file, PNG figures."""

from __future__ import annotations

from lcia.report.compare import comparison_json
from lcia.report.load import Run, load_run
from lcia.report.page import write_report
from lcia.report.tables import comparison_markdown, comparison_table, matrix_table

__all__ = [
    "Run",
    "comparison_json",
    "comparison_markdown",
    "comparison_table",
    "load_run",
    "matrix_table",
    "write_report",
]
