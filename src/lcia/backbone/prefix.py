"""What all rows of a batch begin with is computed once: the chat template's first lines are half of a short row.

Keys and values of the shared tokens are the same in every row (a token sees only what stands before it), so one row's
serve all; gradients flow back through them. Shapes: B rows, L padded tokens, P tokens of the prefix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lcia.processes import is_sharding

_LEAST_SHARE = 0.2  # of a batch's tokens: below, the second pass through the model costs what it saves
_LEAST_ON_GPU = 2048  # tokens saved: there a pass over few tokens costs its kernel launches


def of_batch(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], before: int | None = None
) -> DynamicCache | None:
    """The cache of the tokens that all rows of a batch from `collate` begin with, once per row.

    Args:
        before: a token that is none of the prefix, and what follows it neither.

    Returns:
        None where they share too little, or where going on from a cache would make a difference.
    """
    model = extract_model_from_parallel(model)  # DDP counts the passes through its own forward
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    rows, length = ids.shape
    if "query" in batch:
        return None  # each row may have weights of its own
    if rows == 1 or is_sharding() or _is_random(model):
        return None  # sharded weights are put together for one forward pass per step
    if model.training and model.is_activation_checkpointing:
        return None  # layers are computed again without a cache
    lengths = mask.sum(dim=1)
    prompts = lengths - ((labels >= 0).cumsum(dim=1) > 0).sum(dim=1)  # an answer begins at its first label
    most = int(prompts.min()) - 1  # a prompt's last token predicts the first one of the answer: it stays in its row
    columns = (length - lengths)[:, None] + torch.arange(max(most, 0), device=ids.device)
    first = ids.gather(1, columns)  # (B, most)
    same = (first == first[:1]).all(dim=0) & (first[0] != (-1 if before is None else before))
    shared = int(same.long().cumprod(dim=0).sum())
    return _cache(model, first[:1, :shared], rows, int(lengths.sum()))


def _cache(model: torch.nn.Module, prefix: torch.Tensor, rows: int, tokens: int) -> DynamicCache | None:
    """The cache of `prefix` (1, P) for `rows` rows, where it pays for a batch of so many `tokens`."""
    saved = (rows - 1) * prefix.shape[1]
    if saved < _LEAST_SHARE * tokens or (prefix.is_cuda and saved < _LEAST_ON_GPU):
        return None
    cache = DynamicCache(config=model.config)
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None  # windows and recurrent states forget: they are not gone on with from keys and values alone
    model(
        input_ids=prefix,
        attention_mask=torch.ones_like(prefix),
        position_ids=torch.arange(prefix.shape[1], device=prefix.device)[None],
        logits_to_keep=torch.tensor([-1], device=prefix.device),
        past_key_values=cache,
        use_cache=True,
    )
    if cache.get_seq_length() != prefix.shape[1]:
        return None  # the model keeps none
    cache.batch_repeat_interleave(rows)
    return cache


def _is_random(model: Any) -> bool:
    """Dropout must draw for every row of its own."""
    if not model.training:
        return False
    settings = model.config.get_text_config().to_dict().items()
    elsewhere = ("summary_", "classifier_")  # heads that a language model has not
    rates = [value for key, value in settings if "drop" in key and not key.startswith(elsewhere)]
    return any(isinstance(rate, float) and rate > 0 for rate in rates) or any(
        isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules()
    )
