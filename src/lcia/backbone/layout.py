"""The two kinds of language model side by side: how each takes a prompt and gives an answer.

Rows and batches (chat.py) are the same for both. What differs is chosen once, by the model's configuration, and stands
here.

Shapes: B rows, L padded tokens, P padded prompt tokens, A padded answer tokens + 1, N answer tokens, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
)

from lcia.backbone import prefix
from lcia.backbone.chat import IGNORED, Encoded, pad_left, pad_right

Batch = Mapping[str, torch.Tensor]


class Limits(Protocol):
    """The two lengths of a configuration, in tokens."""

    @property
    def max_length(self) -> int: ...

    @property
    def max_new_tokens(self) -> int: ...


class Layout(ABC):
    """One kind of model."""

    auto_model: ClassVar[Any]  # transformers' class that loads it
    models: ClassVar[Mapping[Any, Any]]  # configuration class → model class, all that `auto_model` knows
    peft_task: ClassVar[str]  # PEFT's name of its task

    @abstractmethod
    def answer_logits(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, V) logits in fp32 and (N,) targets of the answer tokens of a batch from `collate`, row after row."""

    @abstractmethod
    def generate(
        self, model: Any, prompts: Sequence[Sequence[int]], pad_id: int, max_new_tokens: int, **options: Any
    ) -> torch.Tensor:
        """(B, new) token ids of the answers, by the model's own generation_config; `options` go to its `generate`."""

    @abstractmethod
    def length(self, encoded: Encoded) -> int:
        """The tokens of a row that `max_length` limits."""

    @abstractmethod
    def limit_text(self, limits: Limits) -> str:
        """What `fits` holds a row against, for messages."""

    @abstractmethod
    def fits(self, prompt: int, answer: int, limits: Limits) -> bool:
        """Whether so many tokens of prompt and answer fit; a prompt to be answered needs room for `max_new_tokens`."""


