"""MoELoRA (arXiv 2310.18339), as CoIN uses it (arXiv 2403.08350): W₀x + s Σ_i softmax(Rx)_i B_i A_i x.

Every adapted layer has E experts, each a LoRA of rank r / E, and a router R that weighs them for each token anew. One
such adapter is trained task after task. s = α / r with the total rank r, as in CoIN's code: an expert that the router
chooses alone is a LoRA of rank r / E with the scale that `lora` has.
"""

from __future__ import annotations

from typing import Any

import torch

from lcia.adapters import ModulePool, Pool
from lcia.adapters.experts import LoraExperts
from lcia.adapters.targets import features, linear_layers
from lcia.backbone import Backbone
from lcia.errors import UserError
from lcia.methods.base import Method


class MoELoRA(Method):
    """One mixture of LoRA experts per layer, shared by all tasks.

    Args:
        experts: E (LCIA's comparison: 2; CoIN: 8). The total rank `lora_r` is shared among them.
    """

    name = "moelora"

    def __init__(self, *, experts: int = 2) -> None:
        if isinstance(experts, bool) or not isinstance(experts, int) or experts < 1:
            raise ValueError(f"experts must be a whole number from 1, got {experts!r}")
        self._experts = experts

    def make_pool(self, backbone: Backbone, lora: dict[str, Any], seed: int) -> Pool:
        experts, rank, alpha = self._experts, lora["r"], lora["lora_alpha"]
        if rank % experts:
            raise UserError(
                f"key 'lora_r': {rank} cannot be shared by the {experts} experts of moelora; choose a multiple of "
                f"{experts}, or another number of experts"
            )

        def make(layer: torch.nn.Module) -> LoraExperts:
            return LoraExperts(*features(layer), experts, rank // experts, alpha / rank, lora["lora_dropout"])

        return ModulePool(
            backbone.model,
            linear_layers(backbone.model, lora["target_modules"]),
            make,
            kind=f"Mixture of {experts} LoRA experts",
            settings={"name": self.name, "experts": experts, **lora},
            base_name=backbone.name,
            seed=seed,
            projector=backbone.projector,
        )
