"""Scorers against hand-worked cases; ROUGE-L against rouge-score itself where that is defined."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from lcia.stream import SCORERS
from lcia.stream.scorers import answer_words, chosen_letter, default_scorer, normalise

exact, option_letter, rouge_l = SCORERS["exact"], SCORERS["option_letter"], SCORERS["rouge_l"]
laws = settings(deadline=None, derandomize=True, max_examples=150)


@given(st.text(max_size=40), st.lists(st.text(max_size=40), min_size=1, max_size=3))
@laws
def test_every_scorer_stays_in_the_unit_interval(prediction: str, references: list[str]) -> None:
    for name, scorer in SCORERS.items():
        assert 0.0 <= scorer(prediction, references) <= 1.0, name


@given(st.text(min_size=1, max_size=40).filter(str.strip), st.lists(st.text(max_size=20), max_size=3))
@laws
def test_a_reference_itself_scores_one_whatever_the_others_are(text: str, others: list[str]) -> None:
    assert exact(text, [*others, text]) == 1.0
    assert rouge_l(text, [*others, text]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("Trad Folk", "trad  folk"),
        (" The Blue Door.", "blue door"),
        ('"An apple"!', "apple"),
        ("ＣＡＦＥ", "cafe"),  # full width
        ("Straße", "STRASSE"),
        ("cafe\u0301", "café"),  # combining accent
        ("“yes”", "yes"),
        ("[0.1, 0.2]", "[0.1, 0.2]."),
        ("你好。", "你好"),
        ("...", "…"),
        ("A", "a"),  # an article that is all there is
        ("-5", "-5"),
    ],
)
def test_exact_accepts(prediction: str, reference: str) -> None:
    assert exact(prediction, [reference]) == 1.0


@pytest.mark.parametrize(
    ("prediction", "reference"),
    [
        ("", "yes"),
        (".", "yes"),
        ("3.5", "35"),
        (".5", "5"),
        ("-5", "5"),
        ("C++", "C"),
        ("yes it is", "yes"),
        ("theory", "ory"),
        ("restaurant reservation", "restaurant-reservation"),
    ],
)
def test_exact_refuses(prediction: str, reference: str) -> None:
    assert exact(prediction, [reference]) == 0.0


def test_exact_needs_one_of_the_references() -> None:
    assert exact("b", ["x", "B."]) == 1.0
    assert exact("b", []) == 0.0
    assert normalise("The  End.") == "end"


@pytest.mark.parametrize(
    "answer",
    [
        "B",
        "b",
        " B\n",
        "B.",
        "(B)",
        "[b]",
        "**B**",
        "Ｂ",
        "B. banking",
        "B) banking",
        "B)banking",
        "b) banking",
        "(B) banking",
        "**B.** banking",
        "B: a dog",
        "B\nbecause banking fits.",
        "The answer is B",
        "the answer is B.",
        "The answer is: B",
        "The answer is B because A is a dog",
        "Answer: B",
        "answer=(B)",
        "Option B",
        "Option B is right",
        "The correct option is B.",
        "The answer would be 'B'",
        "I would take (B).",
        r"so \boxed{B}",
        "I think the answer is B",
        "A dog is shown, so the answer is B",
        "答案是B",
        "答案：Ｂ。",
        "选项 B",
    ],
)
def test_these_answers_choose_b(answer: str) -> None:
    assert chosen_letter(answer) == "B"
    assert option_letter(answer, ["B"]) == 1.0
    assert option_letter(answer, ["A"]) == 0.0


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " ",
        ".",
        "A dog",
        "a dog",
        "A dog, I think",
        "I think so",
        "I'm sure",
        "banking",
        "Bank",
        "A.I. is a field",
        "The answer is A dog",
        "the answer is a dog",
        "The answer is banking",
        "The answer is not B",
        "A or B",
        "A, B",
        "(A) or (B)",
        "A. home\nB. credit cards\nC. banking",  # the options repeated
        "The answer is B. No, the answer is C.",
        "Vitamin C is good",
        "AB",
        "B2",
        "5",
        "Б",  # Cyrillic
    ],
)
def test_these_answers_choose_nothing(answer: str) -> None:
    assert chosen_letter(answer) is None
    assert all(option_letter(answer, [letter]) == 0.0 for letter in "ABC")


def test_option_a_and_i_are_options_where_they_are_announced() -> None:
    for answer in ("A", "A.", "A) a dog", "The answer is A.", "The answer is A", "Option A is right", "(A)"):
        assert chosen_letter(answer) == "A", answer
    assert chosen_letter("The answer is A because dogs bark") == "A"
    assert chosen_letter("The answer is I.") == "I"


def test_a_reference_may_be_the_letter_with_its_option() -> None:
    assert option_letter("C", ["C. banking"]) == 1.0


@given(
    st.text(st.characters(max_codepoint=127), max_size=60),
    st.text(st.characters(max_codepoint=127), max_size=60),
)
@laws
def test_rouge_l_is_rouge_scores_own_number_on_ascii(prediction: str, reference: str) -> None:
    original = RougeScorer(["rougeL"], use_stemmer=True).score(reference, prediction)["rougeL"].fmeasure
    if any(char.isalnum() for char in reference):
        assert rouge_l(prediction, [reference]) == original


def test_rouge_l_by_hand() -> None:
    # tokens: the cat sat down | the cat sat, longest common subsequence 3: P 3/4, R 3/3
    assert rouge_l("The cats sat down.", ["the cat sat"]) == pytest.approx(2 * 0.75 / 1.75)
    assert rouge_l("x", ["the cat sat", "x y"]) == pytest.approx(2 / 3)
    assert rouge_l("anything", []) == 0.0


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("我喜欢苹果", "我喜欢苹果。", 1.0),
        ("我喜欢苹果", "我喜欢梨", 2 * (3 / 5) * (3 / 4) / (3 / 5 + 3 / 4)),
        ("天气", "苹果", 0.0),
        ("iPhone 很好", "iphone不好", 2 / 3),  # iphone, 很, 好 | iphone, 不, 好
        ("кошка сидит", "Кошка спит", 0.5),  # spaced script: by words
        ("हिन्दी भाषा", "हिन्दी", 2 / 3),  # vowel signs stay in their word
        ("ลูกแมว", "ลูกแมว", 1.0),
        ("🙂", "🙂", 1.0),  # no words at all: exact
        ("🙁", "🙂", 0.0),
        ("", "我", 0.0),
    ],
)
def test_rouge_l_in_other_scripts(prediction: str, reference: str, expected: float) -> None:
    assert rouge_l(prediction, [reference]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answers", "scorer"),
    [
        (["A", "B", "D"], "option_letter"),
        (["A", "b"], "exact"),
        (["A", "yes"], "exact"),
        (["translate", "restaurant reservation"], "exact"),
        (["one two three four five"], "exact"),
        (["one two three four five six"], "rouge_l"),
        (["yes", "a b c d e f g", "a b c d e f g"], "rouge_l"),  # the median decides
        (["我喜欢苹果和梨"], "rouge_l"),
        (["苹果"], "exact"),
    ],
)
def test_default_scorer(answers: list[str], scorer: str) -> None:
    assert default_scorer(answers) == scorer


def test_answer_words() -> None:
    assert answer_words("two words") == 2
    assert answer_words("我喜欢") == 3
    assert answer_words("") == 0
