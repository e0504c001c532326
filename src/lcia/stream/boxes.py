"""Boxes in answers, `[x1, y1, x2, y2]`, and how far two of them agree."""

from __future__ import annotations

import re
from collections.abc import Sequence

Box = tuple[float, float, float, float]  # x1, y1, x2, y2: left, top, right, bottom, in any one unit

ENOUGH = 0.5  # intersection over union above which a box counts as found

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?"
_RUN = re.compile(rf"(?<![\w.]){_NUMBER}(?:(?:\s*[,;]\s*|\s+){_NUMBER})*")  # as many as follow each other


def parse_box(text: str) -> Box | None:
    """The one box that a text names, four numbers in a row: "[0.1, 0.2, 0.5, 0.6]", "Box: (1 2 3 4).".

    None where there is no such run, or more than one. Whether the box has an extent is not asked: without one it meets
    no other (`iou` is 0).
    """
    runs = [re.findall(_NUMBER, match[0]) for match in _RUN.finditer(text)]
    found = {tuple(map(float, run)) for run in runs if len(run) == 4}
    if len(found) != 1:
        return None
    x1, y1, x2, y2 = found.pop()
    return x1, y1, x2, y2


def iou(one: Box, other: Box) -> float:
    """Intersection over union of two boxes, in [0, 1]; 0 where the union is empty."""
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    union = area(one) + area(other) - width * height
    return width * height / union if union > 0 else 0.0


def area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def box_iou(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction's box and a reference's have an IoU above 0.5."""
    box = parse_box(prediction)
    targets = [target for reference in references if (target := parse_box(reference)) is not None]
    return float(box is not None and any(iou(box, target) > ENOUGH for target in targets))
