"""The tokens of a batch in one line: what all rows begin with once, no padding, no token that nothing reads.

Linear layers, norms and embeddings do not mind where a row ends; they are most of a step. Attention does: for it alone
the line is laid out in rows, which see what all of them begin with, and themselves. Gradients flow back to the shared
tokens from every row. Prompts pass in the same way, and their keys and values are laid out in rows for what follows.

Shapes: B rows, L padded tokens, P tokens that all rows begin with, T tokens in the line, O of them rows' own, N tokens
that are asked for logits; n rows of a part, o own tokens of them, W of the longest; H heads of size D.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper  # as accelerate does
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lcia.backbone.chat import IGNORED

LEAST_SHARE = 0.05  # of a training batch's tokens: below, laying out its rows may cost what it saves
# Lengths are rounded up: each new one leaves kernels and gaps in memory, 104 of 1,771 MiB in six tasks of SmolLM2.
LINE_STEP, ROW_STEP = 32, 8
LEAST_PAIRS = 2**20  # of tokens that see each other: what another part of like length must save attention
_OURS = "lcia_packed"  # kind of attention, in transformers' register
# Kinds of model whose layers add to the mask what they compute for each key: that is as long as the line.
_WITH_MASKS_OF_THEIR_OWN = {"doge", "axk2", "deepseek_v32", "glm_moe_dsa", "hyv4"}


@dataclass(frozen=True)
class Part:
    """Rows of like length, as attention sees them."""

    rows: int  # n
    width: int  # W
    own: torch.Tensor  # (o,): which own tokens of the line are theirs
    in_rows: torch.Tensor  # (o,): where in the flat rows (n W) each of those stands
    in_line: torch.Tensor  # (n W,): which own token of the line stands there; 0 where none does


@dataclass(frozen=True)
class Packed:
    """A batch in one line: the shared tokens, each row's own, row after row, and some that only fill it."""

    places: torch.Tensor  # (T,): where in the flat batch (B L) each token of the line stands
    asked: torch.Tensor  # (N,): the tokens of the line whose logits are wanted
    shared: int  # P
    counts: torch.Tensor  # (B,): own tokens of each row
    parts: tuple[Part, ...]
    back: torch.Tensor | None  # (O,): where each own token stands among those of all parts; None: where it was

    def line_of(self, values: torch.Tensor) -> torch.Tensor:
        """(B, L, ...) of the batch to (1, T, ...)."""
        return values.flatten(0, 1)[self.places][None]

    def in_line_order(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """(o, ...) of each part to (T - P, ...), 0 where the line is only filled."""
        own = parts[0] if self.back is None else torch.cat(parts).index_select(0, self.back)
        fill = len(self.places) - self.shared - len(own)
        return torch.cat([own, own.new_zeros(fill, *own.shape[1:])]) if fill else own


def of_batch(model: Any, batch: Mapping[str, torch.Tensor], before: int | None = None) -> Packed | None:
    """A training batch from `collate` in one line; asked for are the tokens that predict the answers'.

    Args:
        model: as it is inside of DDP.
        before: a token that is not shared, and what follows it neither.

    Returns:
        None where that saves too little, or would make a difference.
    """
    mask, labels = batch["attention_mask"], batch["labels"]
    rows, length = mask.shape
    if rows == 1 or "query" in batch or not _may_be_packed(model):
        return None
    # dropout must draw for every row of its own
    shared = 0 if is_random(model) else len(shared_tokens(batch, before))
    passed = mask.bool()
    passed[:, -1] = False  # of a row's last token nothing is asked
    if shared + int((passed.sum(dim=1) - shared).sum()) > (1 - LEAST_SHARE) * rows * length:
        return None
    predicts = torch.zeros_like(passed)
    predicts[:, length - labels.shape[1] : -1] = labels[:, 1:] != IGNORED
    if not (passed | ~predicts).all():
        return None  # a prompt without a token, whose answer begins with what nothing predicts
    return _line(batch, passed, predicts, shared, before)


def of_prompts(model: Any, batch: Mapping[str, torch.Tensor], before: int | None = None) -> Packed | None:
    """Prompts to be answered in one line; asked for is the last token of each.

    Args:
        before: as `of_batch` takes it.

    Returns:
        None where that would make a difference.
    """
    mask = batch["attention_mask"]
    if len(mask) == 1 or "query" in batch or not _may_be_packed(model):
        return None  # rows may have weights of their own
    if not mask[:, -1].all():
        return None  # a prompt without a token
    last = torch.zeros_like(mask, dtype=torch.bool)
    last[:, -1] = True
    return _line(batch, mask.bool(), last, len(shared_tokens(batch, before)), before)


def _line(
    batch: Mapping[str, torch.Tensor], passed: torch.Tensor, asked: torch.Tensor, shared: int, before: int | None
) -> Packed:
    """The tokens `passed` (B, L) of a batch, of which all rows share the first ones, and those `asked` of them."""
    mask = batch["attention_mask"]
    first = mask.shape[1] - mask.sum(dim=1, keepdim=True) + shared  # (B, 1): where a row's own tokens begin
    own = passed & (torch.arange(mask.shape[1], device=mask.device) >= first)  # (B, L)
    start = int(first[0]) - shared
    places = torch.cat([torch.arange(start, start + shared, device=mask.device), own.flatten().nonzero()[:, 0]])
    if batch["input_ids"].flatten()[places[-1]] != before:  # which would be more of an image than there is
        places = torch.cat([places, places[-1:].expand(-len(places) % LINE_STEP)])
    number = own.flatten().cumsum(0) - 1  # (B L), of own tokens
    counts = own.sum(dim=1)
    lengths = counts.tolist()
    begins = (counts.cumsum(0) - counts).tolist()
    parts = tuple(
        _part([lengths[row] for row in rows], [begins[row] for row in rows], mask.device)
        for rows in of_like_length(lengths, shared, LEAST_PAIRS)
    )
    back = None if len(parts) == 1 else torch.cat([part.own for part in parts]).argsort()
    return Packed(places, shared + number[asked.flatten()], shared, counts, parts, back)


def _part(lengths: list[int], begins: list[int], device: torch.device) -> Part:
    """Rows with so many own tokens, which begin at these places among the own tokens of the line."""
    count, begin = (torch.tensor(values, device=device)[:, None] for values in (lengths, begins))  # (n, 1)
    width = max(lengths) + -max(lengths) % ROW_STEP
    column = torch.arange(width, device=device)
    is_there = (column < count).flatten()
    in_line = torch.where(is_there, (begin + column).flatten(), 0)
    return Part(len(lengths), width, in_line[is_there], is_there.nonzero()[:, 0], in_line)


def of_like_length(lengths: list[int], shared: int, least: int) -> list[list[int]]:
    """Rows in parts; each is cut into two wherever that saves attention `least` pairs of tokens.

    Where nothing is cut the rows keep their order; else each part begins with its shortest.
    """

    def pairs(width: int) -> int:
        return width * (shared + width)

    def cut(rows: list[int]) -> list[list[int]]:
        longest = pairs(lengths[rows[-1]])
        saved = {place: place * (longest - pairs(lengths[rows[place - 1]])) for place in range(1, len(rows))}
        best = max(saved, key=saved.__getitem__, default=0)
        if not best or saved[best] < least:
            return [rows]
        return cut(rows[:best]) + cut(rows[best:])

    parts = cut(sorted(range(len(lengths)), key=lengths.__getitem__))
    return parts if len(parts) > 1 else [list(range(len(lengths)))]


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


def _may_be_packed(model: Any) -> bool:
    """Whether its tokens see all before them, by an attention that can be laid out."""
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel) or decoder.config.model_type in _WITH_MASKS_OF_THEIR_OWN:
        return False
    if not decoder._supports_attention_backend or _attention_of(decoder) is None or not sees_all_before(model):
        return False
    if model.training and hasattr(decoder.get_input_embeddings(), "neftune_noise_alpha"):
        return False  # noise in embeddings (NEFTune, arXiv 2310.05914) is the less the longer a row is
    # Layers that are computed again would be when nobody knows of the line any more. (In `vars`: of thousands of
    # modules most have no such attribute, and asking them for it takes longer than all else here.)
    return not any(
        (model.training and vars(module).get("gradient_checkpointing"))
        or isinstance(module, CheckpointWrapper)
        or vars(module).get("is_causal") is False  # an encoder's, whose tokens see those behind them
        for module in decoder.modules()
    )


