"""A JSON list read element by element, so that a file of hundreds of MB never lies in memory as a whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from lcia.errors import UserError
from lcia.stream.formats import DECODER

CHUNK = 1 << 20  # characters


def json_elements(path: Path) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON list, each with its number, from 1.

    Raises:
        UserError: the file cannot be read, is no JSON list, is broken, or ends before its list does.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from _elements(_Window(file), path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}): get the file again, or save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


class _Window:
    """The part of a file that is being decoded; `at` is where the reader stands in `text`."""

    def __init__(self, file: TextIO) -> None:
        self.text, self.at, self.ended = "", 0, False
        self._file = file

    def widen(self) -> None:
        """Read on, twice as far each time an element does not fit; what was passed is dropped."""
        chunk = self._file.read(max(CHUNK, len(self.text) - self.at))
        self.text, self.at, self.ended = self.text[self.at :] + chunk, 0, not chunk

    def peek(self) -> str:
        """The next character that is no blank; "" at the end of the file."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\r\n":
                    return self.text[self.at]
                self.at += 1
            if self.ended:
                return ""
            self.widen()


def _elements(window: _Window, path: Path) -> Iterator[tuple[int, Any]]:
    if window.peek() != "[":
        raise UserError(f"{path}: {_instead_of_a_list(window.text)}")
    number = 0
    closing = "["
    while closing != "]":
        window.at += 1  # past "[" or ","
        if window.peek() == "]" and number == 0:
            break
        number += 1
        yield number, _element(window, number, path)
        closing = window.peek()
        if closing == "":
            raise UserError(f"{path}: ends behind element {number}, inside its list: an incomplete download?")
        if closing not in ",]":
            raise UserError(f"{path}: broken JSON: expected ',' or ']' behind element {number}")
    window.at += 1
    if window.peek():
        raise UserError(f"{path}: text behind the end of the list")


def _element(window: _Window, number: int, path: Path) -> Any:
    while True:
        try:
            value, end = DECODER.raw_decode(window.text, window.at)
        except json.JSONDecodeError as error:
            if window.ended:
                raise UserError(f"{path}: {_fault(error, number)}") from None
        except ValueError as error:  # NaN, a key twice, a number of thousands of digits
            raise UserError(f"{path}: element {number}: {error}") from None
        except RecursionError:
            raise UserError(f"{path}: element {number} is nested too deeply for a row") from None
        else:
            # a number may go on behind the window: 0 and 0.5
            if window.ended or window.text[end : end + 1] in (" ", "\t", "\r", "\n", ",", "]"):
                window.at = end
                return value
        window.widen()


def _fault(error: json.JSONDecodeError, number: int) -> str:
    # a cut-off literal or escape is reported where it begins
    cut_off = error.pos >= len(error.doc.rstrip()) - 6 or error.msg.startswith("Unterminated")
    if cut_off:
        return f"ends inside element {number}: an incomplete download?"
    return f"broken JSON in element {number}: {error.msg}"


def _instead_of_a_list(text: str) -> str:
    start = text.lstrip()[:100]
    if not start:
        return "the file is empty"
    if start.startswith("version https://git-lfs"):
        return "a git-lfs pointer, not the data: fetch them with `git lfs pull`"
    if start.startswith("<"):
        return "a web page, not JSON: the download went wrong"
    return "must be a JSON list of rows"
