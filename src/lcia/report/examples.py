"""A few test rows per task with every method's answer."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lcia.errors import UserError
from lcia.report.compare import Arena
from lcia.report.load import Prediction

EXAMPLES_PER_TASK = 3
_PICTURE_PIXELS = 240  # of the longer side
_SHOWN_CHARACTERS = 600  # of a prompt or an answer; the rest stays in predictions/


@dataclass(frozen=True)
class Answer:
    label: str
    text: str
    score: float

    @property
    def kind(self) -> str:
        return "right" if self.score >= 1 else "wrong" if self.score <= 0 else "partly"

    @property
    def verdict(self) -> str:
        """In words and with a sign, so that colour is not needed."""
        return {"right": "✓ right", "wrong": "✗ wrong", "partly": f"~ partly, {self.score:.2f}"}[self.kind]


@dataclass(frozen=True)
class Picture:
    """An image of the prompt, small: the page must show it where the file is not."""

    name: str
    data: str | None  # a data: URL; None: the file is no longer there, or no longer an image


@dataclass(frozen=True)
class Example:
    """One test row; `answers` in the order of the series."""

    id: str
    prompt: str
    pictures: tuple[Picture, ...]
    reference: tuple[str, ...]
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class TaskExamples:
    task: str
    scorer: str | None
    examples: tuple[Example, ...]


def collect_examples(arena: Arena) -> list[TaskExamples]:
    """Per task, the final answers of each series' first seed; empty where no run kept predictions."""
    collected = []
    for task in arena.tasks:
        answers = {one.label: one.runs[0].predictions(task) for one in arena.series}
        answers = {label: found for label, found in answers.items() if found}
        rows = _telling_rows(list(answers.values()))
        scorer = arena.runs[0].scorers.get(task)
        collected.append(TaskExamples(task, scorer, tuple(_example(row, answers) for row in rows)))
    return collected if any(found.examples for found in collected) else []


def _telling_rows(predictions: Sequence[Mapping[str, Prediction]]) -> list[str]:
    """Ids of rows that all have answered: those on which the scores differ first, else in file order."""
    if not predictions:
        return []
    common = [row for row in predictions[0] if all(row in found for found in predictions)]
    agreed = {row: len({found[row].score for found in predictions}) == 1 for row in common}
    return sorted(common, key=agreed.__getitem__)[:EXAMPLES_PER_TASK]


def _example(row: str, answers: Mapping[str, Mapping[str, Prediction]]) -> Example:
    first = next(iter(answers.values()))[row]
    return Example(
        row,
        _without_middle(first.prompt),
        tuple(map(_picture, first.images)),
        tuple(_shortened(text) for text in first.reference),
        tuple(Answer(label, _shortened(found[row].prediction), found[row].score) for label, found in answers.items()),
    )


def _picture(path: str) -> Picture:
    from lcia.backbone.images import open_image  # late: its package loads torch, which reports of text do without

    try:
        image = open_image(path)
    except UserError:
        return Picture(Path(path).name, None)
    image.thumbnail((_PICTURE_PIXELS, _PICTURE_PIXELS))
    written = io.BytesIO()
    image.save(written, "JPEG", quality=80)
    return Picture(Path(path).name, f"data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode()}")


def _without_middle(text: str) -> str:
    """A prompt's end, where the question and the instruction stand, and how it begins."""
    left = len(text) - _SHOWN_CHARACTERS
    if left <= 0:
        return text
    head = _SHOWN_CHARACTERS // 4
    return f"{text[:head]} … ({left} characters left out) … {text[head + left :]}"


def _shortened(text: str) -> str:
    left = len(text) - _SHOWN_CHARACTERS
    return text if left <= 0 else f"{text[:_SHOWN_CHARACTERS]} … ({left} more characters)"
