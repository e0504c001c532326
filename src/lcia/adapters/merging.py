"""Adapters merged into the weights they adapt, and the model that then is one of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from transformers.utils import cached_file

from lcia.adapters.pool import AdapterPool
from lcia.backbone import Reader
from lcia.errors import UserError


def check_mergeable(model: torch.nn.Module, layers: Iterable[torch.nn.Module]) -> None:
    """Raises UserError where a weight of `layers` has a second use in `model`, which must not change."""
    uses: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        uses.setdefault(parameter, []).append(name)
    for layer in layers:
        weight = layer.weight
        assert isinstance(weight, torch.nn.Parameter)
        shared = uses[weight]
        if len(shared) > 1:
            raise UserError(
                f"an adapted weight is shared, {' and '.join(shared)}: an adapter cannot be merged into it (`lcia "
                "export` has --as peft; for init_stream leave it out of lora_target_modules)"
            )


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
    adapted = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    check_mergeable(model, (layer.get_base_layer() for layer in adapted))
    error = change = 0.0
    for layer in adapted:
        weight = layer.get_base_layer().weight  # (out, in)
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


def write_model(pool: AdapterPool, reader: Reader, base: str, folder: Path, projector: str | None = None) -> None:
    """A model folder: the base as it is in memory and what reads rows for it; the pool is empty afterwards.

    Args:
        base: hub id or folder that it was loaded from.
        projector: the adapter whose projector takes the place of the base's.
    """
    pool.unload(projector).save_pretrained(folder)
    reader.chat.save_pretrained(folder)
    # A run sets the model's own defaults of generation aside; whoever loads this folder gets them back.
    absent_is_fine = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    defaults = cached_file(base, "generation_config.json", **absent_is_fine)
    if defaults is not None:
        shutil.copyfile(defaults, folder / "generation_config.json")
