"""Floating-point operations of products of matrices and convolutions: what most of a step's time goes into."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


def _grouped(one: torch.Tensor, other: torch.Tensor, *rest: Any, **options: Any) -> int:
    """Of products of each expert's tokens with its weights, for which torch has no formula."""
    return 2 * one.numel() * other.shape[-1]


class Flops(TorchDispatchMode):
    """Adds up what torch's own formulas give for each operation inside; a multiplication and an addition are two."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if func._overloadpacket is torch.ops.aten._grouped_mm:
            self.total += _grouped(*args, **(kwargs or {}))
        elif formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=made))
        return made
