"""Which modules of a model an adapter changes; no architecture is named."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lcia.errors import UserError

_LINEAR = (torch.nn.Linear, Conv1D)  # GPT-2 keeps its matrices in transformers' Conv1D


def features(layer: torch.nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear layer."""
    assert isinstance(layer, _LINEAR)
    outputs, inputs = layer.weight.shape if isinstance(layer, torch.nn.Linear) else layer.weight.T.shape
    return int(inputs), int(outputs)


def linear_layers(model: PreTrainedModel, targets: str | Sequence[str]) -> dict[str, torch.nn.Module]:
    """{path: layer} of the layers that `lora_target_modules` means, as PEFT reads it.

    Args:
        targets: `all-linear` (all but the vocabulary projection), a pattern that matches the whole path, or the ends
            of paths.

    Raises:
        UserError: none is found, or a module found is not a linear layer.
    """
    if targets == "all-linear":
        head = model.get_output_embeddings()
        return {path: m for path, m in model.named_modules() if isinstance(m, _LINEAR) and m is not head}
    if isinstance(targets, str):
        found = {path: m for path, m in model.named_modules() if re.fullmatch(targets, path)}
    else:
        found = {p: m for p, m in model.named_modules() if any(f".{p}".endswith(f".{end}") for end in targets)}
    if not found:
        raise UserError(f"key 'lora_target_modules': the model has no module {targets!r}")
    for path, module in found.items():
        if not isinstance(module, _LINEAR):
            raise UserError(f"key 'lora_target_modules': {path} is a {type(module).__name__}, not a linear layer")
    return found


def sublayers(model: PreTrainedModel, name: str) -> dict[str, torch.nn.Module]:
    """{path: module} of attention and MLP of every decoder layer, whose outputs are added to the residual stream.

    The layers are the first list of `num_hidden_layers` modules in the model; their sub-layers are those of their
    direct children that hold a matrix (norms hold none). A child that is one linear layer only counts where it writes
    into the residual stream: OPT's layers hold the two matrices of their MLP directly.

    Args:
        name: how the user calls the model.

    Raises:
        UserError: there are not exactly two of them in every layer.
    """
    config = model.config.get_text_config()
    lists = (
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == config.num_hidden_layers
    )
    path, layers = next(lists, ("", torch.nn.ModuleList()))
    found = {
        f"{path}.{i}.{key}": child
        for i, layer in enumerate(layers)
        for key, child in layer.named_children()
        if any(parameter.ndim > 1 for parameter in child.parameters())
        and not (isinstance(child, _LINEAR) and features(child)[1] != config.hidden_size)
    }
    counts = [sum(key.startswith(f"{path}.{i}.") for key in found) for i in range(len(layers))]
    if not layers or set(counts) != {2}:
        raise UserError(
            f"model {name}: attention and MLP of its layers cannot be told apart; adapter_cl needs exactly these two "
            "in every layer"
        )
    return found
