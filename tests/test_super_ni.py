"""Super-NI's prompt, what is dropped from it to fit, and the stream InstrDialog that is made of its tasks."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest

from conftest import byte_tokenizer
from lcia import load_stream
from lcia.backbone import Reader, encode_row, fit_demonstrations
from lcia.backbone.layout import DECODER_ONLY, ENCODER_DECODER, Layout
from lcia.errors import UserError
from lcia.evaluation import Decoding
from lcia.stream import Row, Stream, Task
from lcia.stream.load import SPLITS
from lcia.stream.sources import DATA
from lcia.stream.super_ni import super_ni_prompt

SHARED = Path(__file__).parents[2] / "shared/data/instrdialog"
ORDERS: dict[str, list[str]] = json.loads((DATA / "instrdialog/orders.json").read_text())

# Written out by hand from the published template.
TWO_EXAMPLES = (
    "Definition: Judge the sentence.\n"
    "\n"
    " Positive Example 1 -\n"
    "Input: Is it?\n"
    " Output: yes.\n"
    "\n"
    " Positive Example 2 -\n"
    "Input: it is.\n"
    " Output: no!\n"
    "\n"
    "Now complete the following example -\n"
    "Input: Who knows.\n"
    "Output: "
)
EXAMPLES = [("Is it?", "yes"), (" it is ", "no!\n")]


def super_ni(count: int = 130, **changes: Any) -> dict[str, Any]:
    return {
        "Definition": ["Judge the sentence"],
        "Positive Examples": [{"input": one, "output": two, "explanation": "z"} for one, two in EXAMPLES],
        "Instances": [{"id": f"i-{n}", "input": f"s{n}", "output": ["good", "fine"]} for n in range(count)],
        **changes,
    }


# --- the prompt


def test_the_prompt_is_the_published_one() -> None:
    text, demonstrations = super_ni_prompt("Judge the sentence", EXAMPLES, "Who knows")
    assert text == TWO_EXAMPLES
    assert demonstrations == (
        " Positive Example 1 -\nInput: Is it?\n Output: yes.\n\n",
        " Positive Example 2 -\nInput: it is.\n Output: no!\n\n",
    )
    assert super_ni_prompt("Do.", [], "") == (
        "Definition: Do.\n\nNow complete the following example -\nInput: .\nOutput: ",
        (),
    )


@pytest.mark.parametrize("form", ["list", "tasks.json", "tasks.json with its own examples"])
def test_a_task_asks_for_examples(form: str, tmp_path: Path) -> None:
    path = tmp_path / "judge.json"
    path.write_text(json.dumps(super_ni(20)))
    if form == "list":
        task = load_stream([{"name": "judge", "path": str(path), "examples": 2}])[0]
    elif form == "tasks.json":
        (tmp_path / "tasks.json").write_text(json.dumps([{"name": "judge", "examples": 2}]))
        task = load_stream(tmp_path)[0]
    else:
        rows = [{"instruction": "Judge the sentence", "input": f"s{n}", "output": "good"} for n in range(20)]
        path.unlink()
        path.with_suffix(".jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        shown = super_ni()["Positive Examples"]
        entry = {"name": "judge", "examples": 2, "positive_examples": shown}
        (tmp_path / "tasks.json").write_text(json.dumps([entry]))
        task = load_stream(tmp_path)[0]
    assert task.instructions == ("Judge the sentence",)  # what is routed by: the definition, not the prompt
    for row in (*task.train, *task.dev, *task.test):
        asked = f"s{row.source.rsplit(' ' if form != 'tasks.json with its own examples' else ':', 1)[1]}"
        number = int(asked[1:]) - 1
        assert row.messages == (("user", TWO_EXAMPLES.replace("Who knows", f"s{number}")),)
        assert row.instruction == "Judge the sentence"
        assert len(row.demonstrations) == 2


def test_without_the_key_a_task_file_is_read_as_before(tmp_path: Path) -> None:
    (tmp_path / "judge.json").write_text(json.dumps(super_ni(20)))
    row = load_stream(tmp_path)[0].train[0]
    assert row.messages[0][1].endswith("\nJudge the sentence")
    assert row.demonstrations == ()


@pytest.mark.parametrize(
    ("content", "entry", "message"),
    [
        (super_ni(20), {"examples": -1}, "'examples' must be a whole number from 0"),
        (super_ni(20), {"examples": "two"}, "'examples' must be a whole number from 0"),
        (super_ni(20), {"examples": True}, "'examples' must be a whole number from 0"),
        (super_ni(20), {"exampels": 2}, "Did you mean 'examples'?"),
        (super_ni(20, **{"Positive Examples": {}}), {"examples": 1}, "positive examples must be a list"),
        (super_ni(20, **{"Positive Examples": [{"input": "x"}]}), {"examples": 1}, r"positive example \[0\]"),
        ([{"text": "q\nGo", "answer": "a"}] * 20, {"examples": 1}, "needs plain rows"),
        ([{"input": "q", "output": "a"}] * 20, {"examples": 1}, "'instruction' of their own or the task's"),
    ],
)
def test_what_cannot_be_shown_is_refused(content: Any, entry: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "judge.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        load_stream([{"name": "judge", "path": str(path), **entry}])


def test_fewer_examples_than_wanted_are_noted(tmp_path: Path) -> None:
    path = tmp_path / "judge.json"
    path.write_text(json.dumps(super_ni(20)))
    stream = load_stream([{"name": "judge", "path": str(path), "examples": 3}])
    assert "judge: 2 positive examples stated, 3 wanted" in stream.notes
    assert len(stream[0].train[0].demonstrations) == 2


# --- what fits


def demonstrated(question: str) -> Row:
    text, blocks = super_ni_prompt("Judge the sentence", [*EXAMPLES, ("a third", "one")], question)
    return Row("1", "Judge the sentence", (("system", "s"), ("user", text)), ("a",), demonstrations=blocks)


@pytest.mark.parametrize("layout", [DECODER_ONLY, ENCODER_DECODER])
def test_demonstrations_go_from_the_last_on_until_the_prompt_fits(layout: Layout) -> None:
    tokenizer = byte_tokenizer()
    rows = tuple(demonstrated("x" * length) for length in range(0, 260, 7))
    limits = Decoding(max_new_tokens=9, batch_size=1, max_length=300)
    stream = Stream("s", (Task("judge", ("Judge the sentence",), rows[:-2], rows[-2:-1], rows[-1:], "exact"),))
    fitted = fit_demonstrations(stream, Reader(tokenizer, tokenizer), layout, limits)
    room = 300 - 9 if layout is DECODER_ONLY else 300  # a decoder-only model answers in the same window
    kept = []
    for row, found in zip(rows, (*fitted[0].train, *fitted[0].dev, *fitted[0].test), strict=True):
        head, tail = row.messages[-1][1].split("".join(row.demonstrations))
        best = 0
        for count in range(4):  # a byte is a token; the template's own tokens are counted in the shortest prompt
            text = head + "".join(row.demonstrations[:count]) + tail
            shortest = len(encode_row(tokenizer, row.with_demonstrations(0)).prompt)
            length = shortest + len("".join(row.demonstrations[:count]).encode())
            if length <= room:
                best, chosen = count, text
            elif count == 0:
                chosen = text
        assert found.messages == (("system", "s"), ("user", chosen))
        assert found.demonstrations == ()
        kept.append(best)
    assert set(kept) == {0, 1, 2, 3}
    lost = {count: kept.count(count) for count in (2, 1, 0)}
    counts = ", ".join(f"{number} keep {count}" for count, number in lost.items())
    expected = f"judge: demonstrations dropped to fit in {sum(lost.values())} of {len(rows)} prompts: {counts}"
    assert fitted.notes == (expected,)


def test_rows_without_demonstrations_are_left_alone() -> None:
    stream = load_stream("assistant", tasks=["travel_intent"])
    limits = Decoding(max_new_tokens=9, batch_size=1, max_length=10)
    tokenizer = byte_tokenizer()
    assert fit_demonstrations(stream, Reader(tokenizer, tokenizer), DECODER_ONLY, limits) == stream


# --- InstrDialog


@pytest.fixture
def task_files(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for number, name in enumerate(ORDERS["1"]):
        content = super_ni(110 + number * 50, Definition=f"Do {name}")
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "task1_other.json").write_text(json.dumps(super_ni(20)))
    return folder


def test_the_three_orders_hold_the_same_19_tasks() -> None:
    assert list(ORDERS) == ["1", "2", "3"]
    assert all(len(names) == 19 and set(names) == set(ORDERS["1"]) for names in ORDERS.values())
    assert len({tuple(names) for names in ORDERS.values()}) == 3


@pytest.mark.parametrize("order", [1, 2, 3])
def test_task_files_become_the_stream(task_files: Path, order: int) -> None:
    stream = load_stream({"name": "instrdialog", "path": str(task_files), "order": order})
    assert stream.name == "instrdialog"
    assert [task.name for task in stream] == ORDERS[str(order)]
    assert {task.scorer for task in stream} == {"rouge_l"}
    for task in stream:
        total = 110 + ORDERS["1"].index(task.name) * 50
        assert [row.id for row in task.test] == [f"i-{n}" for n in range(50)]
        assert [row.id for row in task.dev] == [f"i-{n}" for n in range(50, 100)]
        assert len({row.id for row in task.train}) == len(task.train) == min(500, total - 100)
        assert {int(row.id[2:]) for row in task.train} <= set(range(100, total))
        assert task.instructions == (f"Do {task.name}",)
        assert task.test[0].messages[0][1].startswith(f"Definition: Do {task.name}.\n\n Positive Example 1 -\n")


def test_the_draw_of_training_rows_repeats_and_follows_the_seed(task_files: Path) -> None:
    last = [ORDERS["1"][-1]]
    drawn = [
        [
            row.id
            for row in load_stream({"name": "instrdialog", "path": str(task_files)}, tasks=last, seed=seed)[0].train
        ]
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_data_are_found_through_the_environment(task_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LCIA_DATA", raising=False)
    with pytest.raises(UserError, match="path: FOLDER"):
        load_stream("instrdialog")
    task_files.rename(task_files.parent / "instrdialog")
    monkeypatch.setenv("LCIA_DATA", str(task_files.parent))
    assert len(load_stream("instrdialog")) == 19


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": 4}, "orders 1, 2, 3, not 4"),
        ({"ordr": 2}, "Did you mean 'order'?"),
        ({"examples": -2}, "'examples' must be"),
        ({"path": 7}, "'path' must be a text"),
        ({"path": "no/such/folder"}, "not a folder"),
        ({"name": "instrdialogue"}, "Did you mean 'instrdialog'?"),
        ({"name": "assistant"}, "assistant has no option 'path'"),
        ({"name": None}, "built-in streams"),
    ],
)
def test_options_of_a_built_in_stream(task_files: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_stream({"name": "instrdialog", "path": str(task_files), **changes})


# --- from the hub


def mirror(folder: Path, leave_out: str = "", parts: tuple[str, ...] = ("train", "test"), **columns: Any) -> Path:
    """Rows as in Muennighoff/natural-instructions: a row for each reference, the tasks shared out over the splits."""
    rows: dict[str, list[dict[str, Any]]] = {part: [] for part in parts}
    for number, name in enumerate([*ORDERS["1"], "task1_other"]):
        for n in range(110 + number):
            for target in ("good", "fine") if n % 2 else ("good",):
                row = {"task_name": name, "id": f"{name}-{n}", "definition": f"Do {name}", "inputs": f"s{n}"}
                rows[parts[number % len(parts)]].append(row | {"targets": target})
    for part in parts:
        rows[part] = [row | columns for row in rows[part] if row["task_name"] != leave_out]
    saved = {part: datasets.Dataset.from_list(found) for part, found in rows.items()}
    datasets.DatasetDict(saved).save_to_disk(folder)
    return folder


def test_a_mirror_on_the_hub_is_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One data set with all tasks; asked for by its id, or as `datasets` saved it."""
    saved = mirror(tmp_path / "saved")
    stream = load_stream({"name": "instrdialog", "path": str(saved), "order": 2, "examples": 0})
    assert [task.name for task in stream] == ORDERS["2"]
    assert {task.scorer for task in stream} == {"rouge_l"}
    for task in stream:
        total = 110 + ORDERS["1"].index(task.name)
        assert [row.id for row in task.test] == [f"{task.name}-{n}" for n in range(50)]  # as of its task file
        assert [row.id for row in task.dev] == [f"{task.name}-{n}" for n in range(50, 100)]
        assert [row.id for row in task.train] == [f"{task.name}-{n}" for n in range(100, total)]
        assert task.instructions == (f"Do {task.name}",)
        # rows of one id are one question with several references, so that no test row is trained on
        assert [row.outputs for row in task.test[1:4]] == [("good", "fine"), ("good",), ("good", "fine")]
        prompt = f"Definition: Do {task.name}.\n\nNow complete the following example -\nInput: s1.\nOutput: "
        assert task.test[1].messages == (("user", prompt),)
    assert stream[0].test[1].source.startswith(f"{saved}/")

    asked: list[str] = []

    def from_hub(name: str) -> Any:
        asked.append(name)
        return datasets.load_from_disk(saved)

    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    again = load_stream({"name": "instrdialog", "path": "owner/mirror", "order": 2, "examples": 0})
    assert asked == ["owner/mirror"]
    assert [(task.train, task.dev, task.test) for task in plain(again)] == [
        (task.train, task.dev, task.test) for task in plain(stream)
    ]
    monkeypatch.setenv("LCIA_DATA", str(tmp_path))
    saved.rename(tmp_path / "instrdialog")
    assert len(load_stream({"name": "instrdialog", "examples": 0})) == 19


