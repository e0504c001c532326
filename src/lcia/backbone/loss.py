"""The loss of a batch of answers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate.utils import extract_model_from_parallel
from torch.nn.functional import cross_entropy

from lcia.backbone.layout import layout_of
from lcia.backbone.rowwise import told


def answer_logits(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, V) logits in fp32 and (N,) targets of the N answer tokens of a batch from `collate`, row after row."""
    with told(model, batch):
        return layout_of(extract_model_from_parallel(model).config).answer_logits(model, batch)


def answer_loss(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], num_items: torch.Tensor | int
) -> torch.Tensor:
    """Cross entropy of the answer tokens, summed and divided by `num_items`: in training, the answer tokens of the
    whole optimizer step.
    """
    logits, targets = answer_logits(model, batch)
    return cross_entropy(logits, targets, reduction="sum") / num_items
