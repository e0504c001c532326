"""How a prediction is compared with its references: one function per scorer, each in [0, 1].

SCORERS is the registry: `SCORERS["exact"]("The Blue Door.", ["blue door"]) == 1.0`.
"""

from __future__ import annotations

import re
import statistics
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from lcia.stream import coin_released as coin
from lcia.stream.boxes import box_iou
from lcia.stream.vqa import vqa_short, vqa_soft

Scorer = Callable[[str, Sequence[str]], float]

SHORT_ANSWER_WORDS = 5  # answers of at most so many words (median) are compared exactly

_QUOTES = "\"'`‘’‚‛“”„‟«»‹›「」『』"
_BRACKETS = "()[]{}<>【】〈〉《》"
_OPENING = _QUOTES + _BRACKETS + "¿¡"
_CLOSING = _QUOTES + _BRACKETS + ".,;:!?。、，；：！？"


def normalise(text: str) -> str:
    """What `exact` compares: NFKC, case folded, spaces collapsed, ends cleaned, one leading article dropped.

    Quotes, brackets and sentence punctuation go from both ends only (a leading full stop stays: ".5").
    Inside the text punctuation carries meaning ("3.5", "well-known"), so it stays, unlike in SQuAD. A text
    made of punctuation alone is kept.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    trimmed = _trim(" ".join(folded.split()))
    return _trim(re.sub(r"^(?:a|an|the) (?=\S)", "", trimmed))


def _trim(text: str) -> str:
    return text.lstrip(_OPENING + " ").rstrip(_CLOSING + " ") or text


def exact(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction equals a reference after `normalise`."""
    return float(normalise(prediction) in {normalise(reference) for reference in references})


# A letter is an option when it stands alone. "A" and "I" are words too: before another word they count only
# after "option", "choice" or "letter".
_NO_WORD = r"(?!['’]?[A-Za-z0-9])"
_WHOLE = re.compile(r"[\s\"'`*(\[{]*([A-Za-z])[\s\"'`*)\]}.,:;!]*")
_LINE_START = re.compile(r"^[\s\"'`*(\[{]*([A-Za-z])(?:[)\]}*]|[.:](?!\w)|[ \t]*$)", re.MULTILINE)
_BRACKETED = re.compile(r"[(\[{]([A-Z])[)\]}]")
_NAMED = re.compile(rf"(?:\b(?i:option|choice|letter)\s+|(?:选项|选择|选)\s*)([A-Z]){_NO_WORD}")
_ANNOUNCED = re.compile(
    r"(?:\b(?i:answer|option|choice|letter)|答案|选项)\s*(?i:is|would be|should be|是|为)?\s*[:=]?\s*"
    r"[\"'`*(\[{]*"
    rf"([A-Z]){_NO_WORD}(?!(?<=[AI])[ \t]+(?!because\b|since\b)\w)"
)


def chosen_letter(text: str) -> str | None:
    """The option that an answer names, as a capital letter, or None where it names none or several.

    Counted: the letter alone, as the whole answer or on a line ("B", "b.", "(B)", "**B**"); with a mark at
    the start of a line ("B. banking", "b) banking", "B: banking"); a capital in brackets ("I take (B)"); a
    capital announced by answer, option, choice or letter ("The answer is B", "Option B is right", "答案是B").
    Not counted: a word or its beginning ("A dog", "I think", "The answer is A dog"), a letter in running
    text. An answer that names two letters, such as one that repeats the options, names none.
    """
    text = unicodedata.normalize("NFKC", text)
    alone = _WHOLE.fullmatch(text)
    if alone:
        return alone[1].upper()
    found = [match[1] for match in _LINE_START.finditer(text)]
    for pattern in (_BRACKETED, _NAMED, _ANNOUNCED):
        found += [match[1] for match in pattern.finditer(text)]
    letters = {letter.upper() for letter in found}
    return letters.pop() if len(letters) == 1 else None


