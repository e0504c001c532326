"""The loss of a batch of answers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.functional import cross_entropy

from lcia.backbone.chat import IGNORED


def answer_logits(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, V) logits in fp32 and (N,) targets of the N answer tokens of a batch from `collate`.

    Logits are computed for the right edge only: prompt positions have no loss, and the vocabulary
    projection is a large part of a small model's step.
    """
    labels = batch["labels"]  # (B, A)
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        position_ids=batch["position_ids"],
        logits_to_keep=labels.shape[1],
        use_cache=False,
    ).logits  # (B, A, V)
    targets = labels[:, 1:]
    kept = targets != IGNORED
    return logits[:, :-1][kept].float(), targets[kept]


def answer_loss(
    model: torch.nn.Module, batch: Mapping[str, torch.Tensor], num_items: torch.Tensor | int
) -> torch.Tensor:
    """Cross entropy of the answer tokens, summed and divided by `num_items`: in training, the answer tokens of the
    whole optimizer step.
    """
    logits, targets = answer_logits(model, batch)
    return cross_entropy(logits, targets, reduction="sum") / num_items
