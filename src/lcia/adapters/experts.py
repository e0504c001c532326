"""A mixture of LoRA experts beside a frozen linear layer, as a module of a `ModulePool`.

Shapes: E experts, r rank of one expert, in and out features of the layer; `...` batch and tokens.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import linear, softmax


class LoraExperts(torch.nn.Module):
    """W₀x + s Σ_i softmax(Rx)_i B_i A_i x (MoELoRA, arXiv 2310.18339, with the token-wise router of CoIN).

    The experts lie one below the other: A is (E r, in) and B (out, E r), as one LoRA of rank E r whose inner values the
    router scales. A and R start uniform within ±1/√in, which is what PEFT does with A and torch with a linear layer; B
    starts at zero, so that the start is the base model's function.

    Args:
        scale: s.
        dropout: share of the experts' inputs that is dropped in training; the router sees all of them.
    """

    def __init__(self, inputs: int, outputs: int, experts: int, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.rank, self.scale = rank, scale
        self.dropout = torch.nn.Dropout(dropout)  # a module: lcia.backbone.packing looks for those
        self.router = torch.nn.Parameter(torch.empty(experts, inputs))
        self.A = torch.nn.Parameter(torch.empty(experts * rank, inputs))
        self.B = torch.nn.Parameter(torch.zeros(outputs, experts * rank))
        for start in (self.router, self.A):
            torch.nn.init.uniform_(start, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs))

    def forward(self, output: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`output` = W₀x, (..., out), and `x`, (..., in), of the base's dtype; the sum is in that dtype again."""
        x = x.to(self.A.dtype)
        share = softmax(linear(x, self.router), dim=-1)  # (..., E)
        inner = linear(self.dropout(x), self.A)  # (..., E r)
        inner = inner * share.repeat_interleave(self.rank, dim=-1)
        return (output + self.scale * linear(inner, self.B)).to(output.dtype)
