"""Whatever is wrong with the data ends in a UserError that says where, and nothing else ever escapes."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcia import load_stream
from lcia.errors import UserError
from lcia.stream import describe

FUZZ_EXAMPLES = int(os.environ.get("LCIA_FUZZ_EXAMPLES", "300"))
GOOD = [{"id": str(n), "instruction": "Say it", "input": f"q{n}", "output": f"a{n}"} for n in range(10)]


def lines(*records: Any) -> str:
    return "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)


def fails(source: Any, *parts: str, **options: Any) -> str:
    """The message of the UserError that `source` ends in; it must hold every part."""
    with pytest.raises(UserError) as caught:
        load_stream(source, **options)
    message = str(caught.value)
    for part in parts:
        assert part in message, f"{part!r} is missing in: {message}"
    message.encode()  # can be printed
    return message


# --- one bad row, on line 3 of an otherwise good file ----------------------------------------------------

USER, BOT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
HUMAN, GPT = {"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}
BAD_ROWS: dict[str, tuple[Any, str]] = {
    "broken JSON": ('{"input": "q", "output": ', "broken JSON"),
    "two objects on a line": ('{"input": "q", "output": "a"} {}', "text after the end"),
    "half a line": ('"input": "q"', "broken JSON"),
    "not an object": ([1], "must be a JSON object, not a list"),
    "a number": (5, "not a number"),
    "no output": ({"instruction": "i", "input": "q"}, "row without 'output'"),
    "null output": ({"input": "q", "output": None}, "row without 'output'"),
    "empty output list": ({"input": "q", "output": []}, "at least one answer"),
    "empty output": ({"input": "q", "output": ""}, "empty answer"),
    "blank output in a list": ({"input": "q", "output": ["a", " "]}, "empty answer"),
    "output a number": (
        {"input": "q", "output": 3},
        "'output' must be a text or a list of texts, not a number",
    ),
    "output an object": ({"input": "q", "output": {"a": 1}}, "not an object"),
    "output a list of numbers": ({"input": "q", "output": [1]}, "not a number"),
    "no input": ({"instruction": "i", "output": "a"}, 'row without "input"'),
    "input a number": ({"input": 3, "output": "a"}, "'input' must be a text, not a number (quote it)"),
    "input a list": ({"input": ["q"], "output": "a"}, "not a list"),
    "instruction a bool": ({"instruction": True, "input": "q", "output": "a"}, "not true or false"),
    "known keys missing": ({"prompt": "q", "completion": "a"}, "'prompt', 'completion'"),
    "no keys": ({}, "messages, conversations"),
    "the id twice": (GOOD[0], "the id '0' was used before"),
    "id a list": ({**GOOD[0], "id": [1]}, "'id' must be a text"),
    "id a float": ({**GOOD[0], "id": 1.5}, "'id' must be a text"),
    "unknown split": ({**GOOD[0], "id": "x", "split": "tset"}, "unknown split 'tset'. Did you mean 'test'?"),
    "split a number": ({**GOOD[0], "id": "x", "split": 1}, "'split' must be a text"),
    "not a number": ('{"input": "q", "output": "a", "weight": NaN}', "NaN is not a JSON value"),
    "infinite": ('{"input": "q", "output": "a", "weight": -Infinity}', "-Infinity is not a JSON value"),
    "nested deeply": ('{"input": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    "a huge number": ('{"input": "q", "output": "a", "n": ' + "9" * 10_000 + "}", "not valid JSON"),
    "a key twice": ('{"input": "q", "output": "a", "output": "b"}', "'output' appears twice"),
    "half a surrogate pair": ('{"input": "\\ud800", "output": "a"}', "lone surrogate"),
    "messages empty": ({"messages": []}, "at least two turns"),
    "messages a text": ({"messages": "hi"}, "at least two turns"),
    "no answer": ({"messages": [USER]}, "no output"),
    "ends with a question": ({"messages": [USER, BOT, USER]}, "ends with a user turn"),
    "answer only": ({"messages": [BOT]}, "missing input"),
    "two answers": ({"messages": [USER, BOT, BOT]}, "needs a user turn before the answer"),
    "unknown role": ({"messages": [{"role": "usr", "content": "x"}, BOT]}, "unknown role 'usr'"),
    "no role": ({"messages": [{"content": "x"}, BOT]}, "unknown role 'None'"),
    "role a list": ({"messages": [{"role": [], "content": "x"}, BOT]}, "unknown role"),
    "late system turn": (
        {"messages": [USER, {"role": "system", "content": "x"}, USER, BOT]},
        "only as the first",
    ),
    "turn a text": ({"messages": ["hi", BOT]}, "messages[0] must be an object"),
    "content a number": (
        {"messages": [{"role": "user", "content": 1}, BOT]},
        "messages[0]: 'content' must be",
    ),
    "empty question": ({"conversations": [{"from": "human", "value": " "}, GPT]}, "the question is empty"),
    "CoIN with empty text": ({"question_id": 1, "text": "", "answer": "q"}, "the question is empty"),
    "empty answer": ({"conversations": [HUMAN, {"from": "gpt", "value": " "}]}, "empty answer"),
    "tool call": (
        {"conversations": [HUMAN, {"from": "function_call", "value": "x"}, GPT]},
        "'function_call'",
    ),
    "part of another type": (
        {"messages": [{"role": "user", "content": [{"type": "audio", "audio": "x"}]}, BOT]},
        "the type text or image, not 'audio'",
    ),
    "marker without image": (
        {"conversations": [{"from": "human", "value": "<image>\nhi"}, GPT]},
        "1 <image> markers in the text, but 0 images",
    ),
    "CoIN without answer": ({"question_id": 1, "text": "q"}, "row without 'answer'"),
    "CoIN without text": ({"question_id": 1, "answer": "q"}, 'without "text"'),
    "history of another form": ({**GOOD[0], "id": "x", "history": [["q"]]}, "[question, answer] pairs"),
    "history a text": ({**GOOD[0], "id": "x", "history": "q"}, "[question, answer] pairs"),
    "image an object": ({**GOOD[0], "id": "x", "image": {"bytes": "x"}}, "path of an image file"),
    "image empty": ({**GOOD[0], "id": "x", "image": ""}, "empty path"),
    "image and images": ({**GOOD[0], "id": "x", "image": "a", "images": ["b"]}, "keep one of them"),
    "image missing": ({**GOOD[0], "id": "x", "image": "none.png"}, "does not exist"),
    "image elsewhere": ({**GOOD[0], "id": "x", "image": "../../etc/passwd"}, "leaves its folder"),
    "image absolute": ({**GOOD[0], "id": "x", "image": "/etc/passwd"}, "leaves its folder"),
    "image behind a link": ({**GOOD[0], "id": "x", "image": "link/secret.png"}, "leaves its folder"),
    "image a linked file": ({**GOOD[0], "id": "x", "image": "linked.png"}, "leaves its folder"),
    "image a folder": ({**GOOD[0], "id": "x", "image": "."}, "does not exist"),
    "image with a zero byte": ({**GOOD[0], "id": "x", "image": "a\0b"}, "image"),
    "image with a long name": ({**GOOD[0], "id": "x", "image": "a" * 5000}, "image"),
    "image on the web": ({**GOOD[0], "id": "x", "image": "https://example.org/a.png"}, "download it first"),
    "image inline": ({**GOOD[0], "id": "x", "image": "data:image/png;base64,AAAA"}, "only files"),
}


@pytest.fixture
def bad_row_file(tmp_path: Path) -> Callable[[Any], Path]:
    inside, outside = tmp_path / "stream", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret.png").write_bytes(b"x")
    (inside / "link").symlink_to(outside)
    (inside / "linked.png").symlink_to(outside / "secret.png")

    def make(row: Any) -> Path:
        path = inside / "task.jsonl"
        path.write_text(lines(*GOOD[:2], row, *GOOD[2:]), encoding="utf-8")
        return path

    return make


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_stops_the_load_naming_its_line(name: str, bad_row_file: Callable[[Any], Path]) -> None:
    row, reason = BAD_ROWS[name]
    path = bad_row_file(row)
    message = fails([{"name": "task", "path": str(path), "instruction": "Say it"}], reason)
    assert message.startswith(f"{path}:3:")
    assert len(message) < 800


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_can_be_skipped_but_is_listed(name: str, bad_row_file: Callable[[Any], Path]) -> None:
    row, reason = BAD_ROWS[name]
    path = bad_row_file(row)
    stream = load_stream([{"name": "task", "path": str(path), "instruction": "Say it"}], skip_bad_rows=True)
    assert describe(stream).tasks[0].rows == {"train": 8, "dev": 1, "test": 1}
    assert "task: 1 rows skipped" in stream.notes
    assert any(note.startswith(f"{path}:3:") and reason in note for note in stream.notes)


def test_bad_encoding_names_its_line(tmp_path: Path) -> None:
    for ending in ("jsonl", "json"):
        path = tmp_path / f"a.{ending}"
        content = json.dumps(GOOD, indent=1) if ending == "json" else lines(*GOOD)
        path.write_bytes(content.replace("q2", "caf\xe9").encode("latin-1"))
        line = content[: content.index("q2")].count("\n") + 1
        fails(path, f"{path}:{line}: not UTF-8")
    path.write_bytes(lines(*GOOD).encode("utf-16"))
    fails(path, "a.json:1: not UTF-8")


def test_broken_lists_name_the_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    text = json.dumps(GOOD, indent=1)
    for content, reason in [
        (text.replace('"output": "a1",', '"output": "a1"', 1).replace('"q1"', '"q1" oops'), "broken JSON"),
        (text[:-1], "expected ',' or ']'"),
        (text + "x", "text after the end of the list"),
        (text.replace("},", "}", 1), ":8: broken JSON: expected ',' or ']'"),
        (text[: len(text) // 2], "broken JSON"),
        (text.replace("\n]", ",\n]"), "broken JSON"),
        ("[]", "the list is empty"),
        ("[", "broken JSON"),
    ]:
        path.write_text(content)
        fails(path, str(path), reason)


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf\n"])
def test_empty_files(ending: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes(content)
    fails(path, str(path), "not a readable parquet" if ending == "parquet" and content else "empty")


def test_broken_and_empty_parquet(tmp_path: Path) -> None:
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(GOOD), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    fails(path, "not a readable parquet file")
    parquet.write_table(pa.Table.from_pylist(GOOD).slice(0, 0), path)
    fails(path, "holds no rows")
    parquet.write_table(pa.Table.from_pylist([{"input": "q", "output": 3}]), path)
    fails(path, f"{path}:row 1: 'output' must be a text")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"Definition": ["x"], "Instances": []}, "at least one object"),
        ({"Definition": ["x"], "Instances": {}}, "must be a list"),
        ({"Definition": 3, "Instances": [{}]}, "needs a 'Definition'"),
        ({"Instances": [{}]}, "needs a 'Definition'"),
        ({"Definition": "x", "Instances": [{"input": "q", "output": ["a"]}, {"input": "q"}]}, "instance 2"),
        ({"Definition": "x", "Instances": ["q"]}, "instance 1: a row must be a JSON object"),
        ({"data": GOOD}, "no known format"),
        (5, "must be a JSON object"),
    ],
)
def test_super_ni_and_other_objects(content: Any, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content))
    fails(tmp_path, "a.json", reason)


# --- what the task cannot settle -------------------------------------------------------------------------


def test_no_instruction_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines(*({"input": f"q{n}", "output": "a"} for n in range(10))))
    fails(path, f"{path}:1: row without instruction", f"{path}:2", "tasks.json")
    path.write_text(lines(*({"messages": [{**USER, "content": f"hi {n}"}, BOT]} for n in range(10))))
    fails(path, f"{path}:1: row without instruction")


def test_nothing_to_ask(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines(*GOOD, {"input": " ", "output": "a"}))
    fails(path, f"{path}:11: row without instruction")


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_split(split: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    other = {"train": "test", "test": "train"}[split]
    path.write_text(lines(*({**row, "split": other} for row in GOOD)))
    fails(path, f"'a': the {split} split is empty", str(path))
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "b").mkdir()
    (tmp_path / f"b/{other}.jsonl").write_text(lines(*GOOD))
    fails(tmp_path, f"'b': the {split} split is empty")


def test_splits_stated_for_some_rows_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines({**GOOD[0], "split": "train"}, *GOOD[1:]))
    fails(path, f"{path}:2: row without split, while {path}:1 has one")


def test_a_split_that_contradicts_its_file(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(lines({**GOOD[0], "split": "test"}))
    fails([{"name": "a", "path": str(tmp_path)}], "train.jsonl:1: split 'test' in a file for 'train'")


def test_one_row_cannot_be_split(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(GOOD[0]))
    fails(tmp_path, "a.jsonl:1", "at least two")


def test_skipping_every_row_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{\n{\n")
    fails(tmp_path, "no row can be used", "a.jsonl:1", skip_bad_rows=True)


def test_scorers_that_do_not_fit(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines(*GOOD))
    fails([{"name": "a", "path": str(path), "scorer": "exakt"}], "unknown scorer 'exakt'. Did you mean 'exact'?")
    fails([{"name": "a", "path": str(path), "scorer": "option_letter"}], f"{path}:1", "names no option A-Z")


def lettered(train: str, test: str = "") -> list[dict[str, Any]]:
    """A row for each answer; "-" stands for one that names no letter. Without test rows no split is stated."""
    rows = []
    for n, answer in enumerate(train + test):
        row = {"id": str(n), "instruction": "Choose", "input": f"q{n}", "output": "N/A" if answer == "-" else answer}
        rows.append({**row, "split": "train" if n < len(train) else "test"} if test else row)
    return rows


def test_an_answer_that_the_scorer_cannot_read_can_be_skipped_but_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines(*lettered("ABCD" * 2, "A-")))
    reason = f"{path}:10: task 'a' is scored by option_letter, but the answer 'N/A' names no option A-Z"
    fails(path, reason)
    stream = load_stream(path, skip_bad_rows=True)
    assert describe(stream).tasks[0].rows == {"train": 8, "dev": 0, "test": 1}
    assert "a: 1 rows skipped" in stream.notes
    assert any(note.startswith(reason) for note in stream.notes)


def test_a_split_is_drawn_of_the_rows_that_the_scorer_can_read(tmp_path: Path) -> None:
    """As if the others had never been there; a scorer that is chosen is chosen before."""
    path = tmp_path / "a.jsonl"
    rows = lettered("ABCD" * 3 + "-" + "ABCD" * 2)
    path.write_text(lines(*rows[:12], "", *rows[13:]))
    source = [{"name": "a", "path": str(path), "scorer": "option_letter"}]
    without = load_stream(source)
    path.write_text(lines(*rows))
    stream = load_stream(source, skip_bad_rows=True)
    assert stream.tasks == without.tasks
    assert [note for note in stream.notes if "80/10/10" in note] == [
        note for note in without.notes if "80/10/10" in note
    ]
    chosen = set()
    for seed in range(30):
        stream = load_stream(path, seed=seed, skip_bad_rows=True)
        chosen.add((stream[0].scorer, sum(describe(stream).tasks[0].rows.values())))
    assert chosen == {("option_letter", 20), ("exact", 21)}  # where the row is drawn for training, no letters are asked


def test_a_split_without_an_answer_that_can_be_read_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(lines(*lettered("ABCD" * 2, "--")))
    fails(path, "the test split is empty", f"2 rows skipped, the first: {path}:9: task 'a'", skip_bad_rows=True)
    path.write_text(lines(*GOOD))
    source = [{"name": "a", "path": str(path), "scorer": "option_letter"}]
    fails(source, f"no row can be used; 10 rows skipped, the first: {path}:1: task 'a'", skip_bad_rows=True)


# --- where the tasks are ---------------------------------------------------------------------------------


def test_sources_that_name_nothing(tmp_path: Path) -> None:
    fails("asistant", "Did you mean 'assistant'?")
    fails(str(tmp_path / "none"), "neither a built-in stream nor a folder")
    fails(tmp_path, "no tasks here", "NAME.jsonl")
    fails([], "the list of tasks is empty")
    fails(5, "must be a name, a folder or a list")
    fails("", "")
    fails("a\0b", "")
    fails({"name": "a"}, "is for built-in streams")


def test_selection(tmp_path: Path) -> None:
    fails("assistant", "no task 'travel_intnt'. Did you mean 'travel_intent'?", tasks=["travel_intnt"])
    fails("assistant", "'artist_name' is listed twice", tasks=["artist_name", "artist_name"])
    fails("assistant", "empty", tasks=[])


@pytest.mark.parametrize("name", ["a.b", "a b", "é", "a/b", "..", "", "a" * 101, "a\n"])
def test_names_that_cannot_name_a_folder(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(lines(*GOOD))
    fails([{"name": name, "path": str(path)}], "name")
    if name in {"a.b", "a b", "é"}:
        path.rename(tmp_path / f"{name}.jsonl")
        fails(tmp_path, f"task name {name!r} cannot be used", "Rename")


def test_two_tasks_of_one_name(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.json", "b.jsonl"):
        (tmp_path / name).write_text(lines(*GOOD))
    fails(tmp_path, "two tasks named 'a'")
    (tmp_path / "tasks.json").write_text(json.dumps(["b", "a"]))
    fails(tmp_path, "two tasks named 'a'", "a.jsonl", "a.json")
    (tmp_path / "tasks.json").write_text(json.dumps(["b", "b"]))
    fails(tmp_path, "two tasks named 'b'")
    entry = {"path": str(tmp_path / "b.jsonl")}
    fails([{"name": "x", **entry}, {"name": "x", **entry}], "two tasks named 'x'")
    fails([{"name": "x", **entry}, {"name": "X", **entry}], "two tasks named 'X'", "case")


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"name": "a"}, "stream[0] has no 'path'"),
        ({"path": "a.jsonl"}, "stream[0] has no 'name'"),
        ({"name": "a", "path": "a.jsonl", "instructon": "x"}, "'instructon'. Did you mean 'instruction'?"),
        ({"name": "a", "path": "a.jsonl", 3: "x"}, "unknown key 3"),
        ({"name": "a", "path": 3}, "'path' must be a text"),
        ({"name": "a", "path": ""}, "'path' must be a text that is not empty"),
        ({"name": "a", "path": "none.jsonl"}, "none.jsonl does not exist"),
        ({"name": "a", "path": "no/such/folder"}, "does not exist"),
        ({"name": "a", "path": "crowd/z"}, "crowd/z does not exist"),
        ({"name": "a", "path": "notes.txt"}, "unknown ending"),
        ({"name": "a", "path": "empty"}, "found none"),
        ({"name": "a", "path": "crowd"}, "found x.jsonl, y.jsonl"),
        ({"name": "a", "path": "twice"}, "two files for the split dev: dev.jsonl and val.jsonl"),
        ({"name": "a", "path": "a.jsonl", "image_folder": "none"}, "image_folder none is not a folder"),
        ("a.jsonl", "stream[0] must be {name, path"),
    ],
)
def test_entries_of_a_list(entry: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in (
        "a.jsonl",
        "notes.txt",
        "crowd/x.jsonl",
        "crowd/y.jsonl",
        "twice/dev.jsonl",
        "twice/val.jsonl",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(lines(*GOOD))
    fails([entry], reason)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["train-00000-of-00002"], "train-00001-of-00002.jsonl is missing, a shard of the split train"),
        (["train-0-of-3", "train-2-of-3"], "train-1-of-3.jsonl is missing"),
        (["train-00001-of-00002", "train-00002-of-00002"], "train-00002-of-00002.jsonl: no such shard"),
        (["train", "train-00000-of-00001"], "the split train: train-00000-of-00001.jsonl and train.jsonl"),
        (
            ["train-0-of-1", "train-0-of-2", "train-1-of-2"],
            "the split train: train-0-of-1.jsonl and train-0-of-2.jsonl",
        ),
        (["val-0-of-2", "validation-1-of-2"], "the split dev: val-0-of-2.jsonl and validation-1-of-2.jsonl"),
    ],
)
def test_shards_that_are_not_one_whole_split(names: list[str], reason: str, tmp_path: Path) -> None:
    for name in (*names, "test"):
        (tmp_path / f"{name}.jsonl").write_text(lines(*GOOD))
    fails(tmp_path, str(tmp_path), reason)


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        ("", "broken JSON"),
        ("{", "broken JSON"),
        ("[] x", "text after the end"),
        ("[]", "must be a list"),
        ("5", "must be a list"),
        ("[5]", "[0] must be a task name"),
        ("[{}]", "[0] has no 'task'"),
        ('[{"task": 3}]', "'name' must be a text"),
        ('[{"task": "a", "name": "b"}]', "mean the same"),
        ('[{"task": "a", "instrution": "x"}]', "Did you mean 'instruction'?"),
        ('[{"task": "a", "scorer": "exakt"}]', "unknown scorer"),
        ('["aa"]', "no data for the task 'aa'"),
        ('["../a"]', "cannot be used"),
        ('{"a": "Say it"}', "must give each task's name an object"),
        ('[{"task": "a", "path": "none.jsonl"}]', "does not exist"),
    ],
)
def test_tasks_json(manifest: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(*GOOD))
    (tmp_path / "tasks.json").write_text(manifest)
    fails(tmp_path, reason)


# --- fuzz: a valid file, damaged -------------------------------------------------------------------------

LLAVA = {"id": "x", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nSay it"}, GPT]}
VALID: dict[str, str] = {
    "own.jsonl": lines(*({**row, "split": "test" if int(row["id"]) > 7 else "train"} for row in GOOD)),
    "list.json": json.dumps([{**row, "output": ["a", "b"]} for row in GOOD], indent=1),
    "chat.jsonl": lines(*({"id": n, "messages": [{"role": "system", "content": "x"}, USER, BOT]} for n in range(4))),
    "llava.json": json.dumps([LLAVA, LLAVA, LLAVA]),
    "coin.jsonl": lines(*({"question_id": n, "text": f"{n}\nSay it", "answer": "B"} for n in range(4))),
    "super.json": json.dumps({"Definition": ["Say it"], "Instances": [{**row, "output": ["a"]} for row in GOOD]}),
    "tasks.json": json.dumps([{"task": "own", "scorer": "exact", "instruction": "x"}, {"name": "list"}]),
}
SWAPS = [
    None,
    True,
    0,
    -1,
    1e999,
    1.5,
    "",
    " ",
    "<image>",
    "\ud800",
    "../x",
    [],
    {},
    [[]],
    ["a"],
    [None],
    {"a": {}},
]


def _swap_types(text: str, choose: random.Random) -> str:
    """The document with one value anywhere in it replaced by one of another type, or one key renamed."""
    rows = text.splitlines() if not text.startswith(("[", '{"Def')) else [text]
    number = choose.randrange(len(rows))
    document = json.loads(rows[number])
    holders: list[Any] = []

    def walk(value: Any) -> None:
        if isinstance(value, dict | list) and value:
            holders.append(value)
            for inner in value.values() if isinstance(value, dict) else value:
                walk(inner)

    walk(document)
    holder = choose.choice(holders)
    key = choose.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    if choose.random() < 0.2:
        holder.pop(key)
    else:
        holder[key] = choose.choice(SWAPS)
    rows[number] = json.dumps(document)
    return "\n".join(rows)


def _damage(content: bytes, kind: str, choose: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(choose.choice([1, 1, 1, 3, 20])):
        at = choose.randrange(len(data) + 1)
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << choose.randrange(8)
        elif kind == "truncate":
            return bytes(data[:at])
        elif kind == "insert":
            data[at:at] = choose.choice(
                [b"\x00", b"\xff", b"\n", b'"', b"{", b"]", b"\\u", b"\xef\xbb\xbf", b"[" * 9999]
            )
        elif kind == "delete":
            del data[at : at + choose.choice([1, 2, 10, 100])]
    return bytes(data)


@given(
    st.sampled_from(sorted(VALID)),
    st.sampled_from(["flip", "truncate", "insert", "delete", "types"]),
    st.booleans(),
    st.integers(0, 2**32),
)
@settings(deadline=None, derandomize=True, max_examples=FUZZ_EXAMPLES)
def test_a_damaged_file_loads_or_is_refused(name: str, kind: str, skip: bool, seed: int) -> None:
    choose = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "a.png").write_bytes(b"x")
        for other in ("own.jsonl", "list.json") if name == "tasks.json" else (name,):
            (root / other).write_text(VALID[other])
        damaged = (
            _swap_types(VALID[name], choose).encode()
            if kind == "types"
            else _damage(VALID[name].encode(), kind, choose)
        )
        (root / name).write_bytes(damaged)
        try:
            stream = load_stream(root, skip_bad_rows=skip, seed=seed)
        except UserError as refused:
            str(refused).encode()  # can be printed
        else:
            json.dumps(describe(stream).as_dict(), allow_nan=False).encode()
            for task in stream:
                assert task.train
                assert task.test
                for row in (*task.train, *task.dev, *task.test):
                    assert row.instruction.strip()
                    assert row.outputs[0].strip()
                    assert row.messages[-1][0] == "user"


def test_the_undamaged_files_load(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    for name, content in VALID.items():
        if name != "tasks.json":
            (tmp_path / name).write_text(content)
    assert len(load_stream(tmp_path)) == 6
    (tmp_path / "tasks.json").write_text(VALID["tasks.json"])
    assert [task.name for task in load_stream(tmp_path)] == ["own", "list"]
