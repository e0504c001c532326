"""The bottleneck adapter behind a frozen sub-layer, as a module of a `ModulePool`.

Shapes: d width of the model, m of the bottleneck; `...` batch and tokens.
"""

from __future__ import annotations

from typing import Any

import torch


class Bottleneck(torch.nn.Module):
    """h + U ReLU(D LayerNorm(h) + b) + c (Houlsby et al., arXiv 1902.00751; with LayerNorm as in arXiv 2012.15504).

    D is (m, d), U (d, m). U and c start at zero, so that the start is the base model's function.
    """

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.down = torch.nn.Linear(width, bottleneck)
        self.up = torch.nn.Linear(bottleneck, width)
        torch.nn.init.zeros_(self.up.weight)
        torch.nn.init.zeros_(self.up.bias)

    def forward(self, output: torch.Tensor, *inputs: Any) -> torch.Tensor:
        """`output` = h, what the sub-layer gave, (..., d), in the base's dtype; the sum is in that dtype again."""
        h = output.to(self.down.weight.dtype)
        return (h + self.up(self.down(self.norm(h)).relu())).to(output.dtype)
