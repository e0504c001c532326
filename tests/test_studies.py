"""What a study keeps is what its runs were."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

STUDIES = Path(__file__).resolve().parents[1] / "studies"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(str(STUDIES))
    module = importlib.import_module("study")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def test_a_run_that_began_with_other_settings_is_not_gone_on_with(study: Any) -> None:
    values = {"stream": "assistant", "learning_rate": 1e-3, "method": "lora"}
    assert study._command("some", "lora", values, None)[0] == "train"
    folder = study.run_folder("some", "lora")
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({**values, "stream": "/data/assistant", "seed": 0}))
    assert study._command("some", "lora", values, None) == ("resume", str(folder))
    with pytest.raises(SystemExit, match=r"other settings \(learning_rate\)"):
        study._command("some", "lora", {**values, "learning_rate": 2e-3}, None)
