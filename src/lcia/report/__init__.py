"""From run folders to something to look at: console tables, Markdown, JSON, one HTML file, PNG figures."""

from __future__ import annotations

from lcia.report.console import comparison_table, comparison_tables, matrix_table
from lcia.report.document import comparison_json
from lcia.report.load import LeftOut, Run, load_run, load_runs
from lcia.report.page import comparison_page, without_page, write_report
from lcia.report.significance import Comparison, compare_runs
from lcia.report.tables import comparison_markdown

__all__ = [
    "Comparison",
    "LeftOut",
    "Run",
    "compare_runs",
    "comparison_json",
    "comparison_markdown",
    "comparison_page",
    "comparison_table",
    "comparison_tables",
    "load_run",
    "load_runs",
    "matrix_table",
    "without_page",
    "write_report",
]
