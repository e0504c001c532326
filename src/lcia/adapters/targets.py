"""Which modules of a model an adapter changes; no architecture is named."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

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


def language_targets(model: PreTrainedModel, targets: str | Sequence[str]) -> str | Sequence[str]:
    """`lora_target_modules` of a vision-language model, for PEFT: the same modules, of the language model only.

    Raises:
        UserError: none is found there, or a pattern matches modules of the vision tower.
    """
    decoder = model.get_decoder()
    language = next(path for path, module in model.named_modules() if module is decoder)
    found = linear_layers(model, targets)
    inside = [path for path in found if path.startswith(f"{language}.")]
    outside = sorted(set(found) - set(inside))
    is_pattern = isinstance(targets, str) and targets != "all-linear"
    if not inside or (is_pattern and outside):
        example = f"; {outside[0]} is outside it" if outside else ""
        raise UserError(f"key 'lora_target_modules': only the language model, {language}, is changed{example}")
    if is_pattern:
        return targets
    ends = "|".join(sorted({re.escape(path.rsplit(".", 1)[-1]) for path in inside}))
    pattern = rf"{re.escape(language)}\..*\.({ends})"
    return pattern if set(linear_layers(model, pattern)) == set(inside) else inside


def sublayers(model: PreTrainedModel, name: str) -> dict[str, torch.nn.Module]:
    """{path: module} of attention and MLP of every layer, whose outputs are added to the residual stream.

    An encoder-decoder has two such sub-layers in an encoder's layer, and three in a decoder's: self-attention,
    cross-attention, MLP. The layers are the first list of modules in encoder and decoder, in a decoder-only model the
    first of `num_hidden_layers` of them.

    Args:
        name: how the user calls the model.

    Raises:
        UserError: a layer has another number of them.
    """
    config = model.config.get_text_config()
    is_pair = model.config.is_encoder_decoder
    stacks = [(model.get_encoder(), 2), (model.get_decoder(), 3)] if is_pair else [(model.get_decoder(), 2)]
    paths = {module: path for path, module in model.named_modules()}
    found: dict[str, torch.nn.Module] = {}
    for stack, expected in stacks:
        lists = [module for module in stack.modules() if isinstance(module, torch.nn.ModuleList)]
        layers = next((list(one) for one in lists if is_pair or len(one) == config.num_hidden_layers), [])
        inside = [list(_writers(layer, config.hidden_size)) for layer in layers]
        if {len(writers) for writers in inside} != {expected}:
            raise UserError(
                f"model {name}: attention and MLP of its layers cannot be told apart; adapter_cl needs exactly "
                f"{expected} of them in every layer of {type(stack).__name__}"
            )
        found |= {paths[module]: module for writers in inside for module in writers}
    return found


def _writers(parent: torch.nn.Module, width: int) -> Iterator[torch.nn.Module]:
    """The modules of a layer that write into its residual stream: those of its direct children that hold a matrix
    (norms hold none).

    A child that is one linear layer only counts where it has `width` outputs: OPT's layers hold the two matrices of
    their MLP directly. T5's hold a list of sub-layers, each of which adds its own child to the residual stream.
    """
    for child in parent.children():
        if isinstance(child, torch.nn.ModuleList):
            for member in child:
                yield from _writers(member, width)
        elif any(parameter.ndim > 1 for parameter in child.parameters()) and not (
            isinstance(child, _LINEAR) and features(child)[1] != width
        ):
            yield child


def attention_outputs(model: PreTrainedModel, name: str) -> dict[str, torch.nn.Module]:
    """{path: linear layer}: the output projection of every attention in the language model, cross-attention included.

    An attention is a module that is called so (`self_attn`, `attention`, `EncDecAttention`) and holds linear layers;
    the last of them that is as wide as the model writes its result.

    Args:
        name: how the user calls the model.

    Raises:
        UserError: none is found.
    """
    width = model.config.get_text_config().hidden_size
    stacks = [model.get_encoder(), model.get_decoder()] if model.config.is_encoder_decoder else [model.get_decoder()]
    paths = {module: path for path, module in model.named_modules()}
    found: dict[str, torch.nn.Module] = {}
    for stack in stacks:
        for path, module in stack.named_modules():
            if "att" in path.rsplit(".", 1)[-1].lower():
                wide = [part for part in module.children() if isinstance(part, _LINEAR) and features(part)[1] == width]
                found |= {paths[layer]: layer for layer in wide[-1:]}
    if not found:
        raise UserError(f"model {name}: no attention with an output projection is found in it")
    return found
