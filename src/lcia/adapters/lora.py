"""A LoRA layer's own forward: in training PEFT's numbers, bit for bit, with fewer passes over the output's memory.

W x + s B A x (LoRA, arXiv 2106.09685). A scale s that is a power of two changes no digit, and goes to the r inner
values instead of all outputs. The product is added to the base layer's output where that lies: the sum is float32's,
rounded once to the dtype of the output. The rows of a batch that mixes adapters are computed as in a batch of one.

Where answers are given (`answering`), A x and B A x are computed in the layer's own dtype, as servers of LoRA do, and
added while they are computed. What half precision rounds there is small beside the rounding of W x, where adapters
merged into W would lose most of their digits. Of long prompts, half of the time went into conversions and sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch.nn.functional import linear

_answering: ContextVar[bool] = ContextVar("_answering", default=False)


@contextmanager
def answering() -> Iterator[None]:
    """Inside, nothing is learned, nor compared with what is (as by a teacher)."""
    token = _answering.set(True)
    try:
        yield
    finally:
        _answering.reset(token)


class LoraLinear(Linear):
    """PEFT's layer of a linear one; what is not one plain LoRA (several, merged, a variant) is left to PEFT."""

    def forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """(..., in) to (..., out); `adapter_names`: one for each row."""
        rows: list[str] | None = options.get("adapter_names")
        active = [name for name in self.active_adapters if name in self.lora_A]
        others = args or set(options) - {"adapter_names"} or (rows is None and len(active) != 1)
        others = others or (rows is not None and len(rows) != len(x))  # tokens of all rows in one line: PEFT refuses
        if others or self.disable_adapters or self.merged or self.lora_variant or any(self.lora_bias.values()):
            whole: torch.Tensor = super().forward(x, *args, **options)
            return whole
        result: torch.Tensor = self.base_layer(x)
        if rows is None:
            return self._add(result, x, active[0])
        for name in dict.fromkeys(rows):
            if name in self.lora_A:
                mine = [i for i, row in enumerate(rows) if row == name]
                result[mine] = self._add(result[mine], x[mine], name)
        return result

    def _add(self, result: torch.Tensor, x: torch.Tensor, name: str) -> torch.Tensor:
        """`result`, to which s B A x is added."""
        down, up, scale = self.lora_A[name], self.lora_B[name], self.scaling[name]
        if _answering.get():
            inner = linear(x.to(result.dtype), down.weight.to(result.dtype)).flatten(0, -2)
            result.view(-1, result.shape[-1]).addmm_(inner, up.weight.to(result.dtype).T, alpha=scale)
            return result
        inner = down(self.lora_dropout[name](x.to(down.weight.dtype)))
        return result.add_(up(inner * scale) if math.frexp(scale)[0] == 0.5 else up(inner) * scale)


def use_own_forward(model: torch.nn.Module) -> None:
    """PEFT's plain LoRA layers in `model` get the forward above."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = LoraLinear
