"""A LoRA layer's own forward: PEFT's sum, with fewer passes over the memory of the output.

W x + s B A x (LoRA, arXiv 2106.09685). The scale s goes to the r inner values instead of all outputs, and the product
is added to the base layer's output where that lies, computed in float32 and rounded once to its dtype. The rows of a
batch that mixes adapters are computed as in a batch of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear


class LoraLinear(Linear):
    """PEFT's layer of a linear one; what is not plain LoRA (merged, switched off, a variant of it) is left to PEFT."""

    def forward(self, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        """(..., in) to (..., out); `adapter_names`: one for each row."""
        rows: list[str] | None = options.get("adapter_names")
        others = args or set(options) - {"adapter_names"}
        if others or self.disable_adapters or self.merged or self.lora_variant:
            whole: torch.Tensor = super().forward(x, *args, **options)
            return whole
        result: torch.Tensor = self.base_layer(x)
        if rows is None:
            return self._plus(result, x, self.active_adapters)
        for name in dict.fromkeys(rows):
            mine = [i for i, row in enumerate(rows) if row == name]
            result[mine] = self._plus(result[mine], x[mine], [name])
        return result

    def _plus(self, result: torch.Tensor, x: torch.Tensor, adapters: Sequence[str]) -> torch.Tensor:
        """`result` and what `adapters` add to it, in its memory."""
        added: torch.Tensor | None = None
        for name in adapters:
            if name not in self.lora_A:
                continue
            down, up = self.lora_A[name], self.lora_B[name]
            inner = down(self.lora_dropout[name](x.to(down.weight.dtype))) * self.scaling[name]
            outer = up(inner)
            added = outer if added is None else added + outer
        return result if added is None else result.add_(added)


def use_own_forward(model: torch.nn.Module) -> None:
    """PEFT's plain LoRA layers in `model` get the forward above."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = LoraLinear
