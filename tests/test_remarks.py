"""What a run says before it trains: groups that share nothing, a learning rate that is not the method's source's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lcia.config import load_config
from lcia.progress import Reporter
from lcia.remarks import about_groups, about_learning_rate
from lcia.run import resume, train
from lcia.validate import validate_config, validate_folder

NOTHING_SHARED = "2 groups for 2 tasks: nothing is shared, no average is ever taken"


@pytest.mark.parametrize(
    ("tasks", "method", "said"),
    [
        (["colours", "animals"], "lcia", True),
        (["colours", "animals"], ["lcia", "ewc"], True),
        (["colours", "paints"], "lcia", False),  # one group
        (["colours"], "lcia", False),
        (["colours", "animals"], "lora", False),  # does not group
    ],
)
def test_groups_that_share_nothing_are_told_before_training(
    tasks: list[str], method: Any, said: bool, tiny_config: Callable[..., Any]
) -> None:
    with Reporter() as reporter:
        notes = validate_config(tiny_config(tasks=tasks, method=method), reporter).notes
    assert [note for note in notes if "nothing is shared" in note] == ([NOTHING_SHARED] if said else [])


def test_train_says_it_once(
    tiny_config: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(tasks=["colours", "animals"], max_steps=1, max_eval_examples=1)
    with Reporter() as reporter:
        train(config, reporter)
    told = capsys.readouterr().err
    assert told.count(f"note: {NOTHING_SHARED}") == 1
    assert told.index(NOTHING_SHARED) < told.index("row 0")
    with Reporter() as reporter:
        resume(tmp_path / "run", reporter)
    assert NOTHING_SHARED not in capsys.readouterr().err


def test_a_folder_is_told_as_well(tiny_stream: Path, tmp_path: Path) -> None:
    assert not any("nothing is shared" in note for note in validate_folder(tiny_stream).notes)  # paints joins colours
    for name in ("colours", "animals"):
        shutil.copy(tiny_stream / f"{name}.jsonl", tmp_path)
    assert NOTHING_SHARED in validate_folder(tmp_path).notes


def test_only_as_many_groups_as_tasks_share_nothing() -> None:
    assert about_groups({"a": "a", "b": "a", "c": "c"}) == []
    assert about_groups({"a": "a", "b": "b", "c": "c"}) == [
        "3 groups for 3 tasks: nothing is shared, no average is ever taken"
    ]


@pytest.mark.parametrize(
    ("method", "overrides", "said"),
    [
        ("o_lora", [], True),
        ("o_lora", ["learning_rate=0.0005"], False),  # chosen, though the default
        ("o_lora", ["learning_rate=0.001"], False),
        ("lora", [], False),
    ],
)
def test_a_rate_that_was_not_chosen_is_told_where_the_source_names_another(
    method: Any, overrides: list[str], said: bool, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"stream": "assistant", "method": method, "output_dir": "out"}))
    found = about_learning_rate(load_config(path, overrides).with_absolute_paths())
    sentence = "o_lora: its source trains with learning_rate=0.001; none is given, so this is the default 0.0005"
    assert found == ([sentence] if said else [])
