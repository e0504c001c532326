"""The tokens of a training batch in one line: what all rows begin with once, no padding, no token that nothing reads.

Linear layers, norms and embeddings do not mind where a row ends; they are most of a step. Attention does: for it alone
the line is laid out in rows, which see what all of them begin with, and themselves. Gradients flow back to the shared
tokens from every row.

Shapes: B rows, L padded tokens, P tokens that all rows begin with, W own tokens of the longest row, T tokens in the
line, N answer tokens; H heads of size D.
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
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lcia.backbone import prefix
from lcia.backbone.chat import IGNORED

LEAST_SHARE = 0.05  # of a batch's tokens: below, laying out its rows may cost what it saves
_OURS = "lcia_packed"  # kind of attention, in transformers' register
# Kinds of model whose layers add to the mask what they compute for each key: that is as long as the line.
_WITH_MASKS_OF_THEIR_OWN = {"doge", "axk2", "deepseek_v32", "glm_moe_dsa", "hyv4"}


@dataclass(frozen=True)
class Packed:
    """A batch in one line: the shared tokens, then each row's own, row after row."""

    places: torch.Tensor  # (T,): where in the flat batch (B L) each token of the line stands
    before_answers: torch.Tensor  # (N,): the tokens of the line that predict the answers'
    targets: torch.Tensor  # (N,): the answer tokens
    shared: int  # P
    rows: int  # B
    in_rows: torch.Tensor  # (T - P,): where in the flat rows (B W) each own token stands
    in_line: torch.Tensor  # (B W,): which own token stands there; 0 where none does

    @property
    def width(self) -> int:
        """W."""
        return len(self.in_line) // self.rows

    def line_of(self, values: torch.Tensor) -> torch.Tensor:
        """(B, L, ...) of the batch to (1, T, ...)."""
        return values.flatten(0, 1)[self.places][None]


def of_batch(model: Any, batch: Mapping[str, torch.Tensor], before: int | None = None) -> Packed | None:
    """A batch from `collate` in one line.

    Args:
        model: as it is inside of DDP.
        before: a token that is not shared, and what follows it neither.

    Returns:
        None where that saves too little, or would make a difference.
    """
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    rows, length = ids.shape
    if rows == 1 or "query" in batch or not _may_be_packed(model):
        return None
    # dropout must draw for every row of its own
    shared = 0 if prefix.is_random(model) else len(prefix.shared_tokens(batch, before))
    column = torch.arange(length, device=ids.device)
    start = length - mask.sum(dim=1, keepdim=True)  # (B, 1)
    own = (column >= start + shared) & (column < length - 1)  # (B, L); of a row's last token nothing is asked
    count = own.sum(dim=1, keepdim=True)  # (B, 1)
    width, others = int(count.max()), int(count.sum())
    if shared + others > (1 - LEAST_SHARE) * rows * length:
        return None
    predicts = torch.zeros_like(own)
    predicts[:, length - labels.shape[1] : -1] = labels[:, 1:] != IGNORED
    if not (own | ~predicts).all():
        return None  # a prompt without a token, whose answer begins with what nothing predicts
    number = own.flatten().cumsum(0) - 1  # (B L), of own tokens
    in_own_order = torch.arange(width, device=ids.device)
    is_there = in_own_order < count  # (B, W)
    places = torch.cat([start[0] + torch.arange(shared, device=ids.device), own.flatten().nonzero()[:, 0]])
    return Packed(
        places=places,
        before_answers=shared + number[predicts.flatten()],
        targets=labels[:, 1:][labels[:, 1:] != IGNORED],
        shared=shared,
        rows=rows,
        in_rows=is_there.flatten().nonzero()[:, 0],
        in_line=torch.where(is_there, (count.cumsum(0) - count) + in_own_order, 0).flatten(),
    )


def _may_be_packed(model: Any) -> bool:
    """Whether its tokens see all before them, by an attention that can be laid out."""
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel) or decoder.config.model_type in _WITH_MASKS_OF_THEIR_OWN:
        return False
    if not decoder._supports_attention_backend or _attention_of(decoder) is None or not prefix.sees_all_before(model):
        return False
    if model.training and hasattr(decoder.get_input_embeddings(), "neftune_noise_alpha"):
        return False  # noise in embeddings (NEFTune, arXiv 2310.05914) is the less the longer a row is
    # Layers that are computed again would be when nobody knows of the line any more. (In `vars`: of thousands of
    # modules most have no such attribute, and asking them for it takes longer than all else here.)
    return not any(
        (model.training and vars(module).get("gradient_checkpointing")) or isinstance(module, CheckpointWrapper)
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
    mask_of_rows: torch.Tensor  # (1, 1, W, P + W)


_passing: ContextVar[_Passing] = ContextVar("_passing")


@contextlib.contextmanager
def passing(model: Any, packed: Packed) -> Iterator[torch.Tensor]:
    """Inside, the model takes `packed` for what it is; the mask that it is to be given."""
    decoder = model.get_decoder()
    attention = _attention_of(decoder)
    assert attention is not None  # else it is not packed
    kind = decoder.config._attn_implementation
    masks = [_causal(*size, packed.places.device) for size in ((0, packed.shared), (packed.shared, packed.width))]
    if kind == "eager":  # which adds them
        least = torch.finfo(decoder.dtype).min
        masks = [torch.zeros_like(seen, dtype=decoder.dtype).masked_fill_(~seen, least) for seen in masks]
    line = _Passing(packed, attention, *masks)
    token = _passing.set(line)
    decoder.config._attn_implementation = _OURS
    try:
        yield line.mask_of_rows  # a mask of four dimensions is taken as it is: none of the line is made
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
    shared = line.packed.shared
    parts = []
    if shared:
        first = (x[:, :, :shared] for x in (query, key, value))
        parts.append(line.attention(module, *first, line.mask_of_shared, **options)[0])
    rows = [_Spread.apply(x[0, :, shared:].transpose(0, 1), line.packed) for x in (query, key, value)]  # (B, H, W, D)
    if shared:
        for i, x in ((1, key), (2, value)):
            rows[i] = torch.cat([x[:, :, :shared].expand(line.packed.rows, -1, -1, -1), rows[i]], dim=2)
    found = line.attention(module, *rows, line.mask_of_rows, **options)[0]  # (B, W, H, D)
    parts.append(_Gathered.apply(found, line.packed)[None])
    return torch.cat(parts, dim=1), None


AttentionInterface.register(_OURS, _attend)


class _Spread(torch.autograd.Function):
    """(T - P, H, D) in the line to (B, H, W, D) in rows; what stands where no token is has no gradient."""

    @staticmethod
    def forward(ctx: Any, line: torch.Tensor, packed: Packed) -> torch.Tensor:
        ctx.packed = packed
        rows = line.index_select(0, packed.in_line)
        return rows.view(packed.rows, packed.width, *line.shape[1:]).transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.transpose(1, 2).flatten(0, 1).index_select(0, ctx.packed.in_rows), None


class _Gathered(torch.autograd.Function):
    """(B, W, H, D) in rows to (T - P, H, D) in the line."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, packed: Packed) -> torch.Tensor:
        ctx.packed, ctx.shape = packed, rows.shape
        return rows.flatten(0, 1).index_select(0, packed.in_rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows = gradient.new_zeros(ctx.shape)
        rows.flatten(0, 1).index_copy_(0, ctx.packed.in_rows, gradient)
        return rows, None
