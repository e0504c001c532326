"""CoIN's answers scored as its released code does (github zackschen/CoIN, llava/eval/CoIN), mistakes included.

For comparing with published numbers; `docs/concepts/vision-streams.md` lists what is wrong with each.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lcia.stream.boxes import ENOUGH, iou
from lcia.stream.vqa import vqa_soft

_OPTIONS = "ABCDE"


def coin_scienceqa_released(prediction: str, references: Sequence[str]) -> float:
    """The letter, or "B. text", or else the first word of one character: "I see a B" chooses I."""
    if len(prediction) == 1 and prediction in _OPTIONS:
        letter = prediction
    elif len(prediction) >= 3 and prediction[0] in _OPTIONS and prediction[1:3] == ". ":
        letter = prediction[0]
    else:
        single = re.search(r"\b(\w)\b", prediction)
        letter = single[1].upper() if single else "FAILED"
    return float(letter in {reference.strip() for reference in references})


def coin_textvqa_released(prediction: str, references: Sequence[str]) -> float:
    """The soft VQA score: an answer that one of ten annotators gave has a part of the point."""
    return vqa_soft(prediction, references)


def coin_imagenet_released(prediction: str, references: Sequence[str]) -> float:
    """Either text inside the other, case and all: an empty answer is in every class name."""
    return float(any(reference in prediction or prediction in reference for reference in references[:1]))


def coin_gqa_released(prediction: str, references: Sequence[str]) -> float:
    """Full stops off the prediction's end, lower case, one leading space; the reference as it is."""
    return float(prediction.rstrip(".").lower().removeprefix(" ") in references[:1])


def coin_vqa_released(prediction: str, references: Sequence[str]) -> float:
    """VizWiz and VQAv2: equal but for case, with one of the annotators' answers."""
    return float(prediction.upper() in {reference.upper() for reference in references[:1]})


def coin_ocrvqa_released(prediction: str, references: Sequence[str]) -> float:
    """Equal but for case; an answer with "Unanswerable" in it is wrong even where that is the answer."""
    if "Unanswerable" in prediction:
        return 0.0
    return float(prediction.lower() in {reference.lower() for reference in references[:1]})


def coin_grounding_released(prediction: str, references: Sequence[str]) -> float:
    """IoU above 0.5, after the prediction lost a character at either end: the last digit of y2, a digit of x1.

    The brackets were removed before the characters that were meant to be the brackets.
    """
    try:
        found = [float(number) for number in _bare(prediction)[1:-1].split(",")]
        target = [float(number) for number in _bare(references[0]).split(",")] if references else []
    except ValueError:
        return 0.0
    if len(found) != 4 or len(target) != 4:
        return 0.0
    x1, y1, x2, y2 = found
    left, top, right, bottom = target
    return float(iou((x1, y1, x2, y2), (left, top, right, bottom)) > ENOUGH)


def _bare(text: str) -> str:
    return text.replace("[", "").replace("]", "")
