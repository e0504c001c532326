"""Adapters merged into the weights they adapt."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer

from lcia.errors import UserError


@torch.no_grad()
def merge_active(model: torch.nn.Module, dtype: torch.dtype | None) -> float:
    """W ← W + Σ s·B·A over the active adapters (LoRA, arXiv 2106.09685, §4.1), summed in fp32, stored in `dtype`.

    Args:
        model: with PEFT's LoRA layers; they stay in it, PEFT's `unload` takes them out.
        dtype: of all parameters but the adapters; None keeps each as it is.

    Returns:
        ‖stored − exact‖ / ‖Σ s·B·A‖ over all adapted weights: the share of the change that rounding took; 0 without a
        change.

    Raises:
        UserError: an adapted weight has a second use, which must not change.
    """
    uses: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses.setdefault(parameter, []).append(name)
    error = change = 0.0
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        weight = layer.get_base_layer().weight  # (out, in)
        if len(uses[weight]) > 1:
            shared = " and ".join(uses[weight])
            raise UserError(f"--as merged: an adapted weight is shared, {shared}; use --as peft")
        updates = [layer.get_delta_weight(name).float() for name in layer.active_adapters]
        update = torch.stack(updates).sum(0)  # (out, in)
        exact = weight.float() + update
        weight.data = exact.to(dtype or weight.dtype)
        error += (weight.float() - exact).double().square().sum().item()
        change += update.double().square().sum().item()
    if dtype is not None:
        for name, parameter in model.named_parameters():
            if "lora_" not in name:
                parameter.data = parameter.data.to(dtype)
    return float((error / change) ** 0.5) if change else 0.0
