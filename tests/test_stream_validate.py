"""`describe` counts what a stream holds: sizes, lengths, repeated questions, groups."""

from __future__ import annotations

import io
import json
import math

from rich.console import Console

from lcia import load_stream
from lcia.stream import Row, Stream, Task, describe


def row(text: str, answer: str = "yes", **more: object) -> Row:
    return Row(id=text, instruction="Say [bold]it[/]", messages=(("user", text),), outputs=(answer,), **more)  # type: ignore[arg-type]


STREAM = Stream(
    "mine",
    (
        Task(
            "first",
            ("Say [bold]it[/]",),
            train=(row("a"), row("b"), row("b", "no"), row("c d e")),
            dev=(row("a"),),
            test=(row("b"), row("x"), row("x"), row("b", images=("/b.png",))),
            scorer="exact",
        ),
        Task("second", ("one", "two", "three", "four"), (row("a"),), (), (row("z"),), "rouge_l"),
    ),
    ("a note [with] brackets",),
)


def printed(stream: Stream, **options: object) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(describe(stream, **options))  # type: ignore[arg-type]
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_counts() -> None:
    first, second = describe(STREAM).tasks
    assert first.rows == {"train": 4, "dev": 1, "test": 4}
    assert first.test_rows_in_train == 1  # the row with an image asks something else
    assert first.dev_rows_in_train == 1
    assert first.repeated == {"train": 1, "dev": 0, "test": 1}
    assert (first.image_rows, second.image_rows) == (1, 0)
    assert second.instructions == ("one", "two", "three", "four")


def test_lengths_in_words_have_no_limit() -> None:
    lengths = describe(STREAM, max_length=3).tasks[0].lengths
    assert (lengths.unit, lengths.min, lengths.median, lengths.max) == ("words", 2, 2.0, 4)
    assert (lengths.limit, lengths.over) == (None, None)


def test_lengths_in_tokens_are_compared_with_the_limit() -> None:
    lengths = describe(STREAM, count_tokens=lambda row: len(row.messages[0][1]), max_length=3).tasks[0].lengths
    assert (lengths.unit, lengths.min, lengths.max) == ("tokens", 1, 5)
    assert (lengths.limit, lengths.over) == (3, 1)


def test_groups() -> None:
    first, second = describe(STREAM, groups={"first": ("travel", 0.5), "second": ("new", math.nan)}).tasks
    assert (first.group, first.similarity) == ("travel", 0.5)
    assert (second.group, second.similarity) == ("new", None)
    assert describe(STREAM).tasks[0].group is None


def test_as_dict_is_plain_json() -> None:
    document = describe(STREAM, groups={"first": ("travel", math.inf)}).as_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert [task["name"] for task in document["tasks"]] == ["first", "second"]
    assert document["notes"] == ["a note [with] brackets"]


def test_what_is_printed() -> None:
    text = printed(STREAM, count_tokens=lambda row: 7, max_length=5, groups={"first": ("travel", 0.93)})
    for part in ("first", "4/1/4", "7/7/7", "tokens (limit 5)", "travel 0.930", "second"):
        assert part in text
    assert "'Say [bold]it[/]'" in text  # brackets are no markup
    assert "a note [with] brackets" in text
    assert "'one', 'two', 'three' and 1 more" in text
    assert "lengths in words" in printed(STREAM)


def test_the_assistant_has_no_question_in_both_train_and_test() -> None:
    summary = describe(load_stream("assistant"))
    assert [task.test_rows_in_train for task in summary.tasks] == [0] * 6
    assert [sum(task.repeated.values()) for task in summary.tasks] == [0] * 6
    assert [task.dev_rows_in_train for task in summary.tasks] == [0] * 6
