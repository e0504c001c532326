"""How many tokens each row takes."""

from __future__ import annotations

from dataclasses import dataclass

from lcia.backbone import Reader
from lcia.stream import Row


@dataclass(frozen=True)
class Length:
    """Tokens of one row."""

    prompt: int
    answer: int

    @property
    def total(self) -> int:
        return self.prompt + self.answer


class Lengths:
    """Counts rows as `reader` encodes them, each once."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._counted: dict[Row, Length] = {}

    def __call__(self, row: Row) -> Length:
        if row not in self._counted:
            encoded = self._reader.encode(row)
            self._counted[row] = Length(len(encoded.prompt), len(encoded.answer))
        return self._counted[row]
