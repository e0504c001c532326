"""Rows to batches of one model: `Reader` for a model of text, `ImageReader` for one that sees as well.

Shapes: B rows, L padded tokens, A padded answer tokens + 1, D width of a query.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from lcia.backbone.chat import Chat, Encoded, collate, encode_answer, encode_prompt, pad_left, render_prompt
from lcia.backbone.images import open_image
from lcia.errors import UserError
from lcia.files import file_sha256
from lcia.stream import Row


class Reader:
    """What transformers calls a processor, for rows: token ids of one, tensors of several."""

    sees = False  # whether rows may have images
    # A method whose weights differ from row to row sets it: instruction → (D,), by which it tells rows apart.
    query: Callable[[str], NDArray[np.float32]] | None = None

    def __init__(self, chat: Chat, tokenizer: PreTrainedTokenizerBase) -> None:
        self.chat = chat
        self.tokenizer = tokenizer

    @property
    def pad_id(self) -> int:
        """`load_reader` sees to it that there is one."""
        return int(self.tokenizer.pad_token_id)

    def encode(self, row: Row) -> Encoded:
        """Prompt and answer."""
        return replace(self.encode_prompt(row), answer=encode_answer(self.chat, row))

    def encode_prompt(self, row: Row) -> Encoded:
        """The prompt alone, to be answered."""
        return Encoded(encode_prompt(self.chat, row), (), instruction=row.instruction)

    def collate(self, rows: Sequence[Encoded]) -> dict[str, torch.Tensor]:
        """A batch: input_ids, attention_mask, position_ids (B, L); labels (B, A); see lcia.backbone.chat. Where
        somebody asks for it, also query (B, D).
        """
        batch = collate(rows, self.pad_id)
        if self.query is not None:
            batch["query"] = torch.from_numpy(np.stack([self.query(row.instruction) for row in rows]))
        return batch

    def content(self, row: Encoded) -> list[Any]:
        """JSON values that stand for what the model is shown."""
        return [*row.prompt, *([] if self.query is None else [row.instruction])]


class ImageReader(Reader):
    """For a vision-language model: its processor decides how an image is scaled, and how many tokens stand for it.

    The same preprocessing serves training and evaluation. Images are read when a batch is made, not kept.
    """

    sees = True
    chat: ProcessorMixin

    def __init__(self, chat: ProcessorMixin, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(chat, tokenizer)
        self._prompts: dict[tuple[str, tuple[str, ...]], tuple[int, ...]] = {}
        self._hashes: dict[str, str] = {}

    def encode_prompt(self, row: Row) -> Encoded:
        if any(self.image_token in text for _, text in row.messages):
            raise UserError(f"{row.source}: its text holds {self.image_token!r}, which stands for an image; remove it")
        if not row.images:
            return super().encode_prompt(row)
        text = render_prompt(self.chat, row.messages, len(row.images))
        if (text, row.images) not in self._prompts:
            try:
                shown = self._process([text], [row.images])
            except UserError as error:
                raise UserError(f"{row.source}: {error}") from None
            self._prompts[text, row.images] = tuple(shown["input_ids"][0].tolist())
        return Encoded(self._prompts[text, row.images], (), text, row.images, row.instruction)

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
        return [*super().content(row), *(self._hashes[path] for path in row.images)]

    def _process(self, texts: list[str], images: Sequence[Sequence[str]]) -> dict[str, torch.Tensor]:
        special = self.chat.chat_template is None
        shown = self.chat(
            text=texts,
            images=[[open_image(Path(path)) for path in paths] for paths in images],
            padding=True,
            padding_side="left",
            add_special_tokens=special,
            return_tensors="pt",
        )
        return dict(shown)
