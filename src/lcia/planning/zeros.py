"""Running a model without its numbers: integers are computed, floating-point numbers are taken as zero.

A floating-point tensor lies on torch's `meta` device: it has a shape and a dtype, and takes no memory. What decides
about shapes (token ids, masks, positions, counts) is integral, lies on the CPU and is computed. So the code of a run
itself goes through: forward and backward pass, a method's moments, generation.

    a number read from a float tensor          0
    integers made of floats (x > 0, argmax)    what they are of zeros
    a random draw of integers (dropout's mask) unknown: it lies on `meta` too, and nothing may depend on it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_torch_attention = torch.nn.functional.scaled_dot_product_attention
_TELLING = {_aten._local_scalar_dense.default, _aten.equal.default}  # a number, in Python
_INDEXING = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}
# Their integers say whether the matrix can be factored. That of zeros cannot, that of the run can.
_FACTORING = {_aten.linalg_cholesky_ex.default, _aten.linalg_inv_ex.default, _aten.linalg_ldl_factor_ex.default}
_BY_INDEX = {*_INDEXING, _aten.masked_select.default}  # a mask that is real says how many there are
# Their result is like the largest of their inputs, or is the first of them. To find that out torch goes a long way in
# Python, which would take a third of the time.
_LIKE_INPUTS = {
    _aten.add.Tensor,
    _aten.div.Tensor,
    _aten.mul.Tensor,
    _aten.neg.default,
    _aten.pow.Tensor_Scalar,
    _aten.sqrt.default,
    _aten.sub.Tensor,
}
_IN_PLACE = {
    _aten.add_.Tensor,
    _aten.addcdiv_.default,
    _aten.addcmul_.default,
    _aten.lerp_.Scalar,
    _aten.mul_.Tensor,
}
_FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray}
_LARGEST = 2**26  # elements of an integer tensor that is computed from floats; a larger one is unknown


@contextmanager
def floats_are_zero(device: str) -> Iterator[None]:
    """Inside, floating-point tensors on `meta` behave as zeros.

    Args:
        device: cpu | cuda, where the code would run: it decides which attention kernel stands for
            scaled_dot_product_attention, and what `is_cuda` says.
    """
    with ExitStack() as both:
        both.enter_context(_Operations())
        both.enter_context(_Functions(device))
        # Not as a function of the mode: what is computed again in a backward pass, where no such mode is on, needs it.
        both.enter_context(
            patch.object(torch.nn.functional, "scaled_dot_product_attention", partial(_attention, device))
        )
        yield


def _is_meta(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_meta


def _is_integral(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex())


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Those in the arguments or the result of an operation. torch's own tree functions take most of the time here."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors(part)


def _mapped(change: Callable[[torch.Tensor], Any], value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    return type(value)(_mapped(change, part) for part in value) if type(value) in (list, tuple) else value


def _zeros(tensor: torch.Tensor) -> torch.Tensor:
    """Real zeros in the place of a tensor on `meta`: one number, shown in every place."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) if tensor.is_meta else tensor


