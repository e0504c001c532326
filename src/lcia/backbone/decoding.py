"""Greedy answers to a batch of prompts that passed through the model in one line.

A row that has ended leaves the batch: from then on nothing is computed for it.

Shapes: B rows, b of them not ended, S tokens seen, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from lcia.backbone import packing


def greedy(model: Any, packed: packing.Packed, first: dict[str, Any], max_new_tokens: int) -> torch.Tensor:
    """The most probable token after each prefix, until one that ends an answer, or `max_new_tokens`.

    Args:
        packed: the prompts, from `packing.of_prompts`.
        first: what the model is given of them (its line).

    Returns:
        (B, new) token ids, behind the end of an answer the padding token; which, and what ends an answer, are those of
        the model's generation_config.
    """
    ends = torch.tensor(_ends(model), dtype=torch.long, device=packed.places.device)
    pad = model.generation_config.pad_token_id
    line = DynamicCache(config=model.config)
    with packing.passing(model, packed) as mask:
        logits = model(
            **first, attention_mask=mask, logits_to_keep=packed.asked, past_key_values=line, use_cache=True
        ).logits[0]  # (B, V)
    cache, seen = packing.lay_out(line, packed, model.config)
    seen = seen.long()
    position = seen.sum(dim=1, keepdim=True)  # (b, 1)
    last = torch.tensor([-1], device=ends.device)  # as an index: see `answer_logits` in layout.py
    going_on = torch.arange(len(seen), device=ends.device)  # (b,): which rows
    answers = going_on.new_full((len(seen), max_new_tokens), 0 if pad is None else pad)
    for number in range(max_new_tokens):
        tokens = logits.float().argmax(dim=-1)  # (b,)
        answers[going_on, number] = tokens
        goes_on = ~torch.isin(tokens, ends)
        if number + 1 == max_new_tokens or not goes_on.any():
            return answers[:, : number + 1]
        if not goes_on.all():
            kept = goes_on.nonzero()[:, 0]
            tokens, seen, position, going_on = (values[kept] for values in (tokens, seen, position, going_on))
            cache.batch_select_indices(kept)
        seen = torch.cat([seen, seen.new_ones(len(seen), 1)], dim=1)  # (b, S)
        logits = model(
            input_ids=tokens[:, None],
            attention_mask=seen,
            position_ids=position,
            logits_to_keep=last,
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]  # (b, V)
        position = position + 1
    return answers


def _ends(model: Any) -> list[int]:
    """The tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]
