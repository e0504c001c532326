"""CoIN, COAST and the vision stream: what is read of a download, which groups form, and what `bench prepare` says."""

from __future__ import annotations

import json
import os
import shlex
import tracemalloc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from coin_folder import (
    ANNOTATORS,
    ANSWERS,
    FOLDERS,
    IMAGES,
    INSTRUCTIONS,
    MEASURED,
    ORDERS,
    TEST,
    TRAIN,
    build,
    change,
    test_row,
    train_row,
    write,
)
from lcia import load_stream
from lcia.answering import answer_requests
from lcia.backbone import Reader
from lcia.bench import BENCHMARKS, bench_config
from lcia.errors import UserError
from lcia.export import export_run
from lcia.grouping import Codebook, group_tasks
from lcia.methods import build_method
from lcia.progress import Reporter
from lcia.run import train
from lcia.session import load_run_stream
from lcia.stream import SCORERS, Row, Stream, Task
from lcia.stream import json_list as json_list_module
from lcia.stream.coast import CONFIGURATIONS, read_manifest
from lcia.stream.coin import TASKS, instruction_in, most_common
from lcia.stream.json_list import json_elements
from lcia.stream.task_source import DATA
from lcia.validate import planned_groups
from tiny_vision import tiny_llava

SHARED = Path(os.environ.get("LCIA_SHARED", Path(__file__).parents[1] / ".." / "shared"))
VISION = SHARED / "data/vision_stream"
KINDS = tuple(FOLDERS)
THRESHOLDS = {"origin": 0.9, "diverse": 0.3, "10type": 0.3}  # the paper's
SHORT = {"TextVQA", "GQA", "VizWiz", "VQAv2", "OCR-VQA"}
ALONE = [{"ScienceQA"}, {"ImageNet"}, {"Grounding"}]
TABLE_10 = {
    "origin": [*ALONE, SHORT],
    "diverse": [*ALONE, {"TextVQA", "VizWiz"}, {"GQA", "VQAv2", "OCR-VQA"}],
    "10type": [*ALONE, SHORT],
}
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A download that is complete. Tests that change something build their own."""
    return build(tmp_path_factory.mktemp("coin"), KINDS)


def load(folder: Path, *tasks: str, skip_bad_rows: bool = False, **options: Any) -> Stream:
    source = {"name": "coin", "path": str(folder), **options}
    return load_stream(source, tasks=tasks or None, skip_bad_rows=skip_bad_rows)


def groups_of(stream: Stream, threshold: float) -> list[set[str]]:
    joined = group_tasks({task.name: task.instructions for task in stream}, Codebook(threshold))
    return [{task for task, group in joined.items() if group == one} for one in sorted(set(joined.values()))]


def all_rows(task: Task) -> tuple[Any, ...]:
    return (*task.train, *task.dev, *task.test)


# --- orders, instructions, groups


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_and_kind_loads_and_groups_as_in_table_10(whole: Path, order: str, kind: str) -> None:
    stream = load(whole, order=order, instructions=kind)
    assert [task.name for task in stream] == ORDERS[order]
    assert stream.notes[0] == f"coin: order {order}, instructions {kind}, scoring strict"
    for task in stream:
        # those of training rows, in order of appearance
        assert task.instructions == tuple(INSTRUCTIONS[task.name][kind][:TRAIN])
        assert {row.instruction for row in task.test} <= set(task.instructions)
        assert (len(task.train), len(task.dev), len(task.test)) == (TRAIN, 0, TEST)
    groups = groups_of(stream, THRESHOLDS[kind])
    assert sorted(map(sorted, groups)) == table_10(order, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ORDERS)
def test_a_benchmark_run_plans_the_groups_of_table_10(whole: Path, order: str, kind: str) -> None:
    """With the threshold that the benchmark gives its method: nobody has to know that it depends on the kind."""
    config = bench_config("coin", "lcia", order, data=str(whole), options={"instructions": kind})
    codebook = build_method(config.method_parts()).codebook
    assert codebook is not None
    assert codebook.threshold == THRESHOLDS[kind]
    planned = planned_groups(load_run_stream(config), codebook)
    assert partition({task: group for task, (group, _) in planned.items()}) == table_10(order, kind)


def partition(joined: Mapping[str, str]) -> list[list[str]]:
    """The groups of {task: group}, sorted."""
    return sorted(sorted(task for task in joined if joined[task] == group) for group in set(joined.values()))


def table_10(order: str, kind: str) -> list[list[str]]:
    """The paper's, but for reverse with diverse, where VizWiz joins OCR-VQA (tests/test_grouping.py)."""
    groups = [*ALONE, SHORT] if (order, kind) == ("reverse", "diverse") else TABLE_10[kind]
    return sorted(map(sorted, groups))


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("lcia", {"instructions": "diverse"}, {"name": "lcia", "threshold": 0.3}),
        ("lcia", {"instructions": "10type"}, {"name": "lcia", "threshold": 0.3}),
        ("lcia", {"instructions": "origin"}, "lcia"),
        ("lcia", {}, "lcia"),
        ("lora", {"instructions": "diverse"}, "lora"),
        ("eproj", {"instructions": "diverse"}, "eproj"),  # its groups are not made of instructions' words
        ("{name: lcia, threshold: 0.5}", {"instructions": "diverse"}, {"name": "lcia", "threshold": 0.5}),
        (
            "{name: lcia, rule: fisher}",
            {"instructions": "diverse"},
            {"name": "lcia", "rule": "fisher", "threshold": 0.3},
        ),
        ("[lcia, ewc]", {"instructions": "10type"}, [{"name": "lcia", "threshold": 0.3}, "ewc"]),
    ],
)
def test_the_threshold_is_that_of_the_kind_where_the_user_names_none(
    method: str, options: dict[str, str], expected: Any
) -> None:
    assert bench_config("coin", method, options=options).method == expected


def test_coast_of_coins_instructions_gets_their_threshold(tmp_path: Path) -> None:
    own = {"name": "mine", "version": 1, "reconstruction": True, "coin": {"instructions": "Diverse"}}
    write(tmp_path / "dataset.yaml", {**own, "tasks": [{"name": "GQA"}]})
    config = bench_config("coast", "lcia", data=str(tmp_path), options={"configuration": "dataset"})
    assert config.method == {"name": "lcia", "threshold": 0.3}
    assert bench_config("coast", "lcia", data=str(tmp_path)).method == "lcia"  # rows of its own


def test_a_method_or_stream_over_the_protocol_gets_its_threshold_too() -> None:
    stream = "stream={name: coin, instructions: 10Type}"
    config = bench_config("coin", "lora", overrides=["method=lcia", stream])
    assert config.method == {"name": "lcia", "threshold": 0.3}
    assert bench_config("coin", "lcia", overrides=["stream=assistant"]).method == "lcia"