class DecoderOnly(Layout):
    """Prompt and answer are one sequence."""

    auto_model = AutoModelForCausalLM
    models = MODEL_FOR_CAUSAL_LM_MAPPING
    peft_task = "CAUSAL_LM"

    def answer_logits(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits are computed for the right edge only: prompt positions have no loss, and the vocabulary projection
        is a large part of a small model's step. What all prompts begin with is computed once.
        """
        labels, position_ids = batch["labels"], batch["position_ids"]  # (B, A), (B, L)
        mask, length = batch["attention_mask"], batch["input_ids"].shape[1]
        cache = prefix.of_batch(model, batch)
        if cache is not None:
            shared = cache.get_seq_length()
            length -= shared
            # of a row shorter than L, tokens of the prefix stand among the last ones again: not to be seen twice
            own = (mask[:, -length:].bool() & (position_ids[:, -length:] >= shared)).long()
            mask = torch.cat([mask.new_ones(len(own), shared), own], dim=1)
        # As indices, not as a number: what a slice leaves is not contiguous, and torch's product of that with the
        # vocabulary matrix copies the matrix once per row.
        answers = torch.arange(length - labels.shape[1], length, device=labels.device)
        logits = model(
            input_ids=batch["input_ids"][:, -length:],
            attention_mask=mask,
            position_ids=position_ids[:, -length:],
            logits_to_keep=answers,
            past_key_values=cache,
            use_cache=cache is not None,
        ).logits  # (B, A, V)
        targets = labels[:, 1:]
        kept = targets != IGNORED
        return logits[:, :-1][kept].float(), targets[kept]

    def generate(
        self, model: Any, prompts: Sequence[Sequence[int]], pad_id: int, max_new_tokens: int, **options: Any
    ) -> torch.Tensor:
        device = next(model.parameters()).device
        # `options` may say that rows have weights of their own: then no prefix is the same
        cache = None if options else prefix.of_prompts(model, prompts)
        shared = 0 if cache is None else cache.get_seq_length()
        rest = [prompt[shared:] for prompt in prompts]
        start = torch.tensor([list(prompts[0][:shared])] * len(prompts), dtype=torch.long)  # (B, shared)
        input_ids = torch.cat([start, pad_left(rest, pad_id)], dim=1).to(device)  # (B, P)
        attention_mask = torch.cat([torch.ones_like(start), pad_left([[1] * len(r) for r in rest], 0)], dim=1)
        output = model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask.to(device),
            max_new_tokens=max_new_tokens,
            past_key_values=cache,
            logits_to_keep=torch.tensor([-1], device=device),  # as indices: see `answer_logits`
            **options,
        )
        return output[:, input_ids.shape[1] :]

    def length(self, encoded: Encoded) -> int:
        return len(encoded)

    def limit_text(self, limits: Limits) -> str:
        return f"max_length {limits.max_length}"

    def fits(self, prompt: int, answer: int, limits: Limits) -> bool:
        return prompt + answer <= limits.max_length


class EncoderDecoder(Layout):
    """The prompt is the encoder's sequence, the answer the decoder's (T5, arXiv 1910.10683)."""

    auto_model = AutoModelForSeq2SeqLM
    models = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
    peft_task = "SEQ_2_SEQ_LM"

    def answer_logits(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        inner = extract_model_from_parallel(model)
        is_answer = torch.zeros_like(batch["attention_mask"], dtype=torch.bool)  # (B, L)
        is_answer[:, -batch["labels"].shape[1] :] = batch["labels"] != IGNORED
        is_prompt = batch["attention_mask"].bool() & ~is_answer
        targets = flush_left(batch["input_ids"], is_answer, IGNORED)  # (B, A - 1)
        logits = model(
            input_ids=flush_left(batch["input_ids"], is_prompt, 0),  # (B, P); what stands behind a prompt is masked
            attention_mask=flush_left(is_prompt.long(), is_prompt, 0),
            decoder_input_ids=inner.prepare_decoder_input_ids_from_labels(targets),
            use_cache=False,
        ).logits  # (B, A - 1, V)
        kept = targets != IGNORED
        return logits[kept].float(), targets[kept]

    def generate(
        self, model: Any, prompts: Sequence[Sequence[int]], pad_id: int, max_new_tokens: int, **options: Any
    ) -> torch.Tensor:
        device = next(model.parameters()).device
        input_ids = pad_right(prompts, pad_id).to(device)  # (B, P)
        attention_mask = pad_right([[1] * len(prompt) for prompt in prompts], 0).to(device)
        output = model.generate(
            input_ids=input_ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens, **options
        )
        return output[:, 1:]  # without the token that starts every answer

    def length(self, encoded: Encoded) -> int:
        return len(encoded.prompt)

    def limit_text(self, limits: Limits) -> str:
        return f"max_length {limits.max_length} (the prompt) and max_new_tokens {limits.max_new_tokens} (the answer)"

    def fits(self, prompt: int, answer: int, limits: Limits) -> bool:
        return prompt <= limits.max_length and answer <= limits.max_new_tokens


DECODER_ONLY = DecoderOnly()
ENCODER_DECODER = EncoderDecoder()


def layout_of(config: Any) -> Layout:
    """The layout of a model with this transformers configuration."""
    return ENCODER_DECODER if config.is_encoder_decoder else DECODER_ONLY


def flush_left(values: torch.Tensor, keep: torch.Tensor, fill: int) -> torch.Tensor:
    """(B, W): the kept `values` (B, L) of each row, in order and from the left; `fill` behind them."""
    count = keep.sum(dim=1, keepdim=True)  # (B, 1)
    order = keep.long().argsort(dim=1, descending=True, stable=True)
    position = torch.arange(values.shape[1], device=values.device)
    moved = values.gather(1, order).masked_fill(position >= count, fill)
    return moved[:, : int(count.max())]