def plain(stream: Stream) -> list[Task]:
    """The tasks without where their rows were read."""
    bare = [
        {split: tuple(replace(row, source="") for row in getattr(task, split)) for split in SPLITS} for task in stream
    ]
    return [replace(task, **splits) for task, splits in zip(stream, bare, strict=True)]


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({}, {}, "no positive examples to show 2 of: set examples: 0"),
        ({}, {"examples": 1}, "no positive examples to show 1 of"),
        ({"leave_out": ORDERS["1"][4]}, {"examples": 0}, rf"has no task '{ORDERS['1'][4]}' \(1 of 19 are missing\)"),
        (
            {"rename": ("definition", "instruction")},
            {"examples": 0},
            "no column 'definition' .there are task_name, id, in",
        ),
        ({"rename": ("task_name", "task")}, {"examples": 0}, "no column 'task_name'"),
        ({"targets": " "}, {"examples": 0}, "empty answer in 'output'"),
        ({"id": "same"}, {"examples": 0}, r"saved/\w+:row \d+: the id 'same' is that of another input, at .*:row 1"),
    ],
)
def test_a_data_set_that_is_no_such_mirror(
    changes: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    saved = mirror(tmp_path / "saved", **{key: value for key, value in changes.items() if key != "rename"})
    if "rename" in changes:
        datasets.load_from_disk(saved).rename_column(*changes["rename"]).save_to_disk(tmp_path / "renamed")
        saved = tmp_path / "renamed"
    with pytest.raises(UserError, match=message):
        load_stream({"name": "instrdialog", "path": str(saved), **options})


def test_a_mirror_without_ids_tells_instances_by_their_input(tmp_path: Path) -> None:
    rows = datasets.load_from_disk(mirror(tmp_path / "saved", parts=("train",)))["train"].remove_columns("id")
    rows.save_to_disk(tmp_path / "without")
    task = load_stream({"name": "instrdialog", "path": str(tmp_path / "without"), "examples": 0})[1]
    assert [row.messages[0][1].split("Input: ")[1] for row in task.test[:2]] == ["s0.\nOutput: ", "s1.\nOutput: "]
    assert [row.outputs for row in task.test[:2]] == [("good",), ("good", "fine")]
    assert len({row.id for row in (*task.train, *task.dev, *task.test)}) == 111


def test_a_missing_task_is_named(task_files: Path) -> None:
    (task_files / f"{ORDERS['2'][3]}.json").unlink()
    with pytest.raises(UserError, match=f"no task '{ORDERS['2'][3]}' .1 of 19"):
        load_stream({"name": "instrdialog", "path": str(task_files), "order": 2})


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data are absent")
def test_the_compact_copy_is_the_stream() -> None:
    stream = load_stream({"name": "instrdialog", "path": str(SHARED), "order": 3})
    orders = json.loads((SHARED / "orders.json").read_text())
    assert [task.name for task in stream] == orders["order3"]
    assert [sum(len(getattr(task, split)) for task in stream) for split in ("train", "dev", "test")] == [7817, 950, 950]
    assert all(len(row.demonstrations) == 2 for task in stream for row in task.test)
    stated = json.loads((SHARED / "tasks.json").read_text())["tasks"]
    for task in stream:
        assert task.instructions == (stated[task.name]["definition"],)
        first = stated[task.name]["positive_examples"][0]["input"].strip()
        assert f" Positive Example 1 -\nInput: {first}" in task.test[0].messages[0][1]


def test_a_run_learns_it_and_goes_on_from_elsewhere(
    task_files: Path, tiny_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lcia.progress import Reporter
    from lcia.run import resume, train

    monkeypatch.chdir(tmp_path)
    name = ORDERS["2"][0]
    config = tiny_config(
        stream={"name": "instrdialog", "path": "tasks", "order": 2},
        tasks=[name],
        max_train_examples=4,
        max_eval_examples=2,
        max_steps=1,
        max_length=190,
    )
    with Reporter() as reporter:
        results = train(config, reporter)
    assert results["scorers"] == {name: "rouge_l"}
    answers = (tmp_path / "run" / "predictions" / "1" / f"{name}.jsonl").read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in answers]
    assert all("Example 1" in prompt and "Example 2" not in prompt for prompt in prompts)  # one had to go
    monkeypatch.chdir(task_files)
    with Reporter() as reporter:
        assert resume(tmp_path / "run", reporter) == results
