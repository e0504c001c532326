"""The code blocks of docs/add-a-method.md, and the method they make."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lcia.methods import METHODS
from lcia.methods.base import Method

PAGE = Path(__file__).resolve().parents[1] / "docs" / "add-a-method.md"
MODULE = "lcia.methods.wise_ft"


def blocks() -> dict[str, str]:
    """{file named in a block's first line: the block}."""
    found = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return dict(found)


def run_block(name: str, module: str) -> dict[str, Any]:
    """What the names of a Python block stand for after it ran."""
    space: dict[str, Any] = {"__name__": module}
    exec(compile(blocks()[name], f"{PAGE}: {name}", "exec"), space)
    return space


def import_documented(monkeypatch: pytest.MonkeyPatch) -> type[Method]:
    """Make the page's module importable; nothing is registered yet."""
    module = ModuleType(MODULE)
    vars(module).update(run_block("src/lcia/methods/wise_ft.py", MODULE))
    monkeypatch.setitem(sys.modules, MODULE, module)
    found: type[Method] = module.WiseFT
    return found


def register_documented(monkeypatch: pytest.MonkeyPatch) -> type[Method]:
    """The page's method as an entry of METHODS."""
    found = import_documented(monkeypatch)
    monkeypatch.setitem(METHODS, found.name, found)
    return found