def test_reverse_and_diverse_bring_vizwiz_to_ocr_vqa(whole: Path) -> None:
    book = Codebook(0.3)
    for task in load(whole, order="reverse", instructions="diverse"):
        match = book.match(task.instructions)
        if task.name == "VizWiz":
            assert (match.group, round(match.score, 3)) == ("OCR-VQA", 0.320)
        book.add(match.group or task.name, task.instructions)
    assert len(book.groups) == 4


@pytest.mark.skipif(not (SHARED / "paper/instructions.json").exists(), reason="the paper's tables are absent")
def test_orders_and_instructions_are_the_papers() -> None:
    paper = json.loads((SHARED / "paper/instructions.json").read_text())
    assert paper["orders"] == ORDERS
    names = {"origin": "original", "diverse": "diverse", "10type": "10type"}
    for task, by_kind in INSTRUCTIONS.items():
        assert {kind: paper["instructions"][task][names[kind]] for kind in KINDS} == by_kind


@pytest.mark.parametrize("spelt", ["10Type", "10type", "10TYPE"])
def test_case_of_options_does_not_matter(whole: Path, spelt: str) -> None:
    assert load(whole, "GQA", instructions=spelt, order="Reverse")[0].instructions[0].startswith("Respond to the")
    assert load(whole, "GQA", instructions="original") == load(whole, "GQA", instructions="origin")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": "backwards"}, "'order' is one of origin, reverse, alphabet, not 'backwards'"),
        ({"instructions": "divers"}, "'instructions' is one of origin, diverse, 10type"),
        ({"scoring": "loose"}, "'scoring' is one of strict, released"),
        ({"dev_share": 1}, "'dev_share' is a number from 0 to under 1"),
        ({"kind": "origin"}, "coin has no option 'kind'"),
        ({"path": "no/such/folder"}, "not a folder"),
    ],
)
def test_mistakes_in_options_are_named(whole: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_stream({"name": "coin", "path": str(whole), **options})


# --- rows


def test_rows_are_what_the_files_say(whole: Path) -> None:
    for task in load(whole):
        assert task.scorer == TASKS[task.name].strict
        train, test = task.train[1], task.test[1]
        image = str((whole / "cl_dataset" / IMAGES[task.name] / "1.png").resolve())
        asked = task.instructions[0]
        ending = f"{asked}: object 1" if task.name == "Grounding" else f"Question 1 of {task.name}?\n{asked}."
        assert train.messages == (("user", ending),)  # the marker is gone: images stand before the text
        assert (train.id, train.images, train.outputs) == (f"{task.name}-1", (image,), (ANSWERS[task.name],))
        assert (test.id, test.images, test.outputs) == ("1001", (image,), (ANSWERS[task.name],))
        assert test.source.endswith(f"{MEASURED[task.name]}.json: element 2")
        assert all(SCORERS[task.scorer](row.outputs[0], row.outputs) == 1.0 for row in all_rows(task))
    science = load(whole, "ScienceQA")[0]
    assert [bool(row.images) for row in science.train[:4]] == [False, True, True, False]


def test_three_tasks_are_measured_on_val_and_the_others_on_test(whole: Path, tmp_path: Path) -> None:
    root = build(tmp_path)
    for task in IMAGES:
        other = {"val": "test", "test": "val"}[MEASURED[task]]
        write(root / "Instructions" / task / f"{other}.json", [{"broken": "never read"}])
    assert {name for name, split in MEASURED.items() if split == "val"} == {"TextVQA", "VizWiz", "VQAv2"}
    assert [[row.id for row in task.test] for task in load(root)] == [["1000", "1001", "1002"]] * 8


@pytest.mark.parametrize("home", ["", "playground"])
@pytest.mark.parametrize("name", ["Instructions", "Instructions_Original", "Instructions_Type1"])
def test_the_hubs_own_names_are_understood(tmp_path: Path, name: str, home: str) -> None:
    root = build(tmp_path)
    (root / "Instructions/OCR-VQA").rename(root / "Instructions/OCRVQA")
    (root / "Instructions").rename(root / "moved")
    (root / home).mkdir(exist_ok=True)
    (root / "moved").rename(root / home / name)
    stream = load(root)
    assert [len(task.train) for task in stream] == [TRAIN] * 8
    assert stream[7].name == "OCR-VQA"


def test_images_may_lie_beside_the_instructions(tmp_path: Path) -> None:
    root = build(tmp_path)
    for folder in (root / "cl_dataset").iterdir():
        folder.rename(root / folder.name)
    (root / "cl_dataset").rmdir()
    assert load(root, "GQA")[0].train[0].images


@pytest.mark.parametrize("linked", ["COCO2014", "COCO2014/train2014"])
def test_data_sets_may_be_linked_in(whole: Path, tmp_path: Path, linked: str) -> None:
    """Who has COCO already links it; a link deeper down, which a download could bring, is not followed."""
    root = build(tmp_path / "coin")
    elsewhere = tmp_path / "elsewhere"
    (root / "cl_dataset" / linked).rename(elsewhere)
    (root / "cl_dataset" / linked).symlink_to(elsewhere)
    task = load(root, "VQAv2", dev_share=0.25)[0]
    assert {Path(image).is_relative_to(elsewhere.resolve()) for row in task.train for image in row.images} == {True}
    usual = load(whole, "VQAv2", dev_share=0.25)[0]
    assert [row.id for row in task.dev] == [row.id for row in usual.dev]
    images = root / "cl_dataset/GQA/images"
    (images / "1.png").rename(tmp_path / "secret.png")
    (images / "1.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match=r"'GQA/images/1\.png' leaves its folder"):
        load(root, "GQA")


def test_answers_come_from_the_annotators_where_rows_have_none(tmp_path: Path) -> None:
    root = build(tmp_path)
    for task in ("ScienceQA", "TextVQA", "GQA"):
        change(root / "Instructions" / task / f"{MEASURED[task]}.json", *[{"answer": None}] * TEST)
    questions = [str(1000 + n) for n in range(TEST)]
    write(
        root / "cl_dataset/ScienceQA/problems.json", {q: {"answer": n, "choices": []} for n, q in enumerate(questions)}
    )
    write(root / "cl_dataset/GQA/testdev_balanced_questions.json", {q: {"answer": f"a{q}"} for q in questions})
    science, text, gqa = load(root, "ScienceQA", "TextVQA", "GQA")
    assert [row.outputs for row in science.test] == [("A",), ("B",), ("C",)]
    assert [row.outputs for row in gqa.test] == [(f"a{question}",) for question in questions]
    assert [row.outputs for row in text.test] == [("Nokia",)] * TEST  # what most of them said, as the first wrote it


def test_released_textvqa_has_all_ten_answers(whole: Path, tmp_path: Path) -> None:
    text = load(whole, "TextVQA", scoring="released")[0]
    assert (text.scorer, text.test[0].outputs) == ("coin_textvqa_released", tuple(ANNOTATORS))
    root = build(tmp_path)
    (root / "cl_dataset/TextVQA/TextVQA_0.5.1_val.json").unlink()
    with pytest.raises(UserError, match=r"TextVQA_0\.5\.1_val\.json does not exist: its answers are needed"):
        load(root, "TextVQA", scoring="released")
    assert load(root, "TextVQA")[0].test[0].outputs == ("nokia",)  # strict: the row's own
    ten = [{"answer": ANNOTATORS}] * TEST
    change(root / "Instructions/TextVQA/val.json", *ten)
    assert load(root, "TextVQA", scoring="released")[0].test[0].outputs == tuple(ANNOTATORS)
    assert load(root, "TextVQA")[0].test[0].outputs == ("Nokia",)
    write(root / "cl_dataset/TextVQA/TextVQA_0.5.1_val.json", {"questions": []})
    change(root / "Instructions/TextVQA/val.json", *[{"answer": "nokia"}] * TEST)
    with pytest.raises(UserError, match="not the annotation file of TextVQA"):
        load(root, "TextVQA", scoring="released")


@pytest.mark.parametrize("name", TASKS)
def test_released_scorers_are_those_of_the_task(whole: Path, name: str) -> None:
    task = load(whole, name, scoring="released")[0]
    assert task.scorer == TASKS[name].released
    assert task.scorer.endswith("_released")


# --- as users have it


def test_a_question_id_that_comes_again_is_scored_again(tmp_path: Path) -> None:
    root = build(tmp_path)
    change(root / "Instructions/VizWiz/val.json", {}, {"question_id": 1000}, {"question_id": 1000})
    stream = load(root, "VizWiz")
    assert [row.id for row in stream[0].test] == ["1000", "1000@val:2", "1000@val:3"]
    assert "VizWiz: 2 question ids in val.json come again; their place is appended" in stream.notes


def test_an_id_that_names_the_image_may_repeat_in_training(tmp_path: Path) -> None:
    root = build(tmp_path)
    change(root / "Instructions/VQAv2/train.json", {"id": 7}, {"id": 7}, {"id": None})
    ids = [row.id for row in load(root, "VQAv2")[0].train]
    assert (ids[:3], len(set(ids))) == (["7", "7@train:2", "train:3"], TRAIN)


def test_answers_that_are_numbers_are_read_as_text_and_counted(tmp_path: Path) -> None:
    root = build(tmp_path)
    change(root / "Instructions/VQAv2/val.json", {"answer": 2}, {"answer": 2.5})
    rows = json.loads((root / "Instructions/VQAv2/train.json").read_text())
    rows[0]["conversations"][1]["value"] = 7
    write(root / "Instructions/VQAv2/train.json", rows)
    change(root / "Instructions/Grounding/test.json", {"answer_bbox": [0.1, 0.2, 0.3, 0.4]})
    stream = load(root, "VQAv2", "Grounding")
    assert [row.outputs for row in stream[0].test] == [("2",), ("2.5",), ("2",)]
    assert stream[0].train[0].outputs == ("7",)
    assert "VQAv2: 2 answers in val.json are numbers, read as text" in stream.notes
    assert "VQAv2: 1 answers in train.json are numbers, read as text" in stream.notes
    assert stream[1].test[0].outputs == ("[0.1, 0.2, 0.3, 0.4]",)
    change(root / "Instructions/VQAv2/val.json", {"answer": True})
    with pytest.raises(UserError, match=r"val\.json: element 1: 'answer' must be a text"):
        load(root, "VQAv2")


def test_markers_in_questions_are_taken_out(tmp_path: Path) -> None:
    root = build(tmp_path)
    asked = "<image>\nWhat?\nAnswer the question using a single word or phrase."
    change(root / "Instructions/GQA/test.json", {"text": asked})
    assert load(root, "GQA")[0].test[0].messages == (("user", asked.removeprefix("<image>\n")),)
    change(root / "Instructions/GQA/test.json", {"image": None})
    with pytest.raises(UserError, match=r"element 1: 1 <image> markers in the text, but 0 images"):
        load(root, "GQA")


def test_a_missing_image_names_its_row_or_is_skipped_and_counted(tmp_path: Path) -> None:
    root = build(tmp_path)
    (root / "cl_dataset/GQA/images/2.png").unlink()
    with pytest.raises(UserError, match=r"GQA/train\.json: element 3: image 'GQA/images/2\.png' does not exist"):
        load(root, "GQA")
    stream = load(root, "GQA", skip_bad_rows=True)
    assert (len(stream[0].train), len(stream[0].test)) == (TRAIN - 3, TEST - 1)
    assert "GQA: 4 rows skipped" in stream.notes


def test_what_is_missing_matters_only_to_its_own_task(tmp_path: Path) -> None:
    root = build(tmp_path)
    (root / "Instructions/VizWiz/val.json").unlink()
    assert len(load(root, "GQA", "VQAv2")) == 2
    with pytest.raises(UserError, match=r"VizWiz/val\.json does not exist; `lcia bench prepare coin --data"):
        load(root)


@pytest.mark.parametrize("order", ORDERS)
def test_tasks_are_taken_in_the_users_order(whole: Path, order: str) -> None:
    assert [task.name for task in load(whole, "VQAv2", "GQA", order=order)] == ["VQAv2", "GQA"]


def test_rows_with_an_instruction_of_their_own_wording(tmp_path: Path) -> None:
    root = build(tmp_path)
    plain = "Answer the question using a single word or phrase."
    change(root / "Instructions/ImageNet/test.json", {"text": f"What is it?\n{plain}"})
    change(root / "Instructions/Grounding/test.json", {"text": "Where is this: a dog: the left one"})
    stream = load(root, "ImageNet", "Grounding")
    assert stream[0].test[0].instruction == plain.rstrip(".")
    assert stream[1].test[0].instruction == "Where is this"
    assert any(
        note.startswith("ImageNet: 1 of 3 rows hold no instruction that is listed for origin") for note in stream.notes
    )


def test_conversations_of_several_questions(tmp_path: Path) -> None:
    """LLaVA writes the instruction behind the first question only."""
    root = build(tmp_path)
    rows = json.loads((root / "Instructions/GQA/train.json").read_text())
    rows[1]["conversations"] += [{"from": "human", "value": "And now?"}, {"from": "gpt", "value": "right"}]
    write(root / "Instructions/GQA/train.json", rows)
    stream = load(root, "GQA")
    row = stream[0].train[1]
    assert row.messages[1:] == (("assistant", "left"), ("user", "And now?"))
    assert (row.outputs, row.instruction) == (("right",), INSTRUCTIONS["GQA"]["origin"][0])
    assert row.every_answer  # tests/test_conversations.py
    assert any(note.startswith("GQA: 1 of 12 training rows ask several questions") for note in stream.notes)


def test_the_last_and_longest_instruction_counts() -> None:
    known = ["Answer shortly", "Answer shortly with a word", "Name it"]
    assert instruction_in("Q?\nanswer SHORTLY with a word.", known) == known[1]
    assert instruction_in("Name it\nQ?\nAnswer shortly.", known) == known[0]
    assert instruction_in("Answer shortly with a word\nQ?\nName it.", known) == known[2]
    assert instruction_in("the option’s letter", ["the option's letter"]) == "the option's letter"
    assert instruction_in("Say it", known) is None


def test_most_common() -> None:
    assert most_common(["The cat", "dog", "cat", "DOG.", "a cat"]) == "The cat"
    assert most_common(["b", "a"]) == "b"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1", "git-lfs pointer"),
        ("<!doctype html><title>404</title>", "a web page, not JSON"),
        ('{"a": 1}', "must be a JSON list of rows"),
        ("[]", "holds no rows"),
        ('[{"a": 1}, {"conversations": [{"from": "hum', "ends inside element 2: an incomplete download?"),
        ('[{"a": 1}, {"b": tru', "ends inside element 2"),
        ('[{"a": 1}, ', "ends inside element 2"),
        ('[{"a": 1}', "ends behind element 1, inside its list"),
        ('[{"a": 1}, {"b": bad, "c": "and a lot more text"}]', "broken JSON in element 2"),
        ('[{"a": 1} {"b": 2}]', "expected ',' or ']' behind element 1"),
        ('[{"a": 1}] x', "text behind the end of the list"),
        ("[" * 100_000, "nested too deeply"),
        ("[" + "9" * 10_000 + "]", "element 1"),
        ('[{"a": 1}, {"b": NaN}]', "element 2: NaN is not a JSON value"),
        ('[{"a": [-Infinity]}]', "element 1: -Infinity is not a JSON value"),
        ('[{"a": {"b": 1, "c": 2, "b": 3}}]', "element 1: the key 'b' appears twice in one object"),
    ],
    ids=range(17),
)
def test_files_that_are_no_list_of_rows(tmp_path: Path, content: str, message: str) -> None:
    root = build(tmp_path)
    file = root / "Instructions/GQA/train.json"
    file.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load(root, "GQA", skip_bad_rows="a list" not in message)
    assert "GQA/train.json" in str(error.value)


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    root = build(tmp_path)
    (root / "Instructions/GQA/train.json").write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(UserError, match=r"train\.json: not UTF-8"):
        load(root, "GQA")


