"""Scorers of answers about images: hand-worked cases, oracles, and each mistake of CoIN's released code."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lcia.errors import UserError
from lcia.stream import SCORERS
from lcia.stream.boxes import iou, parse_box
from lcia.stream.coin import TASKS, coin_accuracy, most_common
from lcia.stream.scorers import chosen_truth
from lcia.stream.vqa import evalai_normalise

vqa_short, vqa_soft, box_iou = SCORERS["vqa_short"], SCORERS["vqa_soft"], SCORERS["box_iou"]
ocr, true_false = SCORERS["ocr"], SCORERS["true_false"]
laws = settings(deadline=None, derandomize=True, max_examples=150)

# --- short answers


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Two", "2"),
        ("None", "0"),
        ("ten dogs", "10 dogs"),
        ("The red  car", "red car"),
        ("a\tb\nc", "b c"),
        ("Yes.", "yes"),
        ("3.5", "3.5"),
        ("$5.", "$5"),
        (".5", ".5"),
        ("1,000", "1000"),
        ("t-shirt", "t shirt"),
        ("a - b", "b"),  # a mark beside a space vanishes, and then the article
        ("x-ray - new", "xray new"),  # wherever it stands
        ("(left)", "left"),
        ("yes/no", "yes no"),
        ("dont know", "don't know"),
        ("man's hat", "man 's hat"),
        ("whats up?", "what's up"),
        ("couldntve", "couldntve"),  # two apostrophes short
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),  # EvalAI's own slip
        ("a an the", ""),
        ("." * 40, "." * 8),  # EvalAI's own slip: re.UNICODE given as a count
    ],
)
def test_evalai_normalisation(text: str, normal: str) -> None:
    assert evalai_normalise(text) == normal


def test_vqa_short() -> None:
    assert vqa_short("Two.", ["2"]) == 1.0
    assert vqa_short("the couch", ["sofa", "Couch"]) == 1.0
    assert vqa_short("3", ["2"]) == 0.0
    assert vqa_short("", ["2"]) == 0.0
    assert vqa_short("2", []) == 0.0


@given(st.lists(st.sampled_from("abcd"), min_size=4, max_size=10), st.sampled_from("abcde"))
@laws
def test_vqa_soft_leaves_out_each_annotator_once(answers: list[str], predicted: str) -> None:
    scores = []
    for left_out in range(len(answers)):
        others = [f"{answer} x" for number, answer in enumerate(answers) if number != left_out]
        scores.append(min(1.0, others.count(f"{predicted} x") / 3))
    expected = sum(scores) / len(scores)
    assert vqa_soft(f"{predicted} x", [f"The {answer} X." for answer in answers]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("same", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_soft_of_ten_annotators(same: int, score: float) -> None:
    assert vqa_soft("Nokia.", ["nokia"] * same + [f"other {n}" for n in range(10 - same)]) == pytest.approx(score)


def test_vqa_soft_of_one_answer_is_equality() -> None:
    """Training rows have one: dev rows that were drawn from them must be scored all the same."""
    assert vqa_soft("Nokia.", ["nokia"]) == 1.0
    assert vqa_soft("x", ["nokia"]) == 0.0
    assert vqa_soft("x", []) == 0.0


# --- boxes


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("[0.1, 0.2, 0.5, 0.6]", (0.1, 0.2, 0.5, 0.6)),
        ("[0.1,0.2,.5,1]", (0.1, 0.2, 0.5, 1.0)),
        ("0.1 0.2 0.5 0.6", (0.1, 0.2, 0.5, 0.6)),
        ("The box is (10; 20; 30; 40).", (10.0, 20.0, 30.0, 40.0)),
        ("[[0.1, 0.2, 0.5, 0.6]]", (0.1, 0.2, 0.5, 0.6)),
        ("2 dogs at [0.1, 0.2, 0.5, 0.6]", (0.1, 0.2, 0.5, 0.6)),
        ("[0.1, 0.2, 0.5, 0.6] and again [0.10, 0.20, 0.50, 0.60]", (0.1, 0.2, 0.5, 0.6)),
        ("[1e-1, -0.2, 0.5, 6E-1]", (0.1, -0.2, 0.5, 0.6)),
        ("[0.5, 0.6, 0.1, 0.2]", (0.5, 0.6, 0.1, 0.2)),
        ("", None),
        ("[0.1, 0.2, 0.5]", None),
        ("[0.1, 0.2, 0.5, 0.6, 0.7]", None),
        ("[0.1, 0.2, 0.5, 0.6] or [0.2, 0.2, 0.5, 0.6]", None),
        ("x1 0.1 y1 0.2 x2 0.5 y2 0.6", None),
        ("left", None),
        ("1" + " " * 50_000, None),  # in no time
    ],
)
def test_parse_box(text: str, box: tuple[float, ...] | None) -> None:
    assert parse_box(text) == box


def test_iou_counts_pixels() -> None:
    """Against counting the cells of a grid."""
    draw = random.Random(0)
    for _ in range(200):
        one, other = (
            (min(x), min(y), max(x), max(y))
            for x, y in (([draw.randint(0, 9) for _ in "ab"], [draw.randint(0, 9) for _ in "ab"]) for _ in "ab")
        )
        cells = [{(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])} for box in (one, other)]
        union = len(cells[0] | cells[1])
        assert iou(one, other) == pytest.approx(len(cells[0] & cells[1]) / union if union else 0.0)


def test_box_iou() -> None:
    target = "[0.2, 0.2, 0.6, 0.6]"
    assert box_iou("[0.2, 0.2, 0.6, 0.6]", [target]) == 1.0
    assert box_iou("It is at (0.2 0.2 0.6 0.6).", [target]) == 1.0
    assert box_iou("[0, 0, 1, 0.5]", ["[0, 0, 1, 1]"]) == 0.0  # exactly a half is not enough
    assert box_iou("[0, 0, 1, 0.51]", ["[0, 0, 1, 1]"]) == 1.0
    assert box_iou("[0.6, 0.6, 0.2, 0.2]", [target]) == 0.0  # corners the wrong way round
    assert box_iou("[0.2, 0.2, 0.2, 0.6]", ["[0.2, 0.2, 0.2, 0.6]"]) == 0.0  # nothing inside
    assert box_iou("[0.2, 0.2, 0.6, 0.6]", ["[0, 0, 0.1, 0.1]", target]) == 1.0
    assert box_iou("[1e999, 0, 1e999, 1]", ["[0, 0, 1e999, 1e999]"]) == 0.0
    assert box_iou("left", [target]) == 0.0
    assert box_iou("[0.2, 0.2, 0.6, 0.6]", []) == 0.0


# --- transcripts and statements


def test_ocr_is_without_case_and_nothing_else() -> None:
    assert ocr("total:  5.00 ", ["TOTAL: 5.00"]) == 1.0
    assert ocr("Straße", ["STRASSE"]) == 1.0
    assert ocr("TOTAL 5.00", ["TOTAL: 5.00"]) == 0.0
    assert ocr("THE TOTAL", ["TOTAL"]) == 0.0  # `exact` would forgive these two
    assert ocr("TOTAL.", ["TOTAL"]) == 0.0
    assert ocr("", ["TOTAL"]) == 0.0


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("true", True),
        ("False.", False),
        ("**TRUE**", True),
        ("The statement is false", False),
        ("True, because it is true", True),
        ("not true", None),
        ("It isn't true", None),
        ("true or false", None),
        ("yes", None),
        ("untrue", None),
        ("", None),
    ],
)
def test_statements(text: str, truth: bool | None) -> None:
    assert chosen_truth(text) is truth
    for reference in ("true", "false"):
        assert true_false(text, [reference]) == float(truth is (reference == "true"))


# --- CoIN: every mistake of the released scorers, and that strict does not make it


def both(task: str, prediction: str, references: list[str]) -> tuple[float, float]:
    """(released, strict)."""
    return SCORERS[TASKS[task].released](prediction, references), SCORERS[TASKS[task].strict](prediction, references)


@pytest.mark.parametrize(
    ("task", "prediction", "reference", "released", "strict"),
    [
        # the first word of one character is the choice
        ("ScienceQA", "I see an arrow", "I", 1, 0),
        ("ScienceQA", "a dog", "A", 1, 0),
        ("ScienceQA", "It's S", "S", 1, 0),
        ("ScienceQA", "A bird is not shown, so the answer is B", "B", 0, 1),
        ("ScienceQA", "Fig. 1 shows it: the answer is B", "B", 0, 1),
        # one text inside the other, with case: an empty answer is in every name
        ("ImageNet", "", "tench", 1, 0),
        ("ImageNet", "e", "tench", 1, 0),
        ("ImageNet", "a cat or a dog or a tench", "tench", 1, 0),
        ("ImageNet", "tench", "great white shark, tench", 1, 0),
        ("ImageNet", "Tench", "tench", 0, 1),
        # full stops and case of the prediction, and nothing else
        ("GQA", "left ", "left", 0, 1),
        ("GQA", "Left!", "left", 0, 1),
        ("GQA", "left", "Left", 0, 1),
        ("GQA", '"left"', "left", 0, 1),
        ("GQA", "the left", "left", 0, 1),
        # case, and nothing else
        ("VizWiz", "unsuitable.", "unsuitable", 0, 1),
        ("VizWiz", "a keyboard", "keyboard", 0, 1),
        ("VizWiz", "10,000", "10000", 0, 1),
        ("VizWiz", " phone", "phone", 0, 1),
        ("VizWiz", "dont know", "don't know", 0, 1),
        ("VQAv2", "two", "2", 0, 1),
        ("VQAv2", "Yes.", "yes", 0, 1),
        ("VQAv2", "t-shirt", "t shirt", 0, 1),
        ("VQAv2", "the left", "left", 0, 1),
        ("VQAv2", "none", "0", 0, 1),
        # "Unanswerable" is wrong, even where it is right; without its capital it is not noticed
        ("OCR-VQA", "The Unanswerable Question", "The Unanswerable Question", 0, 1),
        ("OCR-VQA", "Unanswerable", "Unanswerable", 0, 1),
        ("OCR-VQA", "Unanswerable", "unanswerable", 0, 1),
        ("OCR-VQA", "Unanswerable Prayers", "UNANSWERABLE PRAYERS", 0, 1),
        ("OCR-VQA", "Essays: Unanswerable", "essays: unanswerable", 0, 1),
        ("OCR-VQA", "unanswerable", "Unanswerable", 1, 1),
        ("OCR-VQA", "Romance.", "Romance", 0, 1),
        # y2 loses its last digit
        ("Grounding", "[0.1, 0.1, 0.9, 0.19]", "[0.1, 0.1, 0.9, 0.19]", 0, 1),
        ("Grounding", "[0.1, 0.2, 0.5, 1]", "[0.1, 0.2, 0.5, 1]", 0, 1),  # all it had
        ("Grounding", "[0.1, 0.1, 0.5, 0.99]", "[0.1, 0.1, 0.5, 0.52]", 1, 0),  # a box too high becomes a better one
        ("Grounding", "[0.25, 0.55, 0.75, 0.58]", "[0.25, 0.55, 0.75, 0.58]", 0, 1),  # under its own top
        ("Grounding", "[1, 2, 30, 49]", "[1, 2, 30, 49]", 0, 1),  # and x1 its first
        ("Grounding", "Box: [0.1, 0.2, 0.5, 0.66]", "[0.1, 0.2, 0.5, 0.66]", 0, 1),  # that of a word is a word's
    ],
)
def test_every_mistake_of_the_released_scorers(
    task: str, prediction: str, reference: str, released: int, strict: int
) -> None:
    assert both(task, prediction, [reference]) == (released, strict)


@pytest.mark.parametrize(
    ("prediction", "answers", "released", "strict"),
    [
        ("nokia", {"nokia": 1, "samsung": 9}, 0.3, 0),
        ("nokia", {"nokia": 2, "samsung": 8}, 0.6, 0),
        ("Nokia.", {"samsung": 7, "nokia": 3}, 0.9, 0),
        ("samsung", {"samsung": 2, **{f"other {n}": 1 for n in range(8)}}, 0.6, 1),
        ("the Samsung", {**{f"other {n}": 1 for n in range(7)}, "samsung": 3}, 0.9, 1),
        ("nokia", {"nokia": 4, "samsung": 6}, 1, 0),
    ],
)
def test_released_textvqa_is_no_truth_alignment(
    prediction: str, answers: dict[str, int], released: float, strict: int
) -> None:
    """What some of ten annotators said has a part of the point; strict has one reference, what most of them said."""
    ten = [answer for answer, count in answers.items() for _ in range(count)]
    assert len(ten) == 10
    assert both("TextVQA", prediction, ten)[0] == pytest.approx(released)
    assert both("TextVQA", prediction, [most_common(ten)])[1] == strict


@pytest.mark.parametrize(
    ("task", "prediction", "reference"),
    [
        ("ScienceQA", "B", "B"),
        ("ScienceQA", "B. a dog", "B"),
        ("ScienceQA", "The answer is (B)", "B"),
        ("TextVQA", "nokia", "nokia"),
        ("ImageNet", "tench", "tench"),
        ("GQA", "Left.", "left"),
        ("VizWiz", "Unsuitable", "unsuitable"),
        ("VQAv2", "2", "2"),
        ("OCR-VQA", "agatha christie", "Agatha Christie"),
        ("Grounding", "[0.1, 0.2, 0.55, 0.64]", "[0.1, 0.2, 0.55, 0.64]"),
    ],
)
def test_what_both_accept_and_refuse(task: str, prediction: str, reference: str) -> None:
    assert both(task, prediction, [reference]) == (1.0, 1.0)
    assert both(task, "zebra crossing", [reference]) == (0.0, 0.0)
    assert both(task, prediction, []) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("box", "released"),
    [
        # what the last digit of y2 is worth, of the box's height: half of it is too much
        ("[0.12,0.20,0.55,0.64]", 1),  # 0.04 of 0.44
        ("[0.12,0.20,0.55,0.29]", 0),  # 0.09 of 0.09
        ("[0.12,0.45,0.55,0.58]", 0),  # 0.08 of 0.13
        ("[0.12,0.45,0.55,0.56]", 0),  # 0.06 of 0.11
        ("[0.12,0.45,0.55,0.55]", 0),  # 0.05 of 0.10: half is not enough to be left
        ("[0.12,0.44,0.55,0.55]", 1),  # 0.05 of 0.11
        ("[0.00,0.00,1.00,1.00]", 1),  # nothing
        ("[0.12,0.20,0.55,0.6]", 0),  # 0.6 of 0.40: y2 is "0."
        ("[0.12,0.20,0.55,0.639]", 1),  # 0.009 of 0.439
        ("[0.12,0.62,0.55,0.639]", 1),  # 0.009 of 0.019
        ("[0.12,0.622,0.55,0.639]", 0),  # 0.009 of 0.017
    ],
)
def test_what_the_released_parser_costs_a_perfect_box(box: str, released: int) -> None:
    """How many of a data set's boxes that are depends on their decimals and heights: no share is claimed."""
    assert both("Grounding", box, [box]) == (released, 1)


