"""A small CoIN download in its published layout, with images of a few pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from lcia.stream.task_source import DATA

INSTRUCTIONS: dict[str, dict[str, list[str]]] = json.loads((DATA / "coin/instructions.json").read_text())
ORDERS: dict[str, list[str]] = json.loads((DATA / "coin/orders.json").read_text())
FOLDERS = {"origin": "Instructions", "diverse": "Instructions_Diverse", "10type": "Instructions_10Type"}
IMAGES = {
    "ScienceQA": "ScienceQA/images",
    "TextVQA": "TextVQA/train_images",
    "ImageNet": "ImageNet_withlabel/train",
    "GQA": "GQA/images",
    "VizWiz": "VizWiz/train",
    "Grounding": "COCO2014/train2014",
    "VQAv2": "COCO2014/train2014",
    "OCR-VQA": "OCR-VQA/images",
}
ANSWERS = {
    "ScienceQA": "B",
    "TextVQA": "nokia",
    "ImageNet": "tench",
    "GQA": "left",
    "VizWiz": "unsuitable",
    "Grounding": "[0.1,0.2,0.55,0.64]",
    "VQAv2": "2",
    "OCR-VQA": "Agatha Christie",
}
ANNOTATORS = ["Nokia", "nokia", "nokia", "nokia n95", "n95", "samsung", "nokia", "nokia", "phone", "nokia"]
MEASURED = {name: "val" if name in ("TextVQA", "VizWiz", "VQAv2") else "test" for name in IMAGES}
TRAIN, TEST = 12, 3


def question(task: str, number: int, instruction: str) -> str:
    """As LLaVA writes it: the instruction behind the question, or around the phrase to be found."""
    if task == "Grounding":
        return f"{instruction}: object {number}"
    return f"Question {number} of {task}?\n{instruction}."


def train_row(task: str, number: int, instruction: str, image: str | None) -> dict[str, Any]:
    marker = "<image>\n" if image is not None else ""
    turns = [
        {"from": "human", "value": marker + question(task, number, instruction)},
        {"from": "gpt", "value": ANSWERS[task]},
    ]
    return {"id": f"{task}-{number}", **({"image": image} if image else {}), "conversations": turns}


def test_row(task: str, number: int, instruction: str, image: str | None) -> dict[str, Any]:
    row = {"question_id": 1000 + number, **({"image": image} if image else {})}
    row["text"] = question(task, 1000 + number, instruction)
    if task == "Grounding":
        return {**row, "answer_bbox": ANSWERS[task], "size": [4, 4]}
    return {**row, "answer": ANSWERS[task]}


test_row.__test__ = False  # type: ignore[attr-defined]  # no test, though its name begins like one


def build(root: Path, kinds: tuple[str, ...] = ("origin",)) -> Path:
    """DIR/cl_dataset and DIR/Instructions...; every third ScienceQA question has no image, as in the original."""
    for folder in set(IMAGES.values()):
        (root / "cl_dataset" / folder).mkdir(parents=True, exist_ok=True)
        for number in range(4):
            Image.new("RGB", (4, 4), (number, 0, 0)).save(root / "cl_dataset" / folder / f"{number}.png")
    for kind in kinds:
        for task, by_kind in INSTRUCTIONS.items():
            texts = by_kind[kind]

            def image(number: int, task: str = task) -> str | None:
                return None if task == "ScienceQA" and number % 3 == 0 else f"{IMAGES[task]}/{number % 4}.png"

            train = [train_row(task, n, texts[n % len(texts)], image(n)) for n in range(TRAIN)]
            test = [test_row(task, n, texts[n % len(texts)], image(n)) for n in range(TEST)]
            write(root / FOLDERS[kind] / task / "train.json", train)
            write(root / FOLDERS[kind] / task / f"{MEASURED[task]}.json", test)
    write(
        root / "cl_dataset/TextVQA/TextVQA_0.5.1_val.json",
        {"data": [{"question_id": 1000 + n, "answers": ANNOTATORS} for n in range(TEST)]},
    )
    return root


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def change(path: Path, *changes: dict[str, Any]) -> None:
    """The first rows of a file with these keys changed; None takes a key away."""
    rows = json.loads(path.read_text())
    for row, wanted in zip(rows, changes, strict=False):
        row |= wanted
        for key in [key for key, value in row.items() if value is None]:
            del row[key]
    write(path, rows)
