"""How many tokens each row takes, without opening its images: a processor looks at their sizes only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from PIL import Image

from lcia.backbone import Reader
from lcia.backbone.chat import encode_answers, lacks_special_tokens, render_prompt
from lcia.backbone.images import square_size
from lcia.backbone.reader import ImageReader
from lcia.errors import UserError
from lcia.stream import Row

_PROBES = ((336, 336), (1600, 200), (200, 1600), (2000, 2000))  # pixels: width, height
_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Length:
    """Tokens of one row."""

    prompt: int
    answer: int

    @property
    def total(self) -> int:
        return self.prompt + self.answer


class Lengths:
    """Counts rows as the model's reader would encode them.

    Args:
        padding: of images, as the configuration's `image_padding`.
    """

    def __init__(self, reader: Reader, padding: str | None = None) -> None:
        self._reader = reader
        self._padding = padding
        self._of_size = cache(self._tokens_of_size)
        self._counted: dict[Row, Length] = {}

    def __call__(self, row: Row) -> Length:
        if row not in self._counted:
            self._counted[row] = self._count(row)
        return self._counted[row]

    def _count(self, row: Row) -> Length:
        if not row.images:
            encoded = self._reader.encode(row)
            return Length(len(encoded.prompt), len(encoded.answer))
        chat = self._reader.chat
        text = render_prompt(chat, row.opening.messages, len(row.images))
        written = self._reader.tokenizer(text, add_special_tokens=lacks_special_tokens(chat, text))["input_ids"]
        shown = sum(self._tokens_of_image(path, row) for path in row.images)
        answer, _ = encode_answers(chat, row)
        return Length(len(written) + shown, len(answer))

    def _tokens_of_image(self, path: str, row: Row) -> int:
        if self.tokens_of_any_image is not None:
            return self.tokens_of_any_image
        try:
            with Image.open(path) as image:  # reads the size; pixels are not decoded
                turned = image.getexif().get(_ORIENTATION) in _TURNED
                return self._of_size(*(image.size[::-1] if turned else image.size))
        except (OSError, Image.DecompressionBombError, SyntaxError) as error:
            raise UserError(f"{row.source}: image {path}: {error}") from None

    @property
    def tokens_of_any_image(self) -> int | None:
        """Beside the one that marks an image's place; None where that depends on the image's size."""
        found = {self._of_size(*size) for size in _PROBES}
        return found.pop() if len(found) == 1 else None

    def _tokens_of_size(self, width: int, height: int) -> int:
        assert isinstance(self._reader, ImageReader)
        mark, chat = self._reader.image_token, self._reader.chat
        size = (width, height) if self._padding is None else square_size(width, height)
        shown = chat(text=[mark], images=[[Image.new("RGB", size)]], add_special_tokens=False)
        written = self._reader.tokenizer(mark, add_special_tokens=False)["input_ids"]
        return len(shown["input_ids"][0]) - len(written)