def option_letter(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction chooses the letter of a reference; 0 where either names no single letter."""
    letter = chosen_letter(prediction)
    return float(letter is not None and letter in {chosen_letter(reference) for reference in references})


_TRUTH = re.compile(r"\b(true|false)\b")
_NEGATED = re.compile(r"(?:\bnot|\bnever|n['’]t)\s+(?:true|false)\b")


def chosen_truth(text: str) -> bool | None:
    """What an answer says of a statement: "True.", "The statement is false"; None for neither, both, or "not true"."""
    text = unicodedata.normalize("NFKC", text).casefold()
    words = set(_TRUTH.findall(text))
    return words == {"true"} if len(words) == 1 and not _NEGATED.search(text) else None


def true_false(prediction: str, references: Sequence[str]) -> float:
    """1 if prediction and a reference say the same of the statement, true or false."""
    truth = chosen_truth(prediction)
    return float(truth is not None and truth in {chosen_truth(reference) for reference in references})


def ocr(prediction: str, references: Sequence[str]) -> float:
    """1 if the transcript is a reference's: NFKC, without case, runs of spaces as one; every other character counts."""
    return float(_transcript(prediction) in map(_transcript, references))


def _transcript(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L F1 with stemming, the best over the references (rouge-score; Lin 2004).

    On ASCII text this is rouge-score's own number. Its tokenizer drops every other character, so other
    scripts go through `_words`; a reference without any word (an emoji, "+") is compared by `exact`.
    """
    scorer = _rouge_scorer()
    return max((_rouge_one(scorer, prediction, reference) for reference in references), default=0.0)


def _rouge_one(scorer: Any, prediction: str, reference: str) -> float:
    if not _words(reference):
        return exact(prediction, [reference])
    return float(scorer.score(reference, prediction)["rougeL"].fmeasure)


@cache
def _rouge_scorer() -> Any:
    # imported here: rouge-score brings nltk, seconds that only this scorer needs
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    stem = DefaultTokenizer(use_stemmer=True).tokenize

    class AnyScript:
        def tokenize(self, text: str) -> list[str]:
            return [token for word in _words(text) for token in (stem(word) if word.isascii() else [word])]

    return RougeScorer(["rougeL"], tokenizer=AnyScript())


# Scripts written without spaces between words: each character is a token.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)


def _is_unspaced(char: str) -> bool:
    return any(first <= ord(char) <= last for first, last in _UNSPACED)


def _words(text: str) -> list[str]:
    """Lower-case runs of letters, marks and digits; a character of an unspaced script is a word."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    words: list[str] = []
    joined = False
    for char in text.lower():
        # marks belong to the letter before them: Devanagari vowels, Arabic points
        in_word = char.isalnum() or unicodedata.category(char).startswith("M")
        if in_word and joined and not _is_unspaced(char):
            words[-1] += char
        elif in_word:
            words.append(char)
        joined = in_word and not _is_unspaced(char)
    return words


def answer_words(text: str) -> int:
    """Length of an answer in words: pieces between spaces, characters where a script has no spaces."""
    return sum(max(1, sum(map(_is_unspaced, piece))) for piece in text.split())


def default_scorer(answers: Sequence[str]) -> str:
    """The scorer for a task that names none, from its training answers.

    `option_letter` if each is one letter A-Z, else `exact` if the median is at most SHORT_ANSWER_WORDS words,
    else `rouge_l`.
    """
    if all(re.fullmatch(r"[A-Z]", answer.strip()) for answer in answers):
        return "option_letter"
    if statistics.median(answer_words(answer) for answer in answers) <= SHORT_ANSWER_WORDS:
        return "exact"
    return "rouge_l"


SCORERS: dict[str, Scorer] = {
    "exact": exact,
    "option_letter": option_letter,
    "rouge_l": rouge_l,
    "true_false": true_false,
    "ocr": ocr,
    "vqa_short": vqa_short,
    "vqa_soft": vqa_soft,
    "box_iou": box_iou,
    "coin_scienceqa_released": coin.coin_scienceqa_released,
    "coin_textvqa_released": coin.coin_textvqa_released,
    "coin_imagenet_released": coin.coin_imagenet_released,
    "coin_gqa_released": coin.coin_gqa_released,
    "coin_vqa_released": coin.coin_vqa_released,
    "coin_ocrvqa_released": coin.coin_ocrvqa_released,
    "coin_grounding_released": coin.coin_grounding_released,
}