class _Operations(TorchDispatchMode):
    """Every operation of torch, below autograd."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [*tensors(args), *tensors(tuple(kwargs.values()))]
        if not any(tensor.is_meta for tensor in given):
            return self._made(func, args, kwargs)
        if func in _LIKE_INPUTS or func in _IN_PLACE:
            shown = _shown(func, given)
            if shown is not None:
                return shown
        unknown = any(tensor.is_meta and _is_integral(tensor) for tensor in given)
        if func in _TELLING or torch.Tag.dynamic_output_shape in func.tags or _writes_real(func, args):
            if unknown:
                raise RuntimeError(f"{func} depends on integers that were drawn at random, or of too many floats")
            if func not in _BY_INDEX:  # nonzero, unique
                return self._of_zeros(func, args, kwargs)
        if func is _aten.masked_select.default and not _is_meta(args[1]):
            mask = args[1].expand(torch.broadcast_shapes(args[0].shape, args[1].shape))
            func, args = _aten.index.Tensor, (args[0].expand(mask.shape), [mask])
        if func in _INDEXING:
            args = (args[0], _as_positions(args[1]), *args[2:])
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"  # wherever it would go
        made = func(
            *_mapped(lambda tensor: tensor.to("meta"), args),
            **{name: _mapped(lambda tensor: tensor.to("meta"), value) for name, value in kwargs.items()},
        )
        integral = [tensor for tensor in tensors(made) if _is_integral(tensor)]
        if not integral or unknown or torch.Tag.nondeterministic_seeded in func.tags:
            return made
        if max(tensor.numel() for tensor in integral) > _LARGEST:
            return made
        if func in _FACTORING:
            known = iter([torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in integral])
        else:
            known = (tensor for tensor in tensors(self._of_zeros(func, args, kwargs)) if _is_integral(tensor))
        return _mapped(lambda tensor: next(known) if _is_integral(tensor) else tensor, made)

    @staticmethod
    def _made(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Of real tensors, or of none: what is integral is real, wherever it was wanted."""
        made = func(*args, **kwargs)
        if _is_integral(made) and made.is_meta:
            return func(*args, **{**kwargs, "device": "cpu"})
        return made

    @staticmethod
    def _of_zeros(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """With real zeros for the floats; what is float in the result is none of its numbers."""
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": "cpu"}
        return func(*_mapped(_zeros, args), **{name: _mapped(_zeros, value) for name, value in kwargs.items()})


def _shown(func: Any, given: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The result of an operation of numbers with numbers, where it is like the largest of its inputs."""
    result = given[0] if func in _IN_PLACE else max(given, key=torch.Tensor.numel)
    if not result.is_meta or not all(_goes_into(tensor, result) for tensor in given):
        return None
    return result if func in _IN_PLACE else torch.empty_like(result)


def _goes_into(tensor: torch.Tensor, result: torch.Tensor) -> bool:
    """Whether neither the dtype nor the shape of `result` changes when `tensor` is one of its inputs."""
    same_kind = tensor.dtype == result.dtype or tensor.dim() == 0 < result.dim()
    sizes = zip(reversed(tensor.shape), reversed(result.shape), strict=False)
    return (
        tensor.is_floating_point()
        and same_kind
        and tensor.dim() <= result.dim()
        and all(size in (1, wanted) for size, wanted in sizes)
    )


@cache
def _written(func: Any) -> list[int]:
    """Which of its positional arguments an operation changes."""
    arguments = func._schema.arguments
    return [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]


def _writes_real(func: Any, args: Sequence[Any]) -> bool:
    changed = [args[i] for i in _written(func) if i < len(args)]
    return any(isinstance(value, torch.Tensor) and not value.is_meta for value in changed)


def _as_positions(indices: Sequence[Any]) -> list[Any]:
    """Masks as the positions where they are true."""
    found: list[Any] = []
    for index in indices:
        is_mask = isinstance(index, torch.Tensor) and index.dtype == torch.bool and not index.is_meta
        found += index.nonzero(as_tuple=True) if is_mask else [index]
    return found


class _Functions(TorchFunctionMode):
    """The few functions that look past single operations: at the device, or into the memory of a tensor."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return self._device == "cuda"
        if func is torch.Tensor.tolist and _is_meta(args[0]):
            return _zeros(args[0]).tolist()
        if func in _FROM_DATA and str(kwargs.get("device")) == "meta":  # made in one piece, out of sight of operations
            made = func(*args, **{**kwargs, "device": "cpu"})
            return made if _is_integral(made) else made.to("meta")
        return func(*args, **kwargs)


def _attention(
    device: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """scaled_dot_product_attention by the kernel that torch takes on `device`; on `meta` it takes one that keeps all
    attention weights.
    """
    if not query.is_meta or (device == "cpu" and dropout_p > 0):  # on a CPU no other kernel drops out
        return _torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    bias = None
    if attn_mask is not None:
        bias = attn_mask.to("meta")
        if bias.dtype == torch.bool:  # torch makes numbers of it, in every layer anew
            bias = torch.empty(bias.shape, dtype=query.dtype, device="meta")
    result: torch.Tensor
    if device == "cpu":
        result = _aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=bias, scale=scale
        )[0]
    elif bias is None:
        result = _aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    else:
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
        needed = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
        result = _aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, needed, dropout_p, is_causal, scale=scale
        )[0]
    return result
