"""docs/methods: a page for every method, complete, and links that lead somewhere."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from lcia.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "methods"

# What a page must hold, as patterns at the beginning of a line; an equation is a line of its own.
PARTS = {
    "equation": r"(?!#|\||- |`|Source)[^\n]*[=←∪Σ]",
    "source": r"Sources?: ",
    "cost": r"(?:## Cost\n\n|Cost: )\S",
    "when to use it": r"(?:## When to use it\n\n|When to use it: )\S",
    "measured": r"## Measured\n\n\S",
}


def missing(text: str) -> list[str]:
    return [part for part, pattern in PARTS.items() if not re.search(rf"^{pattern}", text, re.MULTILINE)]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method_has_a_page_with_all_parts(name: str) -> None:
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert text.startswith(f"# {name}: ")
    assert missing(text) == []
    assert re.search(r"arXiv \d{4}\.\d{5}|et al\.", text), "a source that can be looked up"
    for option in inspect.signature(METHODS[name]).parameters:
        assert option in ("args", "kwargs") or f"`{option}`" in text, option


def test_measured_figures_are_those_of_the_results() -> None:
    results = [(ROOT / "results" / f"{study}.md") for study in ("methods", "vision", "instrdialog")]
    lines = {line for page in results if page.is_file() for line in page.read_text(encoding="utf-8").splitlines()}
    for page in PAGES.glob("*.md"):
        _, measured = page.read_text(encoding="utf-8").split("## Measured\n")
        for row in re.findall(r"^\| `.*(?:±|one seed).*$", measured, re.MULTILINE):
            assert row in lines, f"{page.name}: {row}"


def test_a_page_that_lacks_a_part_would_be_seen() -> None:
    text = (PAGES / "l2.md").read_text(encoding="utf-8")
    for part, pattern in PARTS.items():
        assert missing(re.sub(rf"^{pattern}", "?", text, flags=re.MULTILINE)) == [part]


def test_there_is_no_page_of_something_else() -> None:
    assert {page.stem for page in PAGES.glob("*.md")} == set(METHODS)


def test_the_readme_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\[(\w+)\]\(docs/methods/\1\.md\)", text)) == set(METHODS)


@pytest.mark.parametrize(
    "page",
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "bench" / "README.md",
        *sorted((ROOT / "docs").rglob("*.md")),
    ],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not link.startswith(("http", "mailto")):
            file, _, heading = link.partition("#")
            target = page if not file else (page.parent / file)
            assert target.exists(), link
            if heading:
                titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                assert heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, link
