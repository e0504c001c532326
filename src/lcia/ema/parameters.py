"""The parameters that are averaged: whether they can be, and what this process sees of them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lcia.ema.sharding import Reduction, like, local, refuse_unreadable, shard_like, whole
from lcia.errors import did_you_mean


class Parameters:
    """Named parameters, always in one order; n of them.

    Args:
        named: (name, parameter) pairs or a mapping; those that do not require a gradient are left out.
        optional: names whose gradient may be missing.

    Raises:
        ValueError: nothing to average, parameters on several devices, or an unknown optional name.
        RuntimeError: something shards a parameter in a way that cannot be read.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor], optional: Collection[str]):
        pairs = named.items() if isinstance(named, Mapping) else named
        self.by_name = {name: parameter for name, parameter in pairs if parameter.requires_grad}
        self.names = list(self.by_name)
        self.optional = frozenset(optional)
        if not self.names:
            raise ValueError("no parameter requires a gradient: there is nothing to average")
        for name, parameter in self.by_name.items():
            refuse_unreadable(name, parameter)
            if not parameter.is_floating_point():
                raise ValueError(f"{name} is {parameter.dtype}, only real floating point weights can be averaged")
        devices = {str(parameter.device) for parameter in self.by_name.values()}
        if len(devices) > 1:
            raise ValueError(f"parameters lie on {' and '.join(sorted(devices))}: use one DynamicEMA per device")
        unknown = sorted(self.optional - set(self.names))
        if unknown:
            raise ValueError(f"optional names {unknown[0]!r}. {did_you_mean(unknown[0], self.names)}")
        self.reduction = Reduction(self.by_name)

    def weights(self) -> list[Tensor]:
        """θ_t, this process's part: the model's own tensors, to be used under no_grad."""
        return self._local(list(self.by_name.values()))

    def gradients(self, kept: Sequence[Tensor] | None) -> tuple[list[Tensor], list[int]]:
        """g_t, this process's part, and which are missing.

        Where an optional one is missing stands its last one, if the rule has `kept` those, else zeros.

        Raises:
            RuntimeError: one is missing that is not optional.
        """
        found = [parameter.grad for parameter in self.by_name.values()]
        missing = [i for i, gradient in enumerate(found) if gradient is None]
        for i in missing:
            if self.names[i] not in self.optional:
                raise RuntimeError(
                    f"{self.names[i]} has no gradient. Call this after backward() and before zero_grad(); a "
                    "parameter that some steps do not use can be named in optional="
                )
            found[i] = torch.zeros_like(self.by_name[self.names[i]]) if kept is None else kept[i]
        return self._local([gradient for gradient in found if gradient is not None]), missing

    def named(self, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        """{name: this process's part, as the kind of tensor that the parameter is}."""
        pairs = zip(self.by_name.items(), parts, strict=True)
        return {name: like(part, parameter) for (name, parameter), part in pairs}

    def named_whole(self, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        """{name: all elements, from all processes}: a collective call where parameters are sharded."""
        pairs = zip(self.by_name.items(), parts, strict=True)
        return {name: whole(like(part, parameter)) for (name, parameter), part in pairs}

    def parts_of(self, what: str, values: Mapping[str, Tensor]) -> list[Tensor]:
        """The parts that this process holds of these values, in the order of the parameters.

        Raises:
            ValueError: the names or shapes are not those of the parameters.
        """
        if set(values) != set(self.names):
            raise ValueError(f"{what} does not fit: {_difference(set(self.names), set(values))}")
        for name, parameter in self.by_name.items():
            if values[name].shape != parameter.shape:
                raise ValueError(
                    f"{what} of {name} is {tuple(values[name].shape)}, the parameter {tuple(parameter.shape)}"
                )
        return [shard_like(values[name].detach(), parameter) for name, parameter in self.by_name.items()]

    def sizes_and_positions(self) -> tuple[list[int], list[Tensor | None]]:
        """How many elements the whole tensors have, and which of them this process holds; None: all."""
        sizes: list[int] = []
        positions: list[Tensor | None] = []
        for parameter in self.by_name.values():
            sizes.append(parameter.numel())
            if not self.reduction.sharded:
                positions.append(None)
                continue
            numbered = torch.arange(sizes[-1]).view(parameter.shape)
            positions.append(shard_like(numbered, parameter).reshape(-1).cpu())
        return sizes, positions

    def layers(self) -> Tensor:  # (n,)
        """The number of the layer that each belongs to."""
        layers = [layer_of(name) for name in self.names]
        number = {layer: i for i, layer in enumerate(dict.fromkeys(layers))}
        return torch.tensor([number[layer] for layer in layers])

    def alphabetical(self) -> list[int]:
        """An order that does not depend on how a model lists its parameters: the one in which numbers are stored."""
        return sorted(range(len(self.names)), key=self.names.__getitem__)

    def _local(self, tensors: list[Tensor]) -> list[Tensor]:
        return [local(tensor) for tensor in tensors] if self.reduction.sharded else tensors


def layer_of(name: str) -> str:
    """The module that a parameter belongs to; the two factors of a LoRA pair belong to the layer they change.

    `h.0.mlp.weight` and `h.0.mlp.bias` → `h.0.mlp`; `h.0.mlp.lora_A.default.weight` → `h.0.mlp`.
    """
    module, _, _ = name.rpartition(".")
    return module.partition(".lora_")[0]


def _difference(expected: set[str], found: set[str]) -> str:
    missing, extra = sorted(expected - found), sorted(found - expected)
    lacks = f"{len(missing)} parameters have none, the first is {missing[0]}" if missing else ""
    has = f"{len(extra)} belong to no parameter, the first is {extra[0]}" if extra else ""
    return "; ".join(part for part in (lacks, has) if part)