# --- reading cheaply


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(JSON, max_size=6), st.integers(1, 40), st.booleans(), st.sampled_from([None, 2]))
@settings(deadline=None, derandomize=True, max_examples=80)
def test_elements_are_jsons_own_whatever_the_chunk(content: list[Any], chunk: int, ascii: bool, indent: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_list_module, "CHUNK", chunk)
        file = Path(os.environ["LCIA_CACHE"]) / "elements.json"
        file.write_text(" \n" + json.dumps(content, ensure_ascii=ascii, indent=indent) + "\n", encoding="utf-8")
        assert list(json_elements(file)) == list(enumerate(content, start=1))


def test_a_large_list_is_never_held_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_list_module, "CHUNK", 1 << 14)
    file = write(tmp_path / "large.json", [{"text": "x" * 1000}] * 8000)
    assert file.stat().st_size > 8_000_000
    tracemalloc.start()
    count = sum(1 for _ in json_elements(file))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 8000
    assert peak < 500_000


def test_no_image_is_opened_and_limits_hold(
    whole: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: Callable[..., Any]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", refuse)
    source = {"name": "coin", "path": str(whole), "order": "alphabet"}
    stream = load_run_stream(tiny_config(stream=source, max_train_examples=5, max_eval_examples=2, tasks=None))
    assert [(len(task.train), len(task.test)) for task in stream] == [(5, 2)] * 8


# --- dev rows


def test_dev_rows_are_whole_images_of_the_training_rows(whole: Path) -> None:
    stream = load(whole, "ScienceQA", "VQAv2", dev_share=0.25)
    without = load(whole, "ScienceQA", "VQAv2")
    for task, before in zip(stream, without, strict=True):
        assert 0 < len(task.dev) < len(before.train)
        assert task.test == before.test
        assert sorted((*task.train, *task.dev), key=lambda row: int(row.id.split("-")[1])) == list(before.train)
        assert not {row.images or row.messages for row in task.train} & {row.images or row.messages for row in task.dev}
    vqa = stream[1]
    assert len(vqa.dev) == 3  # one of its four images, three questions each
    drawn = f"VQAv2: no dev rows stated, so 3 of {TRAIN} training rows drawn with seed 0, whole images at a time"
    assert f"{drawn}; none from test" in stream.notes
    assert load(whole, "ScienceQA", "VQAv2", dev_share=0.25) == stream


def test_dev_rows_depend_on_content_and_seed_only(whole: Path, tmp_path: Path) -> None:
    """Not on where the download lies; and two tasks on the same images take the same ones."""
    elsewhere = build(tmp_path / "another/place")
    seeds = []
    for seed in range(12):
        drawn = []
        for root in (whole, elsewhere):
            source = {"name": "coin", "path": str(root), "dev_share": 0.25}
            for task in load_stream(source, tasks=["VQAv2", "Grounding"], seed=seed):
                drawn.append({Path(image).name for row in task.dev for image in row.images})
        assert drawn[0] == drawn[1] == drawn[2] == drawn[3]
        seeds.append(tuple(sorted(drawn[0])))
    assert len(set(seeds)) > 1


def test_a_task_on_one_image_has_no_dev_rows(tmp_path: Path) -> None:
    root = build(tmp_path)
    change(root / "Instructions/GQA/train.json", *[{"image": "GQA/images/0.png"}] * TRAIN)
    assert load(root, "GQA", dev_share=0.5)[0].dev == ()


# --- the vision stream


def vision_folder(root: Path) -> Path:
    shapes = {
        "eurosat_mcq": "B",
        "clothing_cls": "t-shirt",
        "coco_vqa": "2",
        "bccd_ground": "[0.10, 0.20, 0.50, 0.90]",
        "sroie_ocr": "TOTAL: 5.00",
        "nlvr_tf": "true",
        "coco_ground": "[0.1, 0.1, 0.9, 0.9]",
    }
    for task, answer in shapes.items():
        home = "coco" if task.startswith("coco") else task
        (root / home / "images").mkdir(parents=True, exist_ok=True)
        rows = []
        for number in range(12):
            image = f"{home}/images/{number}.png"
            Image.new("RGB", (4, 4)).save(root / image)
            row = {"id": str(number), "image": image, "instruction": f"Do {task}", "input": "q", "output": answer}
            rows.append({**row, "split": "test" if number % 4 == 3 else "train"})
        (root / task).mkdir(exist_ok=True)
        (root / task / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


VISION_SCORERS = {
    "eurosat_mcq": "option_letter",
    "clothing_cls": "exact",
    "coco_vqa": "vqa_short",
    "bccd_ground": "box_iou",
    "sroie_ocr": "ocr",
    "nlvr_tf": "true_false",
}


def test_vision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = vision_folder(tmp_path / "vision_stream")
    stream = load_stream({"name": "vision", "path": str(root)})
    assert {task.name: task.scorer for task in stream} == VISION_SCORERS
    assert [task.name for task in stream] == list(VISION_SCORERS)
    for task in stream:
        assert (len(task.train), len(task.dev), len(task.test)) == (8, 1, 3)
        assert {int(row.id) % 4 for row in task.test} == {3}  # dev rows are none of them
        assert all(SCORERS[task.scorer](row.outputs[0], row.outputs) == 1.0 for row in all_rows(task))
        assert any(
            note.startswith(f"{task.name}: no dev rows stated, so 1 of 9 training rows") for note in stream.notes
        )
    named = load_stream({"name": "vision", "path": str(root), "dev_share": 0}, tasks=["coco_ground", "nlvr_tf"])
    assert [(task.name, task.scorer, len(task.dev)) for task in named] == [
        ("coco_ground", "box_iou", 0),
        ("nlvr_tf", "true_false", 0),
    ]
    monkeypatch.setenv("LCIA_DATA", str(tmp_path))
    assert load_stream("vision") == stream
    root.rename(tmp_path / "vision")
    assert len(load_stream("vision")) == 6
    monkeypatch.delenv("LCIA_DATA")
    with pytest.raises(UserError, match="the data of vision do not come with lcia"):
        load_stream("vision")


@pytest.mark.parametrize(
    ("task", "answer", "message"),
    [
        ("bccd_ground", "somewhere left", "names no box"),
        ("nlvr_tf", "perhaps", "names neither true nor false"),
        ("eurosat_mcq", "forest", "names no option A-Z"),
    ],
)
def test_answers_that_cannot_be_scored_are_named(
    lcia: Run, tmp_path: Path, task: str, answer: str, message: str
) -> None:
    root = vision_folder(tmp_path)
    file = root / task / "data.jsonl"
    lines = file.read_text().splitlines()
    lines[4] = json.dumps({**json.loads(lines[4]), "output": answer})
    file.write_text("\n".join(lines))
    source = {"name": "vision", "path": str(root)}
    with pytest.raises(UserError, match=message) as error:
        load_stream(source)
    assert f"{file}:5" in str(error.value)
    stream = load_stream(source, tasks=[task], skip_bad_rows=True)
    assert (len(stream[0].train), len(stream[0].dev), len(stream[0].test)) == (7, 1, 3)
    assert f"{task}: 1 rows skipped" in stream.notes
    found = tasks_of(json.loads(lcia("bench", "prepare", "vision", "--data", root, "--json")[1]))[task]
    assert (found["state"], found["rows"]) == ("partly", {"train": 8, "test": 3})
    assert message in found["files"][0]["problem"]


@pytest.mark.skipif(not VISION.is_dir(), reason="the shared data are absent")
def test_the_real_vision_stream() -> None:
    stream = load_stream({"name": "vision", "path": str(VISION)}, tasks=[*VISION_SCORERS, "coco_ground"])
    sizes = {task.name: (len(task.train) + len(task.dev), len(task.test)) for task in stream}
    assert sizes == {
        "eurosat_mcq": (450, 150),
        "clothing_cls": (400, 144),
        "coco_vqa": (185, 70),
        "bccd_ground": (356, 84),
        "sroie_ocr": (450, 150),
        "nlvr_tf": (450, 150),
        "coco_ground": (61, 22),
    }
    for task in stream:
        parts = [{image for row in rows for image in row.images} for rows in (task.train, task.dev, task.test)]
        assert all(parts)
        assert sum(map(len, parts)) == len(parts[0] | parts[1] | parts[2])  # no image in two splits
        assert all(SCORERS[task.scorer](row.outputs[0], row.outputs) == 1.0 for row in all_rows(task))


# --- COAST


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_manifests_are_versioned_reconstructions(configuration: str) -> None:
    manifest = read_manifest(DATA / f"coast/{configuration}.yaml")
    assert (manifest.version, manifest.reconstruction) == (1, True)
    names = [task.name for task in manifest.tasks]
    assert (
        names
        == {
            "domain": ["ChartQA", "DocVQA", "IconQA", "PathVQA"],
            "capability": ["conversation", "detailed_description", "complex_reasoning"],
            "dataset": ORDERS["origin"],
        }[configuration]
    )
    assert all(task.scorer in (None, *SCORERS) for task in manifest.tasks)


def own_rows(count: int, split: str, image: str) -> list[dict[str, Any]]:
    return [{"input": f"{split} q{n}?", "output": f"a{n}", "image": image} for n in range(count)]


def coast_folder(root: Path) -> Path:
    for task in ("ChartQA", "DocVQA", "IconQA", "PathVQA"):
        (root / task).mkdir(parents=True)
        for split, count in (("train", 30), ("test", 6)):
            write(root / task / f"{split}.json", own_rows(count, split, f"{split}.png"))
            Image.new("RGB", (4, 4)).save(root / task / f"{split}.png")
    return root


def test_domains(tmp_path: Path) -> None:
    stream = load_stream({"name": "coast", "path": str(coast_folder(tmp_path))})
    assert [(task.name, task.scorer, len(task.train), len(task.test)) for task in stream] == [
        (name, "exact", 30, 6) for name in ("ChartQA", "DocVQA", "IconQA", "PathVQA")
    ]  # one image in all training rows: none can become dev rows
    assert "version 1, a reconstruction" in stream.notes[0]
    assert "nothing here is comparable with published COAST numbers" in stream.notes[0]


def test_a_manifest_in_the_data_folder_comes_first(tmp_path: Path) -> None:
    root = coast_folder(tmp_path)
    own = {
        "name": "mine",
        "version": 3,
        "reconstruction": True,
        "tasks": [
            {
                "name": "Charts",
                "rows": "ChartQA",
                "instruction": "Answer",
                "scorer": "vqa_short",
                "train": 7,
                "test": 4,
            },
            {"name": "Icons", "rows": "IconQA/train.json", "images": "IconQA", "instruction": "Answer", "dev": 2},
        ],
    }
    write(root / "domain.yaml", own)  # JSON is YAML
    stream = load_stream({"name": "coast", "path": str(root), "configuration": "domain"})
    assert [(task.name, len(task.train), len(task.dev), len(task.test)) for task in stream] == [
        ("Charts", 7, 0, 4),
        ("Icons", 24, 2, 3),
    ]
    assert "mine, version 3" in stream.notes[0]
    assert "Charts: train: 7 of 30 rows drawn" in stream.notes
    assert stream == load_stream({"name": "coast", "path": str(root)})
    write(root / "domain.yaml", {**own, "tasks": [{**own["tasks"][0], "train": 29}]})  # type: ignore[index,dict-item]
    larger = load_stream({"name": "coast", "path": str(root)})[0]
    assert len(larger.train) == 29


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": None}, "version: Input should be a valid integer"),
        ({"version": 0}, "version: Input should be greater than or equal to 1"),
        ({"reconstruction": False}, "reconstruction: Input should be True"),
        ({"tasks": []}, "tasks: List should have at least 1 item"),
        ({"tusks": 1}, "Did you mean 'tasks'?"),
        ({"tasks": [{"name": "a", "rows": "ChartQA", "trian": 3}]}, "Did you mean 'train'?"),
        ({"tasks": [{"name": "a", "rows": "ChartQA", "train": 0}]}, r"tasks\.0\.train: Input should be greater"),
        ({"tasks": [{"name": "a"}]}, "task 'a' has no 'rows'"),
        ({"coin": {}, "tasks": [{"name": "VQA2"}]}, "Did you mean 'VQAv2'?"),
        ({"coin": {}, "tasks": [{"name": "VQAv2", "scorer": "exact"}]}, "'scorer' is CoIN's"),
        ({"coin": {"scorng": "x"}}, "Did you mean 'scoring'?"),
    ],
)
def test_manifests_that_are_wrong(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    good = {"name": "x", "version": 1, "reconstruction": True, "tasks": [{"name": "a", "rows": "ChartQA"}]}
    file = write(tmp_path / "domain.yaml", {**good, **changed})
    with pytest.raises(UserError, match=message) as error:
        load_stream({"name": "coast", "path": str(tmp_path)})
    assert str(file) in str(error.value)


def test_a_manifest_that_is_no_yaml(tmp_path: Path) -> None:
    (tmp_path / "domain.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"domain\.yaml: not valid YAML"):
        load_stream({"name": "coast", "path": str(tmp_path)})
    tasks = [{"name": "GQA"}]
    coins = {"name": "x", "version": 1, "reconstruction": True, "coin": {"scoring": "loose"}, "tasks": tasks}
    write(tmp_path / "dataset.yaml", coins)
    with pytest.raises(UserError, match="'scoring' is one of strict, released, not 'loose'"):
        load_stream({"name": "coast", "path": str(tmp_path), "configuration": "dataset"})
    with pytest.raises(UserError, match="'configuration' is one of domain, capability, dataset"):
        load_stream({"name": "coast", "path": str(tmp_path), "configuration": "domains"})


def test_capabilities(tmp_path: Path) -> None:
    """LLaVA-Instruct's files: conversations without a common instruction, ids that name the image, no splits."""
    (tmp_path / "train2017").mkdir()
    for number in range(20):
        Image.new("RGB", (4, 4)).save(tmp_path / f"train2017/{number}.png")
    for file in ("conversation_58k.json", "detail_23k.json", "complex_reasoning_77k.json"):
        rows = []
        for number in range(20):
            turns = [{"from": "human", "value": f"Why {number}?\n<image>"}, {"from": "gpt", "value": "So it is."}]
            rows.append({"id": "same", "image": f"{number}.png", "conversations": turns})
        write(tmp_path / file, rows)
    stream = load_stream({"name": "coast", "path": str(tmp_path), "configuration": "capability"})
    assert [(len(task.train), len(task.dev), len(task.test), task.scorer) for task in stream] == [
        (16, 2, 2, "rouge_l")
    ] * 3
    assert stream[1].instructions == ("Describe the image in detail",)


def test_the_data_sets_are_coins(whole: Path) -> None:
    stream = load_stream({"name": "coast", "path": str(whole), "configuration": "dataset"})
    assert [task.name for task in stream] == ORDERS["origin"]
    assert [task.scorer for task in stream] == [TASKS[name].strict for name in ORDERS["origin"]]


def test_a_task_that_is_not_there_does_not_keep_the_others_back(tmp_path: Path) -> None:
    root = coast_folder(tmp_path)
    (root / "IconQA").rename(root / "elsewhere")
    source = {"name": "coast", "path": str(root)}
    assert len(load_stream(source, tasks=["DocVQA", "PathVQA"])) == 2
    with pytest.raises(UserError, match=r"task 'IconQA': .*IconQA does not exist .*domain\.yaml names it"):
        load_stream(source)


# --- lcia bench


def tasks_of(document: Mapping[str, Any]) -> dict[str, Any]:
    return {task["name"]: task for task in document["tasks"]}


def test_prepare_a_whole_download(lcia: Run, whole: Path) -> None:
    code, out, err = lcia("bench", "prepare", "coin", "--data", whole, "--option", "instructions=diverse", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["can_run"] == ORDERS["origin"]
    for name, task in tasks_of(found).items():
        assert task["state"] == "ready"
        assert [Path(file["path"]).relative_to(whole).parts[0] for file in task["files"]] == [
            "Instructions_Diverse"
        ] * 2
        assert [(file["state"], file["rows"]) for file in task["files"]] == [("there", TRAIN), ("there", TEST)]
        (images,) = task["images"]
        assert (images["folder"], images["referenced"], images["found"]) == (IMAGES[name], 4, 4)
    readable = lcia("bench", "prepare", "coin", "--data", whole)[1]
    assert "8 of 8 tasks ready" in readable
    assert "images COCO2014/train2014: 4 of 4 there" in readable


def test_prepare_says_what_is_missing_and_what_can_run(
    lcia: Run, tmp_path: Path, tiny_config: Callable[..., Any]
) -> None:
    root = build(tmp_path)
    rows = root / "Instructions"
    (rows / "ScienceQA/test.json").unlink()
    text = (rows / "ImageNet/train.json").read_text()
    (rows / "ImageNet/train.json").write_text(text[: len(text) * 2 // 3])
    (rows / "VizWiz/val.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    (root / "cl_dataset/GQA/images/2.png").unlink()
    (root / "cl_dataset/GQA/images/3.png").write_bytes(b"")
    for image in (root / "cl_dataset/OCR-VQA/images").iterdir():
        image.unlink()
    change(rows / "Grounding/test.json", {"answer_bbox": None})
    code, out, err = lcia("bench", "prepare", "coin", "--data", root, "--json")
    assert code == 0, err
    found = json.loads(out)
    tasks = tasks_of(found)
    assert {name: task["state"] for name, task in tasks.items()} == {
        "ScienceQA": "no",
        "TextVQA": "ready",
        "ImageNet": "no",
        "GQA": "partly",
        "VizWiz": "no",
        "Grounding": "partly",
        "VQAv2": "ready",
        "OCR-VQA": "no",
    }
    assert found["can_run"] == ["TextVQA", "GQA", "Grounding", "VQAv2"]
    assert tasks["ScienceQA"]["files"][1]["state"] == "missing"
    cut = tasks["ImageNet"]["files"][0]
    assert cut["state"] == "unreadable"
    assert "ImageNet/train.json: ends inside element" in cut["problem"]
    assert "git-lfs pointer" in tasks["VizWiz"]["files"][1]["problem"]
    (images,) = tasks["GQA"]["images"]
    assert images == {
        "folder": "GQA/images",
        "referenced": 4,
        "found": 2,
        "empty": 1,
        "missing": "GQA/images/2.png",
        "why": f"image 'GQA/images/2.png' does not exist in {root / 'cl_dataset'}",
    }
    assert (tasks["GQA"]["rows"], tasks["GQA"]["rows_without_image"]) == ({"train": 6, "test": 2}, 7)
    bad = tasks["Grounding"]["files"][1]
    assert (bad["rows"], bad["bad_rows"]) == (2, 1)
    assert "test.json: element 1: row without 'answer'" in bad["problem"]
    readable = " ".join(lcia("bench", "prepare", "coin", "--data", root)[1].split())
    for words in (
        "2 of 8 tasks ready: TextVQA, VQAv2; partly: GQA, Grounding",
        "images GQA/images: 2 of 4 there, 1 missing: image 'GQA/images/2.png' does not exist in",
        ", 1 of no bytes: get them again",
        "images OCR-VQA/images: 0 of 4 there",
        "images are opened when a run begins: one that is cut off is found then",
    ):
        assert words in readable
    # what it says can run, runs; with the rows left out that it counted
    for name in found["can_run"]:
        partly = tasks[name]["state"] == "partly"
        source = {"name": "coin", "path": str(root)}
        task = load_run_stream(tiny_config(stream=source, tasks=[name], skip_bad_rows=partly))[0]
        assert {"train": len(task.train), "test": len(task.test)} == tasks[name]["rows"]


def test_prepare_counts_as_missing_what_a_run_would_not_read(lcia: Run, tmp_path: Path) -> None:
    """Such as a link out of the data's folder: the layout of the hub's cache."""
    root = build(tmp_path)
    image = root / "cl_dataset/GQA/images/2.png"
    image.rename(tmp_path / "blob")
    image.symlink_to(tmp_path / "blob")
    code, out, err = lcia("bench", "prepare", "coin", "--data", root, "--json")
    assert code == 0, err
    (images,) = tasks_of(json.loads(out))["GQA"]["images"]
    assert images["missing"] == "GQA/images/2.png"
    assert "leaves its folder" in images["why"]
    with pytest.raises(UserError, match=r"2\.png' leaves its folder"):
        load(root)


def test_prepare_offers_no_task_of_which_no_answer_can_be_scored(lcia: Run, tmp_path: Path) -> None:
    root = build(tmp_path)
    change(root / "Instructions/ScienceQA/test.json", *[{"answer": "N/A"}] * TEST)
    out = lcia("bench", "prepare", "coin", "--data", root, "--json")[1]
    task = tasks_of(json.loads(out))["ScienceQA"]
    assert (task["state"], task["rows"]) == ("no", {"train": TRAIN})
    with pytest.raises(UserError, match=r"the test split is empty .*; 3 rows skipped, the first: .*'N/A' names no opt"):
        load(root, "ScienceQA", skip_bad_rows=True)


def test_prepare_names_a_missing_annotation_file_for_released_scoring(lcia: Run, tmp_path: Path) -> None:
    root = build(tmp_path)
    (root / "cl_dataset/TextVQA/TextVQA_0.5.1_val.json").unlink()
    assert (
        tasks_of(json.loads(lcia("bench", "prepare", "coin", "--data", root, "--json")[1]))["TextVQA"]["state"]
        == "ready"
    )
    out = lcia("bench", "prepare", "coin", "--data", root, "--option", "scoring=released", "--json")[1]
    text = tasks_of(json.loads(out))["TextVQA"]
    assert text["state"] == "no"
    assert "TextVQA_0.5.1_val.json does not exist" in text["files"][1]["problem"]


def test_prepare_ends_with_2_when_nothing_can_run(lcia: Run, tmp_path: Path) -> None:
    code, out, err = lcia("bench", "prepare", "coin", "--data", tmp_path, "--json")
    assert code == 2
    assert "no task of coin can run" in err
    found = json.loads(out)
    assert (found["can_run"], len(found["tasks"])) == ([], 8)
    assert {file["state"] for task in found["tasks"] for file in task["files"]} == {"missing"}
    assert lcia("bench", "prepare", "coin", "--data", tmp_path / "nowhere")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("coyn",), "Did you mean 'coin'?"),
        (("coin", "--option", "instruction=diverse"), "Did you mean 'instructions'?"),
        (("coin", "--option", "instructions=other"), "instructions is one of origin, diverse, 10type"),
        (("coin", "--option", "instructions"), "not key=value"),
        (("vision", "--option", "order=1"), "vision has no option 'order'"),
    ],
)
def test_mistakes_on_the_command_line(lcia: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    code, out, err = lcia("bench", "prepare", *arguments, "--data", tmp_path)
    assert (code, out) == (2, "")
    assert message in err


def test_prepare_vision_and_coast(lcia: Run, tmp_path: Path) -> None:
    root = vision_folder(tmp_path / "vision")
    (root / "nlvr_tf/data.jsonl").unlink()
    (root / "coco/images/3.png").unlink()
    code, out, err = lcia("bench", "prepare", "vision", "--data", root, "--json")
    assert code == 0, err
    states = {name: task["state"] for name, task in tasks_of(json.loads(out)).items()}
    assert states == {
        **dict.fromkeys(VISION_SCORERS, "ready"),
        "nlvr_tf": "no",
        "coco_vqa": "partly",
        "coco_ground": "partly",
    }

    coast = coast_folder(tmp_path / "coast")
    (coast / "DocVQA/test.json").unlink()
    (coast / "IconQA/more.jsonl").touch()
    code, out, _ = lcia("bench", "prepare", "coast", "--data", coast)
    assert code == 0
    assert "that are not read: more.jsonl" in " ".join(out.split())
    assert "3 of 4 tasks ready: ChartQA, IconQA, PathVQA" in " ".join(out.split())
    assert "nothing here is comparable" in " ".join(out.split())
    assert lcia("bench", "prepare", "coast", "--data", coast, "--option", "configuration=capability")[0] == 2


def test_benchmarks_name_options_and_orders_that_their_streams_have(whole: Path, lcia: Run) -> None:
    coin = BENCHMARKS["coin"]
    assert coin.orders == tuple(ORDERS)
    for key, values in coin.options.items():
        for value in values:
            assert load(whole, "GQA", **{key: value})
    assert BENCHMARKS["coast"].options == {"configuration": CONFIGURATIONS}
    listed = json.loads(lcia("bench", "list", "--json")[1])
    assert set(listed) == {"instrdialog", "vision", "coin", "coast"}
    assert "order: origin | reverse | alphabet; instructions: origin" in " ".join(lcia("bench", "list")[1].split())


@pytest.mark.parametrize(
    ("name", "arguments", "stream", "folder"),
    [
        ("coin", {}, {"order": "origin"}, "lcia-origin-seed0"),
        (
            "coin",
            {"order": "reverse", "options": {"instructions": "diverse", "scoring": "released"}, "seed": 2},
            {"order": "reverse", "instructions": "diverse", "scoring": "released"},
            "lcia-reverse-diverse-released-seed2",
        ),
        ("vision", {"data": "here"}, {"path": "here"}, "lcia-seed0"),
        ("coast", {"options": {"configuration": "dataset"}}, {"configuration": "dataset"}, "lcia-dataset-seed0"),
        ("instrdialog", {"order": "2"}, {"order": 2}, "lcia-order2-seed0"),
    ],
)
def test_runs_of_benchmarks(name: str, arguments: dict[str, Any], stream: dict[str, Any], folder: str) -> None:
    config = bench_config(name, "lcia", **arguments)
    assert config.stream == {"name": name, **stream}
    assert config.output_dir == f"runs/bench/{name}/{folder}"


def test_a_run_of_coin(lcia: Run, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["tasks=[Grounding, ScienceQA]", "max_steps=1", "max_eval_examples=2", "max_new_tokens=2", "lora_r=2"]
    command = ["bench", "run", "coin", "--order", "reverse", "--option", "instructions=diverse", "--data", whole]
    model = tiny_llava(tmp_path / "model")
    code, out, err = lcia(*command, "--method", "lora", "--model", model, *small, "dtype=float32")
    assert code == 0, err
    results = json.loads((tmp_path / "runs/bench/coin/lora-reverse-diverse-seed0/results.json").read_text())
    assert results["scorers"] == {"Grounding": "box_iou", "ScienceQA": "option_letter"}
    assert "Avg.ACC" in out


@pytest.mark.parametrize(("order", "kind"), list(zip(ORDERS, ("diverse", "10type", "origin"), strict=True)))
def test_runs_of_coin_form_the_groups_of_table_10(
    lcia: Run, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str, kind: str
) -> None:
    """All eight tasks, learned and measured."""
    monkeypatch.chdir(tmp_path)
    command = ["bench", "run", "coin", "--method", "lcia", "--order", order, "--option", f"instructions={kind}"]
    command += ["--data", whole, "--model", tiny_llava(tmp_path / "model"), "dtype=float32", "lora_r=2"]
    quick = ["max_train_examples=2", "max_steps=1", "max_eval_examples=1", "max_new_tokens=1"]
    code, _, err = lcia(*command, *quick)
    assert code == 0, err
    folder = tmp_path / f"runs/bench/coin/lcia-{order}-{kind}-seed0"
    results = json.loads((folder / "results.json").read_text())
    assert results["tasks"] == ORDERS[order]
    assert partition(results["groups"]) == table_10(order, kind)
    assert {path.name for path in (folder / "pool").iterdir()} == set(results["groups"].values())
    assert None not in results["matrix"][-1]
    prompt = json.loads((folder / "predictions/8" / f"{ORDERS[order][0]}.jsonl").read_text().splitlines()[0])["prompt"]
    assert prompt.startswith("<|system|>A chat between a curious user and an artificial intelligence assistant. The ")


def test_the_system_message_is_that_of_vicuna_v1(whole: Path, tiny_config: Callable[..., Any], tmp_path: Path) -> None:
    for name in ("coin", "coast"):
        system = bench_config(name, "lora").system
        assert system is not None
        assert system.endswith("assistant gives helpful, detailed, and polite answers to the user's questions.")
    assert bench_config("coin", "lora", overrides=["system=null"]).system is None
    assert bench_config("vision", "lora").system is None
    source = {"name": "coin", "path": str(whole)}
    plain, told = (load_run_stream(tiny_config(stream=source, tasks=["GQA"], system=text))[0] for text in (None, "S."))
    for before, row in zip(all_rows(plain), all_rows(told), strict=True):
        assert row.messages == (("system", "S."), *before.messages)
        assert row.instruction == before.instruction
    own = [{"messages": [{"role": r, "content": r} for r in ("system", "user", "assistant")]} for _ in range(20)]
    file = write(tmp_path / "own.json", own)
    for row in all_rows(load_run_stream(tiny_config(stream=str(file), system="S."))[0]):
        assert row.messages == (("system", "system"), ("user", "user"))


def test_a_request_and_an_export_have_the_system_message(
    tiny_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = "Say what the user's image shows."
    config = tiny_config(method="lora", tasks=["colours"], system=system, max_steps=1)
    with Reporter() as reporter:
        train(config, reporter)
    folder = Path(config.output_dir)
    line = json.loads((folder / "predictions/1/colours.jsonl").read_text().splitlines()[0])
    shown: list[str] = []
    original = Reader.encode_prompt

    def noted(self: Reader, row: Row) -> Any:
        encoded = original(self, row)
        shown.append(self.tokenizer.decode(encoded.prompt))
        return encoded

    monkeypatch.setattr(Reader, "encode_prompt", noted)
    row = next(row for row in load_run_stream(config)[0].test if row.id == line["id"])
    (answer,) = answer_requests(folder, [(row.user_text.removesuffix(f"\n{row.instruction}"), row.instruction)])
    assert (shown[-1], answer.answer) == (line["prompt"], line["prediction"])
    export_run(folder, tmp_path / "vllm", layout="vllm")
    guide = (tmp_path / "vllm/README.md").read_text()
    assert f'the system message "{system}" and one user turn' in guide
    body = shlex.split(guide.partition("curl ")[2].partition("```")[0].replace("\\\n", " "))[-1]
    assert json.loads(body)["messages"][0] == {"role": "system", "content": system}


def test_a_benchmark_of_one_order_takes_none() -> None:
    with pytest.raises(UserError, match="vision has one order"):
        bench_config("vision", "lcia", order=2)
    with pytest.raises(UserError, match="orders origin, reverse, alphabet, not 1"):
        bench_config("coin", "lcia", order=1)


def test_rows_of_the_fixture_are_the_published_ones() -> None:
    """The layout that the other tests build on, written out once."""
    assert train_row("GQA", 1, "Do it", "GQA/images/1.png") == {
        "id": "GQA-1",
        "image": "GQA/images/1.png",
        "conversations": [
            {"from": "human", "value": "<image>\nQuestion 1 of GQA?\nDo it."},
            {"from": "gpt", "value": "left"},
        ],
    }
    assert test_row("Grounding", 1, "Find", "a.png") == {
        "question_id": 1001,
        "image": "a.png",
        "text": "Find: object 1001",
        "answer_bbox": "[0.1,0.2,0.55,0.64]",
        "size": [4, 4],
    }