def released_rules(prediction: str, reference: str) -> dict[str, bool]:
    """Each rule written out once more, from the scripts' own words."""
    text = prediction.rstrip(".").lower()
    text = text[1:] if len(text) > 0 and text[0] == " " else text
    same = prediction.upper() == reference.upper()
    return {
        "ImageNet": (reference in prediction) or (prediction in reference),
        "VizWiz": same,
        "VQAv2": same,
        "OCR-VQA": prediction.lower() == reference.lower() and "Unanswerable" not in prediction,
        "GQA": text == reference,
    }


DERIVED: dict[str, Callable[[str], str]] = {
    "itself": str,
    "upper": str.upper,
    "lower": str.lower,
    "swapped": str.swapcase,
    "stop": "{}.".format,
    "stops": "{}...".format,
    "space": " {}".format,
    "two spaces": "  {}".format,
    "space behind": "{} ".format,
    "inside more": "it is {} here".format,
    "half": lambda text: text[: len(text) // 2],
    "unanswerable before": "Unanswerable {}".format,
    "unanswerable behind": "{} Unanswerable".format,
}


def test_released_rules_on_any_text() -> None:
    """The prediction is made of the reference, so that rules say yes as well as no."""
    said: set[tuple[str, bool]] = set()
    on_both_sides = 0  # "Unanswerable" in prediction and reference alike: equal, and wrong

    @given(
        st.text(max_size=20) | st.sampled_from(["left", "Unanswerable Prayers", "a.b"]), st.sampled_from(list(DERIVED))
    )
    @laws
    def check(reference: str, how: str) -> None:
        nonlocal on_both_sides
        prediction = DERIVED[how](reference)
        for answer, target in ((prediction, reference), (prediction, prediction), (reference, prediction)):
            expected = released_rules(answer, target)
            for task, right in expected.items():
                assert both(task, answer, [target])[0] == float(right), (task, answer, target)
                said.add((task, right))
            on_both_sides += answer == target and not expected["OCR-VQA"]

    check()
    assert said == {(task, right) for task in released_rules("", "") for right in (True, False)}
    assert on_both_sides > 5


@given(st.lists(st.integers(0, 1000), min_size=4, max_size=4), st.integers(2, 3))
@laws
def test_the_released_parser_in_its_own_words(numbers: list[int], decimals: int) -> None:
    answer = "[" + ", ".join(f"{number / 1000:.{decimals}f}" for number in numbers) + "]"
    found = [float(part) for part in answer.replace("[", "").replace("]", "")[1:-1].split(",")]
    target = [float(part) for part in answer.replace("[", "").replace("]", "").split(",")]
    (x1, y1, x2, y2), (x21, y21, x22, y22) = found, target
    inside = max(0, min(x2, x22) - max(x1, x21)) * max(0, min(y2, y22) - max(y1, y21))
    union = (x2 - x1) * (y2 - y1) + (x22 - x21) * (y22 - y21) - inside
    expected = inside / union > 0.5 if union > 0 else False
    assert both("Grounding", answer, [answer])[0] == float(expected)


@pytest.mark.parametrize(
    ("task", "reference", "predictions", "released", "strict"),
    [
        ("GQA", "left", {"0": "left", "1": "right"}, 50, 25),
        ("ImageNet", "tench", {"0": "tench"}, 100, 25),
        ("VizWiz", "phone", {"1": "phone", "2": "phone", "3": "dog"}, pytest.approx(200 / 3), 50),
        ("OCR-VQA", "Romance", {"0": "Romance", "3": "Romance"}, 100, 50),
        ("Grounding", "[0.1, 0.1, 0.5, 0.5]", {"2": "[0.6, 0.6, 0.9, 0.9]"}, 0, 0),
        ("VQAv2", "2", {"0": "2", "1": "2", "2": "3", "3": "3"}, 50, 50),  # nothing is missing
        ("ScienceQA", "B", {"0": "B", "1": "C"}, 25, 25),  # the one script that counts what is missing
    ],
)
def test_who_is_averaged_over(
    task: str, reference: str, predictions: dict[str, str], released: Any, strict: float
) -> None:
    """Of four questions. Missing predictions are unnoticed as released, and wrong in strict."""
    references = {str(n): [reference] for n in range(4)}
    assert coin_accuracy(task, predictions, references, "released") == released
    assert coin_accuracy(task, predictions, references) == strict


def test_predictions_are_paired_by_id() -> None:
    references = {"a": ["tench"], "b": ["goldfish"]}
    for scoring in ("released", "strict"):
        assert coin_accuracy("ImageNet", {"b": "goldfish", "a": "tench"}, references, scoring) == 100.0


def test_predictions_that_cannot_be_averaged() -> None:
    references = {str(n): ["left"] for n in range(4)}
    ten = {"0": ["nokia"] + ["samsung"] * 9}
    assert coin_accuracy("TextVQA", {"0": "nokia"}, ten, "released") == pytest.approx(30.0)
    with pytest.raises(UserError, match="no reference for the prediction of question '9'"):
        coin_accuracy("GQA", {"9": "left"}, references)
    with pytest.raises(UserError, match="'task' is one of ScienceQA"):
        coin_accuracy("VQA", {}, references)
    with pytest.raises(UserError, match="nothing to score"):
        coin_accuracy("GQA", {}, references, "released")
