"""Rows to batches of one model: `Reader` for a model of text, `ImageReader` for one that sees as well.

Shapes: B rows, L padded tokens, A padded answer tokens + 1, D width of a query.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from lcia.backbone.chat import (
    Chat,
    Encoded,
    collate,
    encode_answers,
    encode_prompt,
    lacks_special_tokens,
    pad_left,
    render_prompt,
)
from lcia.backbone.images import Colour, image_size, open_image, padded_to_square, square_size
from lcia.errors import UserError
from lcia.files import file_sha256
from lcia.stream import Row

_PROBES = ((336, 336), (28, 28), (1600, 200), (200, 1600), (2000, 2000))  # pixels: width, height


class Reader:
    """What transformers calls a processor, for rows: token ids of one, tensors of several."""

    sees = False  # whether rows may have images
    positions: int | None = None  # for which the model has a vector: no sequence may be longer; None: it needs none
    # A method whose weights differ from row to row sets it: row → (D,), of its instruction or user_text, by which the
    # method tells rows apart.
    query: Callable[[Encoded], NDArray[np.float32]] | None = None

    def __init__(self, chat: Chat, tokenizer: PreTrainedTokenizerBase) -> None:
        self.chat = chat
        self.tokenizer = tokenizer

    def with_padding(self, padding: str | None) -> Reader:
        """The reader for rows whose images are padded first, as `image_padding` of a configuration says."""
        return self

    def check_size(self, width: int, height: int) -> None:
        """Raises UserError if images of so many pixels cannot be shown, whatever is on them."""
        raise UserError("the model reads text only")

    def settings(self) -> dict[str, Any]:
        """JSON values: all that makes tensors of a row, beside the row."""
        words = self.tokenizer
        spelling: Any = sorted(words.get_vocab())
        if words.is_fast:  # padding and truncation are what the last call asked for
            spelling = {**json.loads(words.backend_tokenizer.to_str()), "padding": None, "truncation": None}
        special = {name: str(token) for name, token in words.special_tokens_map.items()}
        return {"tokenizer": spelling, "special": special, "template": self.chat.chat_template}

    @property
    def pad_id(self) -> int:
        """`load_reader` sees to it that there is one."""
        return int(self.tokenizer.pad_token_id)

    def encode(self, row: Row) -> Encoded:
        """Prompt and answer; of a conversation whose every answer is learned, all behind its first question."""
        prompt = self.encode_prompt(row.opening)
        try:
            answer, unlearned = encode_answers(self.chat, row)
        except UserError as error:
            raise UserError(f"{row.source}: {error}") from None
        return replace(prompt, answer=answer, unlearned=unlearned)

    def encode_prompt(self, row: Row) -> Encoded:
        """The prompt alone, to be answered."""
        try:
            tokens = encode_prompt(self.chat, row)
        except UserError as error:
            raise UserError(f"{row.source}: {error}") from None
        return Encoded(tokens, (), instruction=row.instruction, user_text=row.user_text)

    def collate(self, rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """A batch: input_ids, attention_mask, position_ids (B, L); labels (B, A); see lcia.backbone.chat. Where
        somebody asks for it, also query (B, D).
        """
        batch = collate(rows, self.pad_id)
        if self.query is not None:
            batch["query"] = torch.from_numpy(np.stack([self.query(row) for row in rows]))
        return batch

    def content(self, row: Encoded) -> list[Any]:
        """JSON values that stand for what the model is shown."""
        return [*row.prompt, *([] if self.query is None else [row.instruction, row.user_text])]


class ImageReader(Reader):
    """For a vision-language model: its processor decides how an image is scaled, and how many tokens stand for it.

    The same preprocessing serves training and evaluation. Images are opened when a batch is made, and not kept: the
    tokens that stand for one depend on its size alone.

    Args:
        padding: square: an image is first put in the middle of a square of the processor's mean colour, which the
            processor makes 0; None: the processor sees it as it is.

    Raises:
        UserError: the processor has no mean colour.
    """

    sees = True
    chat: ProcessorMixin

    def __init__(self, chat: ProcessorMixin, tokenizer: PreTrainedTokenizerBase, padding: str | None = None) -> None:
        super().__init__(chat, tokenizer)
        self._alike: dict[int, bool] = {}  # number of images → whether `_assembled` gives the processor's own tokens
        self._of_size = cache(self._tokens_of_size)
        self._hashes: dict[str, str] = {}
        self._accepted: set[tuple[int, int]] = set()  # sizes that the processor takes
        self._padding = padding
        self._colour = None if padding is None else mean_colour(chat)

    def with_padding(self, padding: str | None) -> ImageReader:
        padded = ImageReader(self.chat, self.tokenizer, padding)
        padded.positions = self.positions
        return padded

    def settings(self) -> dict[str, Any]:
        # the processor's own class too: transformers has one with torchvision and one without, and pixels differ
        kind = type(self.chat.image_processor).__name__
        return {**super().settings(), "processor": self.chat.to_dict(), "images": kind, "padding": self._padding}

    def encode(self, row: Row) -> Encoded:
        self._check_text(row)  # later questions of a conversation are no part of its prompt
        return super().encode(row)

    def encode_prompt(self, row: Row) -> Encoded:
        self._check_text(row)
        if not row.images:
            return super().encode_prompt(row)
        try:
            text = render_prompt(self.chat, row.messages, len(row.images))
            tokens = self._tokens(text, row.images)
        except UserError as error:
            raise UserError(f"{row.source}: {error}") from None
        return Encoded(tokens, (), text, row.images, row.instruction, row.user_text)

    def _tokens(self, text: str, images: Sequence[str]) -> tuple[int, ...]:
        """Of a rendered prompt. The first one with so many images shows whether they can be assembled."""
        number = len(images)
        if self._alike.get(number):
            return self._assembled(text, images)
        own = tuple(self._process([text], [images])["input_ids"][0].tolist())
        if number not in self._alike:
            self._alike[number] = self._assembled(text, images) == own
        return own

    def _assembled(self, text: str, images: Sequence[str]) -> tuple[int, ...]:
        """What the tokenizer makes of the text, with all that stands for an image in the place of each mark."""
        written = self.tokenizer(text, add_special_tokens=lacks_special_tokens(self.chat, text))["input_ids"]
        mark = self.tokenizer.convert_tokens_to_ids(self.image_token)
        shown = iter([self._tokens_of_image(path) for path in images])
        return tuple(chain.from_iterable(next(shown, ()) if token == mark else (token,) for token in written))

    def _tokens_of_image(self, path: str) -> tuple[int, ...]:
        if self.tokens_of_any_image is not None:
            return self._of_size(*_PROBES[0])
        size = image_size(path)
        try:
            return self._of_size(*size)
        except UserError as error:
            raise UserError(f"image {path}: {error}") from None

    @cached_property
    def tokens_of_any_image(self) -> int | None:
        """How many stand for an image; None where that depends on its size."""
        found = {len(self._of_size(*size)) for size in _PROBES}
        return found.pop() if len(found) == 1 else None

    def _tokens_of_size(self, width: int, height: int) -> tuple[int, ...]:
        size = (width, height) if self._colour is None else square_size(width, height)
        shown = self._shown([self.image_token], [[Image.new("RGB", size)]], add_special_tokens=False)
        return tuple(shown["input_ids"][0].tolist())

    def _check_text(self, row: Row) -> None:
        if any(self.image_token in text for _, text in row.messages):
            raise UserError(f"{row.source}: its text holds {self.image_token!r}, which stands for an image; remove it")

    @cached_property
    def image_token(self) -> str:
        """How a prompt shows that an image stands there."""
        return str(self.chat.image_token)

    def collate(self, rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """The batch of a text model, and what the model's own processor adds: pixel_values and the like, the images of
        all rows one after another, and tensors with a number per token (B, L), 0 where no prompt with images is.
        """
        batch = super().collate(rows)
        seeing = [i for i, row in enumerate(rows) if row.images]
        if not seeing:
            return batch
        shown = self._process([rows[i].text for i in seeing], [rows[i].images for i in seeing])
        per_token = shown["input_ids"].shape  # (rows with images, their longest prompt), padded on the left
        for name, values in shown.items():
            if name in ("input_ids", "attention_mask"):
                continue
            if values.shape != per_token:
                batch[name] = values
                continue
            aligned = [[0] * len(row) for row in rows]
            for i, line in zip(seeing, values.tolist(), strict=True):
                prompt = len(rows[i].prompt)
                aligned[i][:prompt] = line[len(line) - prompt :]
            batch[name] = pad_left(aligned, 0)
        return batch

    def content(self, row: Encoded) -> list[Any]:
        for path in row.images:
            if path not in self._hashes:
                self._hashes[path] = file_sha256(Path(path))
        shown = [self._hashes[path] for path in row.images]
        return [*super().content(row), *shown, *([self._padding] if shown and self._padding else [])]

    def check_size(self, width: int, height: int) -> None:
        size = (width, height) if self._colour is None else square_size(width, height)
        if size not in self._accepted:
            self._shown([self.image_token], [[Image.new("RGB", size)]], add_special_tokens=False)
            self._accepted.add(size)

    def _process(self, texts: list[str], images: Sequence[Sequence[str]]) -> dict[str, torch.Tensor]:
        opened = [[open_image(path) for path in paths] for paths in images]
        try:
            shown = [[self._padded(image) for image in row] for row in opened]
            return self._shown(texts, shown, lacks_special_tokens(self.chat, texts[0]))
        except UserError as error:
            raise UserError(f"image {', '.join(path for paths in images for path in paths)}: {error}") from None

    def _padded(self, image: Image.Image) -> Image.Image:
        return image if self._colour is None else padded_to_square(image, self._colour)

    def _shown(
        self, texts: list[str], images: list[list[Image.Image]], add_special_tokens: bool
    ) -> dict[str, torch.Tensor]:
        try:
            shown = self.chat(
                text=texts,
                images=images,
                padding=True,
                padding_side="left",
                add_special_tokens=add_special_tokens,
                return_tensors="pt",
            )
        except (ValueError, ArithmeticError) as error:  # Qwen-VL's: one side over 200 times the other
            raise UserError(f"the model's processor refuses it: {error}") from None
        return dict(shown)


def mean_colour(chat: ProcessorMixin) -> Colour:
    """The colour that a processor's normalisation makes 0, rounded as LLaVA rounds it.

    Raises:
        UserError: the processor has none.
    """
    mean = getattr(chat.image_processor, "image_mean", None)  # not every processor normalises
    if not isinstance(mean, list | tuple) or len(mean) != 3:
        raise UserError("key 'image_padding': the model's processor has no mean colour to pad with; leave the key out")
    red, green, blue = (int(255 * part) for part in mean)
    return red, green, blue
