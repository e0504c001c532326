"""Loading streams: where tasks are found, which formats are recognised, and what a row becomes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lcia import load_stream
from lcia.errors import UserError
from lcia.stream import BUILT_IN, SCORERS, Row, Task
from lcia.stream.sources import DATA

SHARED = Path(__file__).parents[2] / "shared/data"
Record = dict[str, Any]


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def own(count: int, **more: Any) -> list[Record]:
    return [{"instruction": "Say it", "input": f"q{n}", "output": f"answer {n}", **more} for n in range(count)]


def one_task(path: Path, **more: Any) -> Task:
    return load_stream([{"name": "task", "path": str(path), **more}])[0]


def all_rows(task: Task) -> list[Row]:
    rows = (*task.train, *task.dev, *task.test)
    return sorted(rows, key=lambda row: int(re.findall(r"\d+", row.source)[-1]))


def with_splits(records: list[Record]) -> list[Record]:
    """The records twice, as train and as test rows."""
    return [{**record, "split": split} for split in ("train", "test") for record in records]


# --- the built-in stream and the shared data -------------------------------------------------------------


def test_assistant() -> None:
    stream = load_stream("assistant")
    assert "assistant" in BUILT_IN
    names = [
        "travel_intent",
        "playlist_name",
        "banking_intent",
        "domain_choice",
        "artist_name",
        "kitchen_intent",
    ]
    assert [task.name for task in stream] == names
    assert [(len(task.train), len(task.dev)) for task in stream] == [(400, 50)] * 6
    assert [len(task.test) for task in stream] == [100, 100, 100, 100, 63, 100]
    assert [task.scorer for task in stream] == ["exact"] * 3 + ["option_letter"] + ["exact"] * 2
    assert all(len(task.instructions) == 1 for task in stream)
    assert stream[0].instructions == stream[2].instructions == stream[5].instructions
    row = stream[0].train[0]
    assert row.id == "travel_intent-train-0"
    assert row.messages == (
        ("user", "how do you say hi in french\nAnswer with the intent of the request using a short phrase"),
    )
    assert row.outputs == ("translate",)
    assert row.source.endswith("travel_intent.jsonl:1")
    assert not stream[0].has_images
    assert any("domain_choice: scorer option_letter" in note for note in stream.notes)


def test_a_perfect_answer_scores_one_on_every_row_of_the_assistant() -> None:
    for task in load_stream("assistant"):
        assert all(SCORERS[task.scorer](row.outputs[0], row.outputs) == 1.0 for row in task.test)


def test_the_shipped_data_name_their_sources() -> None:
    text = (DATA / "assistant/README.md").read_text()
    assert all(word in text for word in ("clinc/oos-eval", "snipsco/nlu-benchmark", "PolyAI-LDN", "CC BY 4.0"))


def test_tasks_are_selected_and_ordered() -> None:
    stream = load_stream("assistant", tasks=["kitchen_intent", "travel_intent"])
    assert [task.name for task in stream] == ["kitchen_intent", "travel_intent"]
    assert stream[1] == load_stream("assistant")[0]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are absent")
def test_shared_streams_load_from_their_folders() -> None:
    instrdialog = load_stream(SHARED / "instrdialog")
    assert len(instrdialog) == 19
    assert sum(len(task.train) for task in instrdialog) == 7817
    assert sum(len(task.test) for task in instrdialog) == 950
    assert len(load_stream(SHARED / "olora_cl")) == 4
    vision = SHARED / "vision_stream"
    names = ["eurosat_mcq", "clothing_cls", "coco_vqa", "bccd_ground", "sroie_ocr", "nlvr_tf"]
    entries = [{"name": name, "path": str(vision / name), "image_folder": str(vision)} for name in names]
    stream = load_stream(entries)
    assert all(len(row.images) == 1 and Path(row.images[0]).is_file() for task in stream for row in task.test)
    assert stream[0].scorer == "option_letter"


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import sys, lcia\nfrom lcia.stream import describe\nlcia.accuracy_metrics([[1], [2]])\n"
        "describe(lcia.load_stream('assistant'))\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- formats ---------------------------------------------------------------------------------------------

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]
SAID = (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"))
SHARE = [
    {"from": {"user": "human", "assistant": "gpt"}.get(t["role"], t["role"]), "value": t["content"]} for t in TURNS
]
FORMATS: dict[str, tuple[Record, tuple[tuple[str, str], ...], tuple[str, ...], str]] = {
    "own": (
        {"id": 7, "instruction": "Name it", "input": "a fruit", "output": ["apple", "pear"]},
        (("user", "a fruit\nName it"),),
        ("apple", "pear"),
        "Name it",
    ),
    "alpaca": (
        {"instruction": "Name a fruit", "input": "", "output": "apple"},
        (("user", "Name a fruit"),),
        ("apple",),
        "Name a fruit",
    ),
    "alpaca with null input": (
        {"instruction": "Name a fruit", "input": None, "output": "apple", "image": None, "split": None},
        (("user", "Name a fruit"),),
        ("apple",),
        "Name a fruit",
    ),
    "alpaca with system and history": (
        {
            "instruction": "Go",
            "input": "Bye",
            "output": "See you",
            "system": "Be brief.",
            "history": [["Hi", "Hello"]],
        },
        (("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye\nGo")),
        ("See you",),
        "Go",
    ),
    "messages": ({"messages": TURNS}, SAID, ("See you",), "Be brief."),
    "conversations": ({"conversations": SHARE}, SAID, ("See you",), "Be brief."),
    "conversations with system beside": (
        {"conversations": SHARE[1:], "system": "Be brief."},
        SAID,
        ("See you",),
        "Be brief.",
    ),
    "messages with an instruction to match by": (
        {"messages": TURNS, "instruction": "Chat"},
        SAID,
        ("See you",),
        "Chat",
    ),
    "messages in parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi\nGo"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]},
            ]
        },
        (("user", "Hi\nGo"),),
        ("Hello",),
        "Go",
    ),
    "CoIN": (
        {
            "question_id": 3,
            "text": "What is it?\nAnswer briefly",
            "answer": "cat",
            "answer_bbox": "[0,0,1,1]",
        },
        (("user", "What is it?\nAnswer briefly"),),
        ("cat",),
        "Answer briefly",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet"])
def test_formats_are_recognised(name: str, ending: str, tmp_path: Path) -> None:
    record, messages, outputs, instruction = FORMATS[name]
    (tmp_path / "task").mkdir()
    for split in ("train", "test"):
        path = tmp_path / f"task/{split}.{ending}"
        if ending == "jsonl":
            write(path, [record])
        elif ending == "json":
            path.write_text(json.dumps([record], indent=1))
        else:
            pa = pytest.importorskip("pyarrow")
            pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist([record]), path)
    (row,) = one_task(tmp_path / "task").train
    assert (row.messages, row.outputs, row.instruction) == (messages, outputs, instruction)
    assert row.images == ()


def test_formats_may_be_mixed_in_one_file(tmp_path: Path) -> None:
    rows = [FORMATS["own"][0], FORMATS["messages"][0], FORMATS["alpaca"][0]]
    task = one_task(write(tmp_path / "mixed.jsonl", [*rows, *own(7)]))
    assert len(all_rows(task)) == 10
    assert all_rows(task)[1].messages == SAID


SUPER_NI = {
    "Definition": ["Judge the sentence."],
    "Positive Examples": [{"input": "x", "output": "y", "explanation": "z"}],
    "Instances": [{"id": f"task1-{n}", "input": f"s{n}", "output": ["good", "fine"]} for n in range(10)],
}


def test_super_ni_task_file(tmp_path: Path) -> None:
    (tmp_path / "task001.json").write_text(json.dumps(SUPER_NI, indent=2))
    task = load_stream(tmp_path)[0]
    assert task.name == "task001"
    assert task.instructions == ("Judge the sentence.",)
    assert (len(task.train), len(task.dev), len(task.test)) == (8, 1, 1)
    row = all_rows(task)[0]
    assert (row.id, row.outputs) == ("task1-0", ("good", "fine"))
    assert row.messages == (("user", "s0\nJudge the sentence."),)
    assert row.source.endswith("task001.json:instance 1")


def test_a_json_file_that_is_jsonl_and_a_jsonl_file_that_is_a_list(tmp_path: Path) -> None:
    write(tmp_path / "a.json", own(10))
    (tmp_path / "b.jsonl").write_text(json.dumps(own(10), indent=2))
    first, second = load_stream(tmp_path)
    assert [row.outputs for row in all_rows(first)] == [row.outputs for row in all_rows(second)]


def test_lines_of_list_elements_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("\n[\n" + ",\n\n".join(json.dumps(row) for row in own(10)) + "\n]\n")
    sources = [row.source for row in all_rows(load_stream(tmp_path)[0])]
    assert [source.rsplit(":", 1)[1] for source in sources] == [f"{2 * n + 1} (element {n})" for n in range(1, 11)]


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_a_byte_order_mark_and_windows_line_ends_are_accepted(ending: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"a.{ending}", own(10))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(all_rows(load_stream(tmp_path)[0])) == 10


def test_blank_lines_and_line_separators_inside_texts(tmp_path: Path) -> None:
    rows = own(10)
    rows[3]["input"] = "two\u2028lines\u0085here"
    path = write(tmp_path / "a.jsonl", rows)
    path.write_text(path.read_text(encoding="utf-8").replace("\n", "\n\n", 2), encoding="utf-8")
    task = load_stream(tmp_path)[0]
    assert len(all_rows(task)) == 10
    assert all_rows(task)[3].messages[0][1].startswith("two\u2028lines\u0085here\n")
    assert all_rows(task)[3].source.endswith(":6")


# --- images ----------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("pics/a.png", "pics/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"not read here")
    return tmp_path


LLAVA = {
    "id": "x",
    "image": "pics/a.png",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat?\nBriefly"},
        {"from": "gpt", "value": "a cat"},
    ],
}


def test_llava_rows(images: Path) -> None:
    task = one_task(write(images / "a.jsonl", with_splits([LLAVA])))
    (row,) = task.train
    assert row.messages == (("user", "What?\nBriefly"),)
    assert row.images == (str((images / "pics/a.png").resolve()),)
    assert row.instruction == "Briefly"
    assert task.has_images


@pytest.mark.parametrize(
    "record",
    [
        {"images": ["pics/a.png", "pics/b.png"], "messages": [
            {"role": "user", "content": "<image> and <image>\nCompare\nGo"},
            {"role": "assistant", "content": "x"}]},
        {"messages": [
            {"role": "user", "content": [
                {"type": "image", "image": "pics/a.png"}, {"type": "image", "path": "pics/b.png"},
                {"type": "text", "text": "and Compare\nGo"}]},
            {"role": "assistant", "content": "x"}]},
        {"images": ["pics/a.png", "pics/b.png"], "messages": [
            {"role": "user", "content": [
                {"type": "image"}, {"type": "image"}, {"type": "text", "text": "and Compare\nGo"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "x"}]}]},
        {"image": ["pics/a.png", "pics/b.png"], "text": "and Compare\nGo", "answer": "x"},
        {"image": ["pics/a.png", "pics/b.png"], "input": "and Compare", "instruction": "Go", "output": "x"},
    ],
)  # fmt: skip
def test_several_images_in_a_row(record: Record, images: Path) -> None:
    (row,) = one_task(write(images / "a.jsonl", with_splits([record]))).train
    assert [Path(name).name for name in row.images] == ["a.png", "b.png"]
    assert "<image>" not in row.messages[0][1]
    assert row.messages[0][1].split()[-3:] == ["and", "Compare", "Go"]


def test_image_folder_and_stream_folder(images: Path) -> None:
    elsewhere = write(images / "rows/a.jsonl", with_splits([LLAVA]))
    assert one_task(elsewhere, image_folder=str(images)).has_images
    inside = write(images / "stream/vision/data.jsonl", with_splits([LLAVA]))
    (images / "stream/pics").symlink_to(inside.parent)  # the task's own folder, and the stream's, are looked into
    (inside.parent / "a.png").write_bytes(b"")
    assert load_stream(images / "stream")[0].has_images


def test_llava_ids_may_repeat_and_stay_distinct(images: Path) -> None:
    task = one_task(write(images / "a.jsonl", with_splits([LLAVA, LLAVA])))
    assert len({row.id for row in task.train}) == 2
    assert all(row.id.startswith("x") for row in task.train)


def test_a_marker_without_images_stays_in_a_plain_row(tmp_path: Path) -> None:
    rows = [{"input": "What is <image> in SVG?", "instruction": "Explain", "output": "a tag"}]
    (row,) = one_task(write(tmp_path / "a.jsonl", with_splits(rows))).train
    assert row.messages == (("user", "What is <image> in SVG?\nExplain"),)


# --- instructions ----------------------------------------------------------------------------------------


def test_a_row_without_instruction_takes_the_tasks(tmp_path: Path) -> None:
    rows = [{"input": "q", "output": "a"}, {"input": "r", "output": "b", "instruction": "Mine"}]
    task = one_task(write(tmp_path / "a.jsonl", with_splits(rows)), instruction="Task's")
    assert [row.messages[0][1] for row in task.train] == ["q\nTask's", "r\nMine"]
    assert task.instructions == ("Task's", "Mine")


def test_chat_rows_are_matched_by_the_tasks_instruction_but_not_rewritten(tmp_path: Path) -> None:
    task = one_task(write(tmp_path / "a.jsonl", with_splits([{"messages": TURNS}])), instruction="Chat")
    assert (task.train[0].messages, task.train[0].instruction) == (SAID, "Chat")


def test_system_message_then_shared_last_line(tmp_path: Path) -> None:
    rows = [
        {"system": "Be kind.", "input": "q", "output": "a"},
        {"input": "one\nBriefly ", "output": "b"},
        {"text": "two\n Briefly", "answer": "c"},
    ]
    stream = load_stream([{"name": "t", "path": str(write(tmp_path / "a.jsonl", with_splits(rows)))}])
    assert [row.instruction for row in stream[0].train] == ["Be kind.", "Briefly", "Briefly"]
    assert [row.messages[-1][1] for row in stream[0].train] == ["q", "one\nBriefly ", "two\n Briefly"]
    assert any("last line: 'Briefly'" in note for note in stream.notes)
    assert any("system message in 2 rows" in note for note in stream.notes)


def test_the_instruction_of_a_whole_stream(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"input": f"q{n}", "output": "x"} for n in range(10)])
    assert load_stream(tmp_path, instruction="Say x")[0].instructions == ("Say x",)


def test_an_unused_task_instruction_is_noted(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.jsonl", own(10)))
    stream = load_stream([{"name": "t", "path": path, "instruction": "Other"}])
    assert any("not used" in note for note in stream.notes)
    assert stream[0].instructions == ("Say it",)


def test_many_instructions_are_noted(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"instruction": f"do {n}", "input": "", "output": "x"} for n in range(200)])
    assert any("160 distinct instructions in 160 training rows" in note for note in load_stream(tmp_path).notes)


# --- splits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "sizes"), [(2, (1, 0, 1)), (5, (4, 0, 1)), (10, (8, 1, 1)), (99, (79, 10, 10))])
def test_a_split_is_drawn_where_none_is_stated(count: int, sizes: tuple[int, ...], tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", own(count))
    stream = load_stream(tmp_path)
    assert tuple(map(len, (stream[0].train, stream[0].dev, stream[0].test))) == sizes
    assert any("80/10/10 drawn with seed 0" in note for note in stream.notes)
    assert len({row.id for row in all_rows(stream[0])}) == count


def test_the_draw_depends_on_the_seed_and_on_nothing_else(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", own(60))
    alone = load_stream(tmp_path)[0]
    write(tmp_path / "a.jsonl", own(60))
    first, second = load_stream(tmp_path)
    assert second == alone
    assert [row.id for row in first.test] != [row.id.replace("b:", "a:") for row in second.test]
    assert load_stream(tmp_path, seed=1)[1] != alone


def test_split_names(tmp_path: Path) -> None:
    names = ["train", "dev", "validation", "val", "valid", "test"]
    rows = [{**row, "split": name} for row, name in zip(own(6), names, strict=True)]
    stream = load_stream(write(tmp_path / "a.jsonl", rows))
    assert tuple(map(len, (stream[0].train, stream[0].dev, stream[0].test))) == (1, 4, 1)
    assert not any("no split stated" in note for note in stream.notes)


@pytest.mark.parametrize("dev", ["dev", "val", "valid", "validation"])
def test_files_named_after_splits(dev: str, tmp_path: Path) -> None:
    for name, count in (("train", 5), (dev, 2), ("test", 3)):
        write(tmp_path / f"stream/chat/{name}.jsonl", own(count, id=None))
    for source in (tmp_path / "stream", tmp_path / "stream/chat"):
        task = load_stream(source)[0]
        assert (task.name, len(task.train), len(task.dev), len(task.test)) == ("chat", 5, 2, 3)


def test_ids_may_start_anew_in_each_split_file(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write(tmp_path / f"chat/{name}.jsonl", [{**row, "id": n} for n, row in enumerate(own(3))])
    assert [row.id for row in one_task(tmp_path / "chat").test] == ["0", "1", "2"]


def test_shards(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write(tmp_path / f"chat/{name}.jsonl", own(3))
    assert len(one_task(tmp_path / "chat").train) == 6


@pytest.mark.parametrize(
    ("names", "unread"),
    [
        (["train", "train_extra", "test"], ["train_extra"]),
        (["data", "more"], ["more"]),
        (["train", "test", "data", "old"], ["data", "old"]),
    ],
)
def test_data_files_beside_those_of_a_task_are_named(names: list[str], unread: list[str], tmp_path: Path) -> None:
    for name in names:
        write(tmp_path / f"chat/{name}.jsonl", own(10))
    listed = ", ".join(f"{name}.jsonl" for name in unread)
    note = f"chat: data files in {tmp_path / 'chat'} that are not read: {listed}"
    assert note in load_stream(tmp_path).notes
    for name in unread:
        (tmp_path / f"chat/{name}.jsonl").unlink()
    assert not any("not read" in note for note in load_stream(tmp_path).notes)


def test_what_looks_like_data_and_is_no_task_is_named(tmp_path: Path) -> None:
    write(tmp_path / "chat.jsonl", own(10))
    write(tmp_path / "deep" / "data" / "train.jsonl", own(3))
    for name in ("b.csv", "c.jsonl.gz", "D.JSONL", "README.md"):
        (tmp_path / name).write_text("x")
    (tmp_path / "pictures").mkdir()
    stream = load_stream(tmp_path)
    assert [task.name for task in stream] == ["chat"]
    assert f"{tmp_path}: not read as a task: D.JSONL, b.csv, c.jsonl.gz, deep" in stream.notes


def test_no_dev_rows_are_allowed_and_noted(tmp_path: Path) -> None:
    stream = load_stream(write(tmp_path / "a.jsonl", with_splits(own(2))))
    assert stream[0].dev == ()
    assert "a: no dev rows" in stream.notes


# --- folders and lists -----------------------------------------------------------------------------------


def test_a_folder_is_read_alphabetically(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", own(10))
    write(tmp_path / "a/train.jsonl", own(4))
    write(tmp_path / "a/test.jsonl", own(4))
    (tmp_path / "c.json").write_text(json.dumps(own(10)))
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "pictures").mkdir()
    write(tmp_path / ".hidden.jsonl", [])
    assert [task.name for task in load_stream(tmp_path)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "manifest",
    [
        ["b", "a"],
        [{"task": "b", "licence": "CC0"}, {"name": "a"}],
        [{"name": "b", "path": "b.jsonl"}, {"task": "a", "file": "a.jsonl"}],
        {"b": {}, "a": {"source": "here"}},
        {"tasks": {"b": {"file": "b.jsonl"}, "a": {}}},
    ],
)
def test_tasks_json_orders_the_tasks(manifest: Any, tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.jsonl", own(10))
    (tmp_path / "tasks.json").write_text(json.dumps(manifest))
    assert [task.name for task in load_stream(tmp_path)] == ["b", "a"]


def test_tasks_json_gives_instruction_scorer_and_place(tmp_path: Path) -> None:
    write(tmp_path / "sub/x.jsonl", [{"input": f"q{n}", "output": "yes"} for n in range(10)])
    write(tmp_path / "left_out.jsonl", own(10))
    entry = {"task": "a", "path": "sub/x.jsonl", "instruction": "Say yes", "scorer": "rouge_l"}
    (tmp_path / "tasks.json").write_text(json.dumps([entry]))
    stream = load_stream(tmp_path)
    assert (stream[0].instructions, stream[0].scorer) == (("Say yes",), "rouge_l")
    assert any("left_out.jsonl" in note for note in stream.notes)


def test_a_list_of_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "data/x.jsonl", own(10))
    monkeypatch.chdir(tmp_path)
    stream = load_stream([
        {"name": "second", "path": "data/x.jsonl"},
        {"name": "first", "path": "data", "scorer": "rouge_l", "instruction": None},
    ])  # fmt: skip
    assert [(task.name, task.scorer) for task in stream] == [("second", "exact"), ("first", "rouge_l")]


def test_one_file_is_a_stream_of_one_task(tmp_path: Path) -> None:
    assert [task.name for task in load_stream(write(tmp_path / "solo.jsonl", own(10)))] == ["solo"]


def test_bad_rows_are_skipped_listed_and_counted(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in own(12)]
    lines[1] = "{broken"
    lines[4] = json.dumps({"input": "no output"})
    path = tmp_path / "a.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\n{"input": "\xff"}\n')
    stream = load_stream(path, skip_bad_rows=True)
    assert len(all_rows(stream[0])) == 10
    assert "a: 3 rows skipped" in stream.notes
    assert [note.split(" ")[0] for note in stream.notes if str(path) in note] == [
        f"{path}:2:",
        f"{path}:5:",
        f"{path}:13:",
    ]


# --- datasets --------------------------------------------------------------------------------------------


def test_folder_saved_by_datasets_and_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {"train": datasets.Dataset.from_list(own(4)), "validation": datasets.Dataset.from_list(own(2))}
    parts["test"] = datasets.Dataset.from_list(own(3))
    saved = tmp_path / "saved"
    datasets.DatasetDict(parts).save_to_disk(saved)
    task = one_task(saved)
    assert (len(task.train), len(task.dev), len(task.test)) == (4, 2, 3)
    assert task.train[0].messages == (("user", "q0\nSay it"),)

    asked: list[str] = []

    def from_hub(name: str) -> Any:
        asked.append(name)
        return datasets.load_from_disk(saved)

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    task = one_task(Path("owner/name"))
    assert asked == ["owner/name"]
    assert (len(task.train), len(task.dev), len(task.test)) == (4, 2, 3)
    assert task.train[0].source == "owner/name/train:row 1"


@pytest.mark.parametrize("error", ["DatasetNotFoundError", "ValueError", "ConnectionError"])
def test_a_hub_id_that_cannot_be_loaded(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    kind = getattr(datasets.exceptions, error, None) or getattr(__import__("builtins"), error)

    def from_hub(name: str) -> Any:
        raise kind("no such thing")

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    with pytest.raises(UserError, match=r"'owner/nothing' cannot be loaded.*no such thing"):
        one_task(Path("owner/nothing"))


def test_an_unknown_split_of_a_data_set(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"tain": datasets.Dataset.from_list(own(4))}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"unknown split 'tain'\. Did you mean 'train'"):
        one_task(tmp_path / "saved")


def test_loading_twice_gives_the_same(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", own(30))
    assert load_stream(tmp_path) == load_stream(tmp_path)
    assert os.listdir(tmp_path) == ["a.jsonl"]  # nothing is written beside the data
