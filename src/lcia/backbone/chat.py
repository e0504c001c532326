"""Rows to token ids: the model's own chat template, loss on the answer only, left padding.

Left padding puts every answer at the right edge, so that a batch needs logits for its last few
positions only, and training and generation share one layout. An encoder-decoder takes prompt and
answer apart again (layout.py): whatever makes or reads batches need not know which kind of model it serves.

`Chat` below is what writes a conversation as the model knows it: a tokenizer, or the processor of a model that sees.

Shapes: B rows, L padded tokens, A padded answer tokens + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from lcia.errors import UserError
from lcia.stream import Row

Chat: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin
IGNORED = -100  # the label of a position without loss, as in torch's cross entropy


@dataclass(frozen=True)
class Encoded:
    """Token ids of one row."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]  # ends with the token that ends a turn
    text: str = ""  # of the prompt, where it shows images: they are read again for every batch
    images: tuple[str, ...] = ()  # absolute paths
    instruction: str = ""  # what the request is routed by
    user_text: str = ""  # see Row
    unlearned: tuple[int, ...] = ()  # places in `answer`: questions that stand between the answers of a conversation

    def __len__(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def labels(self) -> list[int]:
        """The tokens of `answer`, IGNORED where there is no loss."""
        labels = list(self.answer)
        for place in self.unlearned:
            labels[place] = IGNORED
        return labels


def _turns(chat: Chat, messages: Sequence[tuple[str, str]], images: int) -> list[dict[str, Any]]:
    """The conversation as templates take it; images stand before the text of the first user turn."""
    if isinstance(chat, PreTrainedTokenizerBase):
        return [{"role": role, "content": text} for role, text in messages]
    turns: list[dict[str, Any]] = [
        {"role": role, "content": [{"type": "text", "text": text}]} for role, text in messages
    ]
    first = next(turn for turn in turns if turn["role"] == "user")
    first["content"] = [{"type": "image"}] * images + first["content"]
    return turns


def _written(chat: Chat, messages: Sequence[tuple[str, str]], images: int, **options: Any) -> str:
    """By the model's chat template. Raises UserError where that refuses it: some take no system message."""
    try:
        return str(chat.apply_chat_template(_turns(chat, messages, images), tokenize=False, **options))
    except TemplateError as error:
        raise UserError(f"the model's chat template refuses the conversation: {error}") from None


def render_prompt(chat: Chat, messages: Sequence[tuple[str, str]], images: int = 0) -> str:
    """The text the model sees before its answer. Without a chat template that is plain lines.

    Text that ends in white space has been made to be answered right there ("... Output: "), and stays as it is.
    """
    if chat.chat_template is None:
        shown = f"{chat.image_token * images}\n" if images else ""
        return shown + "".join(text if text[-1:].isspace() else f"{text}\n" for _, text in messages)
    return _written(chat, messages, images, add_generation_prompt=True)


def render_answer(chat: Chat, messages: Sequence[tuple[str, str]], answer: str, images: int = 0) -> str:
    """The answer as the template writes it, up to and with the end of the turn."""
    end = str(_tokenizer(chat).eos_token or "")
    if chat.chat_template is None:
        return answer + end
    prompt = render_prompt(chat, messages, images)
    full = _render_answered(chat, [*messages, ("assistant", answer)], images)
    # Some templates rewrite earlier turns once an answer follows; then the plain form is used.
    written = full[len(prompt) :] if full.startswith(prompt) else answer
    if end and end in written[len(answer) :]:
        # What a template writes behind the end of the turn is never generated: no loss on it.
        return written[: written.index(end, len(answer)) + len(end)]
    return written + end


def _render_answered(chat: Chat, messages: Sequence[tuple[str, str]], images: int) -> str:
    """A conversation that ends with an answer, as it stands before the next question."""
    if chat.chat_template is None:
        return render_prompt(chat, messages, images)
    return _written(chat, messages, images)


def _render_question(chat: Chat, messages: Sequence[tuple[str, str]], answered: int, images: int) -> str:
    """What stands between the last of the first `answered` turns, an answer as `render_answer` writes it, and the
    answer to the last of all turns.
    """
    *before, (_, answer) = messages[:answered]
    full = _render_answered(chat, messages[:answered], images)
    prompt = render_prompt(chat, messages, images)
    if not prompt.startswith(full):
        raise UserError(
            "the model's chat template writes the earlier turns of a conversation in another way than when they were "
            "answered: their answers cannot be learned together"
        )
    answer_end = render_prompt(chat, before, images) + render_answer(chat, before, answer, images)
    # a template may write no end of the turn behind earlier answers (LLaVA's)
    return (full.removeprefix(answer_end) if full.startswith(answer_end) else "") + prompt[len(full) :]


def _tokenizer(chat: Chat) -> PreTrainedTokenizerBase:
    return chat if isinstance(chat, PreTrainedTokenizerBase) else chat.tokenizer


def encode_row(chat: Chat, row: Row) -> Encoded:
    """Prompt and answer of a row without images, tokenised apart: generation starts from the very tokens trained on."""
    prompt, (answer, unlearned) = encode_prompt(chat, row.opening), encode_answers(chat, row)
    return Encoded(prompt, answer, instruction=row.instruction, user_text=row.user_text, unlearned=unlearned)


def encode_prompt(chat: Chat, row: Row) -> tuple[int, ...]:
    text = render_prompt(chat, row.messages)
    return tuple(_tokenizer(chat)(text, add_special_tokens=lacks_special_tokens(chat, text))["input_ids"])


def lacks_special_tokens(chat: Chat, prompt: str) -> bool:
    """Whether the tokenizer has to add its special tokens to a rendered prompt.

    A tokenizer's template writes them itself. A processor's may leave out the one that begins a text (LLaVA-1.5's
    does), and transformers then lets the tokenizer add it.
    """
    if chat.chat_template is None:
        return True
    begin = _tokenizer(chat).bos_token
    return isinstance(chat, ProcessorMixin) and not (begin is not None and prompt.startswith(str(begin)))


def encode_answer(chat: Chat, row: Row) -> tuple[int, ...]:
    text = render_answer(chat, row.messages, row.outputs[0], len(row.images))
    return tuple(_tokenizer(chat)(text, add_special_tokens=False)["input_ids"])


def encode_answers(chat: Chat, row: Row) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens behind `row.opening`, from its first answer to its last, and which of them are questions.

    Raises:
        UserError: the model's template does not let the answers of a conversation be learned together.
    """
    first, images = len(row.opening.messages), len(row.images)
    turns = (*row.messages, ("assistant", row.outputs[0]))
    answers = [place for place in range(first, len(turns)) if turns[place][0] == "assistant"]
    ids: list[int] = []
    questions: list[int] = []
    for number, place in enumerate(answers):
        if number:
            text = _render_question(chat, turns[:place], answers[number - 1] + 1, images)
            question = _tokenizer(chat)(text, add_special_tokens=False)["input_ids"]
            questions += range(len(ids), len(ids) + len(question))
            ids += question
        ids += encode_answer(chat, replace(row, messages=turns[:place], outputs=(turns[place][1],)))
    return tuple(ids), tuple(questions)


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
    labels = pad_left([[IGNORED] * (keep - len(row.answer)) + row.labels for row in rows], IGNORED)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
        "labels": labels,
    }