def _attention_of(module: Any) -> Callable[..., Any] | None:
    """The function that computes attention from a mask for the model that `module` is of."""
    kind = module.config._attn_implementation
    if kind == "eager":  # each model's own; FSDP2 makes a class of its own below the model's
        files = (sys.modules[one.__module__] for one in type(module).__mro__)
        return next((file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward")), None)
    return ALL_ATTENTION_FUNCTIONS["sdpa"] if kind == "sdpa" else None


@dataclass(frozen=True)
class _Passing:
    """What the attention must know of the line that passes through the model."""

    packed: Packed
    attention: Callable[..., Any]
    mask_of_shared: torch.Tensor  # (1, 1, P, P)
    masks: list[torch.Tensor]  # (1, 1, W, P + W), of each part


_passing: ContextVar[_Passing] = ContextVar("_passing")


@contextlib.contextmanager
def passing(model: Any, packed: Packed) -> Iterator[torch.Tensor]:
    """Inside, the model takes `packed` for what it is; the mask that it is to be given."""
    decoder = model.get_decoder()
    attention = _attention_of(decoder)
    assert attention is not None  # else it is not packed
    kind = decoder.config._attn_implementation
    sizes = [(0, packed.shared), *((packed.shared, part.width) for part in packed.parts)]
    masks = [_causal(*size, packed.places.device) for size in sizes]
    if kind == "eager":  # which adds them
        least = torch.finfo(decoder.dtype).min
        masks = [torch.zeros_like(seen, dtype=decoder.dtype).masked_fill_(~seen, least) for seen in masks]
    token = _passing.set(_Passing(packed, attention, masks[0], masks[1:]))
    decoder.config._attn_implementation = _OURS
    try:
        yield masks[1]  # a mask of four dimensions is taken as it is: none of the line is made
    finally:
        decoder.config._attn_implementation = kind
        _passing.reset(token)


def _causal(before: int, width: int, device: torch.device) -> torch.Tensor:
    """(1, 1, width, before + width): whether a token sees another."""
    return torch.ones(width, before + width, dtype=torch.bool, device=device).tril(before)[None, None]


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """(1, H, T, D) three times to (1, T, H, D)."""
    line = _passing.get()
    packed, shared = line.packed, line.packed.shared
    done = []
    if shared:
        first = (x[:, :, :shared] for x in (query, key, value))
        done.append(line.attention(module, *first, line.mask_of_shared, **options)[0])
    # for each part (n, H, W, D), three times
    spread = zip(*(_Spread.apply(x[0, :, shared:].transpose(0, 1), packed) for x in (query, key, value)), strict=True)
    found = []
    for part, mask, rows in zip(packed.parts, line.masks, spread, strict=True):
        own = list(rows)
        if shared:
            for i, x in ((1, key), (2, value)):
                own[i] = torch.cat([x[:, :, :shared].expand(part.rows, -1, -1, -1), own[i]], dim=2)
        found.append(line.attention(module, *own, mask, **options)[0])  # (n, W, H, D)
    done.append(_Gathered.apply(packed, *found)[None])
    return torch.cat(done, dim=1), None


AttentionInterface.register(_OURS, _attend)


class _Spread(torch.autograd.Function):
    """(T - P, H, D) in the line to (n, H, W, D) of each part; what stands where no token is has no gradient."""

    @staticmethod
    def forward(ctx: Any, line: torch.Tensor, packed: Packed) -> tuple[torch.Tensor, ...]:
        ctx.packed = packed
        return tuple(
            line.index_select(0, part.in_line).view(part.rows, part.width, *line.shape[1:]).transpose(1, 2)
            for part in packed.parts
        )

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        flat = (gradient.transpose(1, 2).flatten(0, 1) for gradient in gradients)
        own = [rows.index_select(0, part.in_rows) for rows, part in zip(flat, ctx.packed.parts, strict=True)]
        return ctx.packed.in_line_order(own), None


class _Gathered(torch.autograd.Function):
    """(n, W, H, D) of each part to (T - P, H, D) in the line."""

    @staticmethod
    def forward(ctx: Any, packed: Packed, *rows: torch.Tensor) -> torch.Tensor:
        ctx.packed, ctx.shapes = packed, [part.shape for part in rows]
        own = [one.flatten(0, 1).index_select(0, part.in_rows) for one, part in zip(rows, packed.parts, strict=True)]
        return packed.in_line_order(own)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        parts = []
        for part, shape in zip(ctx.packed.parts, ctx.shapes, strict=True):
            own = gradient[: len(part.own)] if ctx.packed.back is None else gradient.index_select(0, part.own)
            rows = gradient.new_zeros(shape)
            rows.flatten(0, 1).index_copy_(0, part.in_rows, own)
            parts.append(rows)
        return None, *parts


def lay_out(cache: DynamicCache, packed: Packed, config: Any) -> tuple[DynamicCache, torch.Tensor]:
    """Keys and values of a line, (1, H, T, D) each, as those of its rows: (B, H, P + W, D), W of the longest row.

    `cache` is emptied, so that not all of it is twice in memory.

    Returns:
        The rows' cache, and (B, P + W): where a row has a token.
    """
    counts, shared = packed.counts[:, None], packed.shared
    width = int(counts.max())
    column = torch.arange(width, device=counts.device)
    is_there = column < counts  # (B, W)
    in_line = torch.where(is_there, counts.cumsum(0) - counts + column, 0).flatten()
    rows = len(counts)
    laid_out = DynamicCache(config=config)
    for number, layer in enumerate(cache.layers):
        sides = []
        for line in (layer.keys, layer.values):
            own = line[:, :, shared:].index_select(2, in_line).unflatten(2, (rows, width))[0].transpose(0, 1)
            sides.append(torch.cat([line[:, :, :shared].expand(rows, -1, -1, -1), own], dim=2))
        layer.keys = layer.values = None
        laid_out.update(*sides, number)
    return laid_out, torch.cat([is_there.new_ones(rows, shared), is_there], dim=1)
