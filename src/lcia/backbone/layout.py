"""The kinds of language model side by side: how each takes a prompt and gives an answer.

Rows and batches (chat.py) are the same for both. What differs is chosen once, by the model's configuration, and stands
here.

Shapes: B rows, L padded tokens, P padded prompt tokens, A padded answer tokens + 1, N answer tokens, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
)

from lcia.backbone import packing
from lcia.backbone.chat import IGNORED, Encoded
from lcia.backbone.decoding import greedy

Batch = Mapping[str, torch.Tensor]
_TEXT = {"input_ids", "attention_mask", "position_ids", "labels", "query"}  # what a batch holds without images
_OF_THE_LOSS = {"answer_logits", "answer_tokens", "rows"}  # what a method's penalty finds in it as well


class Limits(Protocol):
    """The two lengths of a configuration, in tokens."""

    @property
    def max_length(self) -> int: ...

    @property
    def max_new_tokens(self) -> int: ...


class Layout(ABC):
    """One kind of model."""

    sees: ClassVar[bool] = False  # whether rows may have images
    auto_model: ClassVar[Any]  # transformers' class that loads it
    models: ClassVar[Mapping[Any, Any]]  # configuration class → model class, all that `auto_model` knows
    peft_task: ClassVar[str]  # PEFT's name of its task

    @abstractmethod
    def answer_logits(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, V) logits in fp32 and (N,) targets of the answer tokens of a batch from `collate`, row after row."""

    @abstractmethod
    def generate(self, model: Any, batch: Batch, max_new_tokens: int, **options: Any) -> torch.Tensor:
        """(B, new) token ids of the greedy answers to a batch of prompts.

        Of the model's generation_config only the tokens count that end an answer and pad it; there is nothing else in
        it (`loading.py`). `options` go to the model's `generate`.
        """

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
        """Logits are computed for the answers only: prompt positions have no loss, and the vocabulary projection
        is a large part of a small model's step. What all prompts begin with is computed once, and no padding.
        """
        inner = extract_model_from_parallel(model)
        labels, mask = batch["labels"], batch["attention_mask"]  # (B, A), (B, L)
        targets = labels[:, 1:]
        kept = targets != IGNORED
        packed = self._packed(packing.of_batch, inner, batch)
        if packed is not None:
            with packing.passing(inner, packed) as whole:
                logits = model(
                    **self._line(batch, packed), attention_mask=whole, logits_to_keep=packed.asked, use_cache=False
                ).logits  # (1, N, V)
            return logits[0].float(), targets[kept]
        # As indices, not as a number: what a slice leaves is not contiguous, and torch's product of that with the
        # vocabulary matrix copies the matrix once per row.
        answers = torch.arange(mask.shape[1] - labels.shape[1], mask.shape[1], device=labels.device)
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=mask,
            logits_to_keep=answers,
            use_cache=False,
            **self._positions(batch["position_ids"]),
            **self._shown(batch, lambda values: values),
        ).logits  # (B, A, V)
        return logits[:, :-1][kept].float(), targets[kept]

    def generate(self, model: Any, batch: Batch, max_new_tokens: int, **options: Any) -> torch.Tensor:
        # `options` may say that rows have weights of their own: then no two prompts begin alike
        packed = None if options else self._packed(packing.of_prompts, model, batch)
        if packed is not None:
            return greedy(model, packed, self._line(batch, packed), max_new_tokens)
        ids = batch["input_ids"]
        output = model.generate(
            input_ids=ids,
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            logits_to_keep=torch.tensor([-1], device=ids.device),  # as indices: see `answer_logits`
            **self._shown(batch, lambda values: values),
            **options,
        )
        return output[:, ids.shape[1] :]

    def _packed(self, pack: Callable[..., packing.Packed | None], model: Any, batch: Batch) -> packing.Packed | None:
        """A batch in one line, where that pays."""
        reads_forward, before = self._shares(model.config)
        return pack(model, batch, before) if reads_forward else None

    def _line(self, batch: Batch, packed: packing.Packed) -> dict[str, Any]:
        """What the model is given of a batch in one line."""
        return {
            "input_ids": packed.line_of(batch["input_ids"]),
            "position_ids": packed.line_of(batch["position_ids"]),
            **self._shown(batch, packed.line_of),
        }

    def _shares(self, config: Any) -> tuple[bool, int | None]:
        """Whether no token sees one behind it, and the token that rows do not share, nor what follows it."""
        return True, None

    def _positions(self, position_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """The positions that the model is told."""
        return {"position_ids": position_ids}

    def _shown(self, batch: Batch, passed: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the model is given beside its tokens; of what each token has (B, L, ...), what `passed` takes."""
        return {}

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

    def generate(self, model: Any, batch: Batch, max_new_tokens: int, **options: Any) -> torch.Tensor:
        is_prompt = batch["attention_mask"].bool()
        output = model.generate(
            input_ids=flush_left(batch["input_ids"], is_prompt, model.config.pad_token_id or 0),  # (B, P)
            attention_mask=flush_left(is_prompt.long(), is_prompt, 0),
            max_new_tokens=max_new_tokens,
            **options,
        )
        return output[:, 1:]  # without the token that starts every answer

    def length(self, encoded: Encoded) -> int:
        return len(encoded.prompt)

    def limit_text(self, limits: Limits) -> str:
        return f"max_length {limits.max_length} (the prompt) and max_new_tokens {limits.max_new_tokens} (the answer)"

    def fits(self, prompt: int, answer: int, limits: Limits) -> bool:
        return prompt <= limits.max_length and answer <= limits.max_new_tokens


class VisionLanguage(DecoderOnly):
    """Prompt and answer are one sequence in which some tokens stand for parts of images (LLaVA, arXiv 2304.08485)."""

    auto_model = AutoModelForImageTextToText
    models = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    sees = True

    def _shares(self, config: Any) -> tuple[bool, int | None]:
        """What stands before the first image; some models let the tokens of a prompt see each other."""
        return (True, config.image_token_id) if config.model_type == "llava" else (False, None)

    def _shown(self, batch: Batch, passed: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: values if values.shape[:2] != batch["attention_mask"].shape else passed(values)
            for name, values in batch.items()
            if name not in _TEXT | _OF_THE_LOSS
        }


class GridVisionLanguage(VisionLanguage):
    """A token of an image has a position in time, height and width (Qwen2-VL, arXiv 2409.12191): models of this kind
    find the positions of all tokens by themselves, from the tokens and the sizes of the images.
    """

    def _positions(self, position_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {}


DECODER_ONLY = DecoderOnly()
ENCODER_DECODER = EncoderDecoder()
VISION_LANGUAGE = VisionLanguage()
GRID_VISION_LANGUAGE = GridVisionLanguage()


def layout_of(config: Any) -> Layout:
    """The layout of a model with this transformers configuration."""
    if config.is_encoder_decoder:
        return ENCODER_DECODER
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return DECODER_ONLY
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}  # not every language model has a RoPE
    return GRID_VISION_LANGUAGE if "mrope_section" in rope else VISION_LANGUAGE


def flush_left(values: torch.Tensor, keep: torch.Tensor, fill: int) -> torch.Tensor:
    """(B, W): the kept `values` (B, L) of each row, in order and from the left; `fill` behind them."""
    count = keep.sum(dim=1, keepdim=True)  # (B, 1)
    order = keep.long().argsort(dim=1, descending=True, stable=True)
    position = torch.arange(values.shape[1], device=values.device)
    moved = values.gather(1, order).masked_fill(position >= count, fill)
    return moved[:, : int(count.max())]
