"""float32 products of matrices on a processor of AMD's, by oneDNN.

torch has oneDNN multiply half precision, and MKL float32. On AMD's processors MKL takes instructions of half the width:
100 GFLOP/s a core, where oneDNN has 220. Both round to float32, and add up in another order. Products with narrow
matrices, as LoRA's, gain nothing, and stay torch's.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


def available() -> bool:
    """Whether this is a processor of AMD's, and torch was built with oneDNN."""
    return _is_amd() and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def library() -> str:
    """Whose float32 products of wide matrices are taken here."""
    return "oneDNN" if available() else "torch"


def _is_amd() -> bool:
    facts = Path("/proc/cpuinfo")
    told = facts.read_text(encoding="utf-8") if facts.is_file() else platform.processor()
    return "AuthenticAMD" in told


_AVAILABLE = available()
_LEAST = 1 << 16  # elements of a matrix: what a product gains is lost in the calls where there are fewer


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b as of torch.nn.functional.linear: (..., in), (out, in), (out,) to (..., out).

    With oneDNN switched off (`torch.backends.mkldnn.flags(enabled=False)`) it is that function.
    """
    tensors = [x, weight] if bias is None else [x, weight, bias]
    ours = _AVAILABLE and all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
    switched_off = not torch.backends.mkldnn.enabled or torch.is_autocast_enabled("cpu")
    if not ours or switched_off or weight.numel() < _LEAST or not x.numel():
        return linear(x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        rows: Tensor = _Product.apply(x.flatten(0, -2) if x.dim() > 1 else x[None], weight, bias)
        # no view for autograd: what is added in its place (lcia.adapters.lora) would have it copied three times
        found: Tensor = torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], len(weight)])
        return found
    return _multiply(x, weight, bias)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # no activation behind it
    return found


class _Product(torch.autograd.Function):
    """The same of (rows, in), with its gradients, which are products too."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _multiply(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x if weight.requires_grad else None, weight if x.requires_grad else None)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous()  # of a sum it is one number, seen everywhere
        of_x = of_weight = of_bias = None
        if weight is not None:
            of_x = product(gradient, weight.T)
        if x is not None:
            wide = x.shape[1] > gradient.shape[1]  # many columns are faster than many rows
            of_weight = product(gradient.T, x.T) if wide else product(x.T, gradient.T).T  # (out, in)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(0)
        return of_x, of_weight, of_bias


class Linear(nn.Linear):
    """torch's linear layer, by `product`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return product(input, self.weight, self.bias)


def use_own_products(model: nn.Module) -> None:
    """torch's plain linear layers in `model` get the forward above."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
