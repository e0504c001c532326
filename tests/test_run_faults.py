"""Faults around a run: full disks, folders that cannot be written, files cut or altered. Nothing finished is lost."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from killing import CONTEXT
from lcia.errors import UserError
from lcia.progress import Reporter
from lcia.regrouping import regroup
from lcia.run import extend, measure_again, resume, rollback
from lcia.run_folder import RunFolder
from lcia.session import open_run
from test_run import hashes, measure, without_cost


def train_with_small_files(values: dict[str, Any], limit_bytes: int, cache: str, report: Any) -> None:
    """In a process of its own: no file may grow over the limit, as on a disk that is full."""
    import os
    import resource

    import torch

    from lcia.config import parse_config
    from lcia.progress import Reporter
    from lcia.run import train

    os.environ["LCIA_CACHE"] = cache
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
    try:
        with Reporter() as reporter:
            train(parse_config(values, where="test"), reporter)
    except Exception as error:  # noqa: BLE001 - whichever library was writing raises its own
        report.put(f"{type(error).__name__}: {error}")
    else:
        report.put("nothing went wrong")


@pytest.mark.parametrize("limit_bytes", [2_000, 20_000, 50_000])
def test_a_full_disk_loses_nothing_that_was_finished(tiny_config, tmp_path, limit_bytes) -> None:
    """2 kB: not even a ledger line; 20 kB: no adapter; 50 kB: no optimizer state of a checkpoint."""
    config = tiny_config(save_steps=2, output_dir=str(tmp_path / "run"))
    whole = measure(tiny_config(save_steps=2, output_dir=str(tmp_path / "whole")))
    report = CONTEXT.Queue()
    process = CONTEXT.Process(
        target=train_with_small_files, args=(config.model_dump(), limit_bytes, str(tmp_path / "cache"), report)
    )
    process.start()
    message = report.get(timeout=100)
    process.join()
    assert "File too large" in message or "could not be written" in message, message
    with Reporter() as reporter:
        resumed = resume(tmp_path / "run", reporter)
    assert without_cost(resumed) == without_cost(whole)
    assert hashes(tmp_path / "run") == hashes(tmp_path / "whole")


def test_a_folder_that_cannot_be_written_is_refused_before_training(tiny_config, monkeypatch) -> None:
    config = tiny_config()
    original = Path.mkdir

    def read_only(self: Path, *arguments: Any, **options: Any) -> None:
        if self == Path(config.output_dir):
            raise OSError(errno.EROFS, "Read-only file system", str(self))
        original(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(UserError, match=r"run: nothing can be written here: Read-only file system"):
        measure(config)


def test_a_file_in_the_way_of_the_output_folder(tiny_config, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="nothing can be written here"):
        measure(tiny_config(output_dir=str(tmp_path / "file" / "run")))


def test_a_kill_while_the_configuration_is_written_does_not_take_the_folder(tiny_config) -> None:
    config = tiny_config(tasks=["colours"])
    folder = Path(config.output_dir)
    folder.mkdir()
    for name in (".lock", ".config.yaml.4711.part"):
        (folder / name).write_text("")
    assert measure(config)["tasks"] == ["colours"]
    assert not list(folder.rglob(".*.part"))


@pytest.fixture
def finished(tiny_config) -> Path:
    config = tiny_config(tasks=["colours", "animals"])
    measure(config)
    return Path(config.output_dir)


@pytest.mark.parametrize("damage", ["cut", "altered", "removed"])
def test_a_damaged_adapter_is_named_and_can_be_restored(finished, tiny_stream, damage) -> None:
    weights = finished / "history" / "animals" / "colours" / "adapter_model.safetensors"
    content = weights.read_bytes()
    if damage == "removed":
        weights.unlink()
    else:
        changed = bytearray(content)
        changed[len(content) // 2] ^= 1
        weights.unlink()  # it is a hard link: the other snapshots must not change with it
        weights.write_bytes(content[:-10] if damage == "cut" else changed)
    for call in (
        lambda reporter: open_run(finished),
        lambda reporter: resume(finished, reporter),
        lambda reporter: extend(finished, str(tiny_stream / "paints.jsonl"), None, reporter),
    ):
        with Reporter() as reporter, pytest.raises(UserError, match=r"animals.colours.adapter_model.safetensors"):
            call(reporter)
    weights.write_bytes(content)
    with Reporter() as reporter:
        extend(finished, str(tiny_stream / "paints.jsonl"), None, reporter)


def test_the_pool_is_made_again_from_the_history(finished) -> None:
    """pool/ only shows the last snapshot: what happens to it costs nothing."""
    weights = finished / "pool" / "colours" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    with Reporter() as reporter:
        resume(finished, reporter)
    assert weights.read_bytes() == content


@pytest.mark.parametrize("line", ["{not json", '["a list"]', '{"no": "event"}'])
def test_a_damaged_line_of_the_ledger_is_named(finished, line) -> None:
    ledger = finished / "ledger.jsonl"
    lines = ledger.read_text().splitlines()
    ledger.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(UserError, match=r"ledger.jsonl, line 3: damaged"):
        RunFolder(finished).records("stage_learned")


def test_a_ledger_cut_at_any_byte_of_its_last_line_goes_on(finished) -> None:
    ledger = finished / "ledger.jsonl"
    whole = ledger.read_bytes()
    results = json.loads((finished / "results.json").read_text())
    last = whole[:-1].rfind(b"\n") + 1
    for end in (last + 1, (last + len(whole)) // 2, len(whole) - 1):
        ledger.write_bytes(whole[:end])
        with Reporter() as reporter:
            assert without_cost(resume(finished, reporter)) == without_cost(results)


def test_a_cut_line_harms_nothing_that_writes_behind_it(finished, tiny_stream) -> None:
    for change in (
        lambda reporter: extend(finished, str(tiny_stream / "paints.jsonl"), None, reporter),
        lambda reporter: regroup(finished, "rename", "colours", "hues", "a better name", reporter),
        lambda reporter: rollback(finished, "animals", reporter),
        lambda reporter: resume(finished, reporter),
    ):
        with (finished / "ledger.jsonl").open("a") as file:
            file.write('{"event": "row_mea')  # a line that a full disk cut
        with Reporter() as reporter:
            results = change(reporter)
            assert measure_again(finished, reporter)["tasks"] == results["tasks"]
            assert without_cost(resume(finished, reporter)) == without_cost(results)


def test_no_way_back_to_a_damaged_state(finished, lcia) -> None:
    results = json.loads((finished / "results.json").read_text())
    ledger = (finished / "ledger.jsonl").read_text()
    state = finished / "history" / "colours" / "method.json"
    content = state.read_bytes()
    state.write_bytes(content + b" ")
    code, _, message = lcia("rollback", finished, "--to", "colours")
    assert code == 2
    assert str(state) in message
    assert (finished / "ledger.jsonl").read_text() == ledger
    with Reporter() as reporter:
        assert without_cost(resume(finished, reporter)) == without_cost(results)
    state.write_bytes(content)
    with Reporter() as reporter:
        assert rollback(finished, "colours", reporter)["tasks"] == ["colours"]
