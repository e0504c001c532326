"""The prompt of Super-NaturalInstructions: definition, positive examples, instance (arXiv 2204.07705, App. B)."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from lcia.errors import UserError


def super_ni_prompt(definition: str, examples: Sequence[tuple[str, str]], question: str) -> tuple[str, tuple[str, ...]]:
    """The "definition + k positive examples" prompt, as CITB trains T5 with it.

    A part that does not end in punctuation gets a full stop. The spaces before `Positive` and `Output` of an example
    are the original's.

    Returns:
        The text, and the blocks of it that show an example each, one right behind the other.
    """
    head = _ended(f"Definition: {definition.strip()}") + "\n\n"
    demonstrations = tuple(
        f" Positive Example {number} -\n"
        + _ended(f"Input: {shown.strip()}")
        + "\n"
        + _ended(f" Output: {answer.strip()}")
        + "\n\n"
        for number, (shown, answer) in enumerate(examples, start=1)
    )
    asked = "Now complete the following example -\n" + _ended(f"Input: {question.strip()}") + "\nOutput: "
    return head + "".join(demonstrations) + asked, demonstrations


def _ended(part: str) -> str:
    return part if part[-1] in string.punctuation else f"{part}."


def positive_examples(value: Any, where: str) -> tuple[tuple[str, str], ...]:
    """(input, output) of each positive example of a task.

    Args:
        value: a list of {input, output}, as a task file or tasks.json states it; None where it states none.
        where: the file, for messages.

    Raises:
        UserError: it is something else.
    """
    if value is None:
        return ()
    if not isinstance(value, list):
        raise UserError(f"{where}: positive examples must be a list of {{input, output}}")
    found = []
    for number, example in enumerate(value):
        shown, answer = (example.get("input"), example.get("output")) if isinstance(example, dict) else (None, None)
        if not isinstance(shown, str) or not isinstance(answer, str):
            raise UserError(f"{where}: positive example [{number}] must have the texts 'input' and 'output'")
        found.append((shown, answer))
    return tuple(found)
