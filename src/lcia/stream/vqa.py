"""Short answers to questions about images, compared as EvalAI's VQA servers do (arXiv 1505.00468, 1904.08920)."""

from __future__ import annotations

import re
from collections.abc import Sequence

_ARTICLES = {"a", "an", "the"}
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_DIGITS)}
_MARKS = ';/[]"{}()=+\\_-><@`!'
# A word that lacks one apostrophe of these gets it back.
_CONTRACTIONS = re.findall(
    r"\S+",
    """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've
    must've mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've
    somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll
    that's there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've
    weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're
    you've
    """,
)
_RESTORED = {
    whole[:place] + whole[place + 1 :]: whole
    for whole in _CONTRACTIONS
    for place, char in enumerate(whole)
    if char == "'"
} | {"somebody'd": "somebodyd"}  # EvalAI's table has this one the wrong way round


def evalai_normalise(text: str) -> str:
    """What EvalAI compares: lower case, no articles, number words as digits, marks gone or turned into spaces.

    Its quirks are part of it: a mark that stands beside a space anywhere in the text vanishes, elsewhere it becomes a
    space ("t-shirt" → "t shirt", "a - b" → "b"); only the first 32 full stops go.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = before = text.replace("\n", " ").replace("\t", " ").strip()
    for mark in _MARKS:
        beside_space = f"{mark} " in before or f" {mark}" in before
        text = text.replace(mark, "" if beside_space else " ")
    text = re.sub(r"\.(?!\d)", "", text, count=32)
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_short(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction equals a reference after `evalai_normalise`."""
    return float(evalai_normalise(prediction) in map(evalai_normalise, references))


ANNOTATORS = 10  # whose answers are the references of `vqa_soft`


def vqa_soft(prediction: str, references: Sequence[str]) -> float:
    """The VQA accuracy: mean over the n annotators of min(1, how many of the other n - 1 gave this answer / 3).

    Fewer than four references cannot be left out one by one: one of them must be met, as in `vqa_short`.
    """
    count = len(references)
    if count < 4:
        return vqa_short(prediction, references)
    answer = evalai_normalise(prediction)
    same = sum(evalai_normalise(reference) == answer for reference in references)
    if same == 0:
        return 0.0
    # left out is one who gave the answer (`same` times), or one who did not
    return (same * min(1.0, (same - 1) / 3) + (count - same) * min(1.0, same / 3)) / count
