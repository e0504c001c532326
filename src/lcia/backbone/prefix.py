"""Keys and values computed before the rest of a batch of prompts, so that fewer tokens pass through the model.

What all prompts begin with is computed once: the chat template's first lines are half of a short one. Keys and values
of the shared tokens are the same in every row (a token sees only what stands before it), so one serves all. Prompts
of like length are passed together, not padded to the longest. For training batches see `packing`.

Shapes: B rows, L padded tokens, P tokens of the prefix, W of the longest row behind it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lcia.processes import is_sharding

LEAST_SHARE = 0.2  # of a batch's tokens: below, the second pass through the model costs what it saves
LEAST_ON_CPU = 64  # tokens that another pass over some of a batch's prompts must save
LEAST_ON_GPU = 2048  # tokens that any other pass must save: there one over few tokens costs its kernel launches


def shared_tokens(batch: Mapping[str, torch.Tensor], before: int | None = None) -> torch.Tensor:
    """(P,): the tokens that all prompts of a batch, answers behind them or not, begin with; a prompt's last is none.

    Args:
        before: a token that is not shared, and what follows it neither.
    """
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    lengths = mask.sum(dim=1)
    prompts = lengths - ((labels >= 0).cumsum(dim=1) > 0).sum(dim=1)  # an answer begins at its first label
    most = int(prompts.min()) - 1  # a prompt's last token predicts the first one of the answer: it stays in its row
    columns = (ids.shape[1] - lengths)[:, None] + torch.arange(max(most, 0), device=ids.device)
    first = ids.gather(1, columns)  # (B, most)
    same = (first == first[:1]).all(dim=0) & (first[0] != (-1 if before is None else before))
    return first[0, : int(same.long().cumprod(dim=0).sum())]


def of_batch(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], before: int | None = None
) -> DynamicCache | None:
    """The cache of the tokens that all prompts of a batch to be answered begin with, once per row.

    Args:
        model: as it is inside of DDP.
        before: as `shared_tokens` takes it.

    Returns:
        None where they share too little, or where going on from a cache would make a difference.
    """
    rows = len(batch["input_ids"])
    if "query" in batch or rows == 1 or is_sharding():
        return None  # rows may have weights of their own; sharded ones are put together for one pass
    return _cache(model, shared_tokens(batch, before)[None], rows, int(batch["attention_mask"].sum()))


def _cache(model: torch.nn.Module, prefix: torch.Tensor, rows: int, tokens: int) -> DynamicCache | None:
    """The cache of `prefix` (1, P) for `rows` rows, where it pays for a batch of so many `tokens`."""
    saved = (rows - 1) * prefix.shape[1]
    if saved < LEAST_SHARE * tokens or (prefix.is_cuda and saved < LEAST_ON_GPU):
        return None
    if not sees_all_before(model):
        return None
    cache = DynamicCache(config=model.config)
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


def of_prompts(
    model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, begun: DynamicCache | None
) -> DynamicCache | None:
    """The cache of all tokens of prompts to be answered, but for each one's last.

    Prompts of like length are passed through the model together, so that little of it is spent on padding.

    Args:
        ids, mask: (B, L), of which the first P columns are what `begun` holds.
        begun: what all prompts begin with (P tokens), from `of_batch`. None: nothing (P = 0).

    Returns:
        None where it saves too little, or going on from a cache would make a difference.
    """
    first = 0 if begun is None else begun.get_seq_length()
    width = ids.shape[1] - 1 - first
    lengths = (mask[:, first:-1].sum(dim=1)).tolist()  # own tokens that are passed now
    parts = _of_like_length(lengths, LEAST_ON_GPU if ids.is_cuda else LEAST_ON_CPU)
    if len(parts) == 1 or is_sharding() or not sees_all_before(model):
        return None
    filled: list[tuple[torch.Tensor, int, DynamicCache]] = []
    for part in parts:
        longest = max(lengths[row] for row in part)
        rows = torch.tensor(part, device=ids.device)
        cache = DynamicCache(config=model.config)
        for number, layer in enumerate(begun.layers if begun is not None else []):
            cache.update(layer.keys[rows], layer.values[rows], number)
        columns = [*range(first), *range(first + width - longest, first + width)]
        seen = mask[rows][:, columns]
        if longest:
            model(
                input_ids=ids[rows][:, columns[first:]],
                attention_mask=seen,
                position_ids=(seen.cumsum(dim=1) - 1).clamp(min=0)[:, first:],
                logits_to_keep=torch.tensor([], dtype=torch.long, device=ids.device),
                past_key_values=cache,
                use_cache=True,
            )
        filled.append((rows, longest, cache))
    whole = DynamicCache(config=model.config)
    for number in range(len(whole.layers)):
        sides = []
        for side in ("keys", "values"):
            # (B, heads, P + W, d); what is left 0 is masked
            longest_own = getattr(filled[-1][2].layers[number], side)
            _, heads, _, depth = longest_own.shape
            put = longest_own.new_zeros(len(ids), heads, first + width, depth)
            for rows, longest, cache in filled:
                own = getattr(cache.layers[number], side)
                if own is None:  # prompts of one token
                    continue
                put[rows, :, :first] = own[:, :, :first]
                put[rows, :, first + width - longest :] = own[:, :, first:]
            sides.append(put)
        whole.update(*sides, number)
        for _, _, cache in filled:
            cache.layers[number].keys = cache.layers[number].values = None  # not all of it twice in memory
    return whole


def _of_like_length(lengths: list[int], least: int) -> list[list[int]]:
    """Rows in parts, each cut into two wherever that saves `least` tokens of padding."""

    def cut(rows: list[int]) -> list[list[int]]:
        longest = lengths[rows[-1]]
        saved = {place: place * (longest - lengths[rows[place - 1]]) for place in range(1, len(rows))}
        best = max(saved, key=saved.__getitem__, default=0)
        if not best or saved[best] < least:
            return [rows]
        return cut(rows[:best]) + cut(rows[best:])

    return cut(sorted(range(len(lengths)), key=lengths.__getitem__))


def sees_all_before(model: Any) -> bool:
    """Whether a token sees all tokens before it as they are. Windows and recurrent states forget: such layers are not
    gone on with from keys and values alone. Nor are keys whose rotation follows the longest position of their pass.
    """
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    if {"dynamic", "longrope"} & {str(rope.get("rope_type")), *(str(one.get("rope_type")) for one in _nested(rope))}:
        return False
    layers = DynamicCache(config=model.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def _nested(rope: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parameters of each kind of layer, where a model has several."""
    return [one for one in rope.values() if isinstance(one, Mapping)]


def is_random(model: Any) -> bool:
    """Dropout, and noise in a router, must draw for every row of its own."""
    if not model.training:
        return False
    settings = model.config.get_text_config().to_dict().items()
    elsewhere = ("summary_", "classifier_")  # heads that a language model has not
    rates = [value for key, value in settings if ("drop" in key or "jitter" in key) and not key.startswith(elsewhere)]
    return any(isinstance(rate, float) and rate > 0 for rate in rates) or any(
        isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules()
    )
