"""docs/add-a-method.md, followed word for word. The common laws run on its method in test_methods.py."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from documented import PAGE, blocks, import_documented, register_documented, run_block
from lcia.config import parse_config
from lcia.errors import UserError
from lcia.methods import METHODS, Method, Training
from test_run import measure


def test_the_method_is_a_page_and_not_more() -> None:
    code = blocks()["src/lcia/methods/wise_ft.py"]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    assert all(len(line) <= 120 for text in blocks().values() for line in text.splitlines())


def test_its_script_trains_a_stream(tiny_config, tmp_path, monkeypatch, capsys) -> None:
    """my.yaml and train.py, on a small model and stream instead of real ones."""
    import_documented(monkeypatch)
    written = yaml.safe_load(blocks()["my.yaml"])
    small = tiny_config(method="lora").model_dump(exclude_unset=True)
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({**small, **written, "stream": small["stream"]}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lcia.methods.METHODS", dict(METHODS))  # the script registers; nothing of it stays
    results = run_block("train.py", "train")["results"]
    assert results["method"] == "wise_ft"
    assert results["method_options"] == [{"name": "wise_ft", "alpha": 0.3}]
    assert str(results["metrics"]) in capsys.readouterr().out
    assert (tmp_path / "runs" / "wise_ft" / "pool" / "shared" / "adapter_model.safetensors").is_file()


def test_its_oracle_passes_and_can_fail(monkeypatch) -> None:
    register_documented(monkeypatch)
    name = "tests/test_method_wise_ft.py"
    tests = {key: value for key, value in run_block(name, "oracle").items() if key.startswith("test_")}
    assert len(tests) == 2
    for test in tests.values():
        test()
    original = METHODS["wise_ft"].begin

    def confused(self: Method, training: Training) -> None:
        """A first task is taken for a later one, and a later one for a first."""
        original(self, replace(training, placement=replace(training.placement, is_new=not training.placement.is_new)))

    monkeypatch.setattr(METHODS["wise_ft"], "begin", confused)
    for test in tests.values():
        with pytest.raises(AssertionError):
            test()


def test_a_small_share_of_the_way_is_a_small_movement(tiny_config, tmp_path, monkeypatch) -> None:
    register_documented(monkeypatch)
    moved = {}
    for alpha in (1.0, 0.1):
        folder = tmp_path / str(alpha)
        measure(tiny_config(method={"name": "wise_ft", "alpha": alpha}, output_dir=str(folder)))
        first, last = (
            torch.cat([weight.flatten() for weight in load_file(path).values()])
            for task in ("colours", "paints")
            for path in (folder / "history" / task / "shared").glob("*.safetensors")
        )
        moved[alpha] = float((last - first).norm())
    assert moved[0.1] < 0.5 * moved[1.0]


def test_a_value_that_cannot_be_right_is_refused(tiny_config, monkeypatch) -> None:
    register_documented(monkeypatch)
    with pytest.raises(UserError, match="wise_ft: alpha must be a number above 0 to 1"):
        tiny_config(method={"name": "wise_ft", "alpha": 0})
    monkeypatch.delitem(METHODS, "wise_ft")
    with pytest.raises(UserError, match="unknown method 'wise_ft'"):
        parse_config({"stream": "x", "output_dir": "y", "method": "wise_ft"}, where="test")


def test_its_table_names_every_moment_as_it_is_called() -> None:
    """A moment that is renamed, or has other arguments, must be renamed on the page."""
    rows = re.findall(r"^\| (`.*?`) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    named = dict(re.findall(r"`(\w+)\((.*?)\)`", " ".join(rows)))
    for name, arguments in named.items():
        code = getattr(Method, name).__code__
        assert list(code.co_varnames[1 : code.co_argcount]) == [part.strip() for part in arguments.split(",") if part]
    public = {name for name, value in vars(Method).items() if callable(value) and not name.startswith("_")}
    assert public - set(named) == {"skipped_step", "log", "report"}


def test_every_file_it_names_exists() -> None:
    root = PAGE.parents[1]
    made = {"src/lcia/methods/wise_ft.py", "tests/test_method_wise_ft.py", "docs/methods/wise_ft.md"}
    for path in set(re.findall(r"(?:src|tests|docs)/[\w/]+\.(?:py|md)", PAGE.read_text(encoding="utf-8"))) - made:
        assert (root / Path(path)).is_file(), path
