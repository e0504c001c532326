"""Rows to token ids: the model's own chat template, loss on the answer only, left padding.

Left padding puts every answer at the right edge, so that a batch needs logits for its last few
positions only, and training and generation share one layout. An encoder-decoder takes prompt and
answer apart again (layout.py): whatever makes or reads batches need not know which kind of model it serves.

Shapes: B rows, L padded tokens, A padded answer tokens + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from lcia.stream import Row

IGNORED = -100  # the label of a position without loss, as in torch's cross entropy


@dataclass(frozen=True)
class Encoded:
    """Token ids of one row."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]  # ends with the token that ends a turn

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[tuple[str, str]]) -> str:
    """The text the model sees before its answer. A tokenizer without a chat template gets plain lines.

    Text that ends in white space has been made to be answered right there ("... Output: "), and stays as it is.
    """
    if tokenizer.chat_template is None:
        return "".join(text if text[-1:].isspace() else f"{text}\n" for _, text in messages)
    turns = [{"role": role, "content": text} for role, text in messages]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def render_answer(tokenizer: PreTrainedTokenizerBase, messages: Sequence[tuple[str, str]], answer: str) -> str:
    """The answer as the template writes it, up to and with the end of the turn."""
    end = str(tokenizer.eos_token or "")
    prompt = render_prompt(tokenizer, messages)
    if tokenizer.chat_template is None:
        return answer + end
    turns = [{"role": role, "content": text} for role, text in [*messages, ("assistant", answer)]]
    full = str(tokenizer.apply_chat_template(turns, tokenize=False))
    # Some templates rewrite earlier turns once an answer follows; then the plain form is used.
    written = full[len(prompt) :] if full.startswith(prompt) else answer
    if end and end in written[len(answer) :]:
        # What a template writes behind the end of the turn is never generated: no loss on it.
        return written[: written.index(end, len(answer)) + len(end)]
    return written + end


def encode_row(tokenizer: PreTrainedTokenizerBase, row: Row) -> Encoded:
    """Prompt and answer tokenised apart, so that generation starts from the very tokens trained on."""
    special = tokenizer.chat_template is None  # a template writes its own special tokens
    prompt = tokenizer(render_prompt(tokenizer, row.messages), add_special_tokens=special)["input_ids"]
    answer = tokenizer(render_answer(tokenizer, row.messages, row.outputs[0]), add_special_tokens=False)["input_ids"]
    return Encoded(tuple(prompt), tuple(answer))


def pad_left(sequences: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """(B, L) token ids, shorter sequences filled with `value` on the left."""
    length = max(len(sequence) for sequence in sequences)
    return torch.tensor([[value] * (length - len(sequence)) + list(sequence) for sequence in sequences])


def pad_right(sequences: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """(B, L) token ids, shorter sequences filled with `value` on the right."""
    length = max(len(sequence) for sequence in sequences)
    return torch.tensor([[*sequence, *[value] * (length - len(sequence))] for sequence in sequences])


def collate(rows: Sequence[Encoded], pad_id: int) -> dict[str, torch.Tensor]:
    """A training batch.

    Returns:
        input_ids, attention_mask, position_ids: (B, L); labels: (B, A), the right edge only: the loss
        shifts them against the logits of the last A positions.
    """
    sequences = [[*row.prompt, *row.answer] for row in rows]
    input_ids = pad_left(sequences, pad_id)
    attention_mask = pad_left([[1] * len(sequence) for sequence in sequences], 0)
    keep = max(len(row.answer) for row in rows) + 1  # the token before the answer predicts its first one
    keep = min(keep, input_ids.shape[1])
    labels = pad_left([[IGNORED] * (keep - len(row.answer)) + list(row.answer) for row in rows], IGNORED)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
        "labels": labels,
    }
