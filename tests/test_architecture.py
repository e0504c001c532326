"""Rules about the code itself: imports run one way, nothing unpickles, the trainer names no method."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "lcia"

# Each part may import itself and what stands before it.
ORDER = [
    {"errors", "files", "seeds", "machine", "processes"},
    {"progress"},
    {"stream"},
    {"grouping"},
    {"backbone"},
    {"adapters"},
    {"ema"},
    {"methods"},
    {"metrics", "config"},
    {"checkpoint", "early_stopping"},
    {"training"},
    {"evaluation"},
    {"run_folder"},
    {"results", "remarks"},
    {"session"},
    {"learning", "measuring"},
    {"init_stage"},
    {"run"},
    {"regrouping"},
    {"validate", "doctor", "planning"},
    {"answering", "export"},
    {"report"},
    {"serve"},
    {"bench", "jobs"},
    {"bench_list"},
    {"demo"},
    {"cli"},
    {"__init__", "__main__"},
]
# Written where they stand: the configuration is checked with the methods' own knowledge of their options.
LATE = {("config", "methods")}


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_parts(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module] if node.module != "lcia" else [f"lcia.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("lcia.")}
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_run_one_way(path: Path) -> None:
    level = {name: i for i, names in enumerate(ORDER) for name in names}
    mine = part_of(path)
    assert mine in level, f"{mine} is new: give it a place in ORDER"
    for other in imported_parts(path):
        allowed = other == mine or level[other] < level[mine] or (mine, other) in LATE
        assert allowed, f"{path.name} ({mine}) imports {other}, which stands behind it"


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_unpickles(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            forbidden = ("pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps", "torch.save", "joblib.load")
            assert called not in (*forbidden, "eval", "exec"), called
            if called == "torch.load":
                weights_only = [word for word in node.keywords if word.arg == "weights_only"]
                assert weights_only, f"{path.name}: torch.load without weights_only"
                assert ast.unparse(weights_only[0].value) == "True"


def test_the_trainer_names_no_method() -> None:
    from lcia.methods import METHODS

    files = ["training", "checkpoint", "session", "learning", "measuring", "run", "run_folder", "results", "evaluation"]
    for file in files:
        tree = ast.parse((SOURCE / f"{file}.py").read_text(encoding="utf-8"))
        strings = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert not strings & set(METHODS) - {"lcia"}  # the package's own name is also a library's
        assert not names & {cls.__name__ for cls in METHODS.values()} - {"Method"}
