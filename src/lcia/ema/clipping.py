"""What gradient clipping has done, found out from outside.

A Trainer clips before the first of its callbacks can look, and tells none of them the norm. But clipping multiplies
all gradients by one number, and a few of them, copied when backward produced them, give it away.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lcia.ema.sharding import local

# The last parameters are nearest to the loss, and eight hold both factors of a LoRA pair: one of them has a zero
# gradient in the first step.
WATCHED_PARAMETERS = 8
WATCHED_ELEMENTS = 4096
# Below this the two sides differ by rounding, not by clipping.
ROUNDING = 1e-5


class ClipWatch:
    """Finds 1/c where gradients are clipped to c·g.

    Works for one process, for DDP (the copies are made before DDP averages the gradients, so they are averaged here)
    and for FSDP2 (hooks run on the reduced shard).
    """

    def __init__(self, parameters: Iterable[Tensor]):
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad][-WATCHED_PARAMETERS:]
        self._copies: dict[int, Tensor] = {}
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._copy) for parameter in self._parameters]
        self.unknown = 0  # times that nothing could be found out, because all watched gradients were zero

    def _copy(self, parameter: Tensor) -> None:
        # Every backward pass overwrites the copy: the last one before a step leaves the accumulated gradient.
        self._copies[id(parameter)] = _few_of(parameter.grad).clone()

    def undo(self, loss_scale: float = 1.0) -> float:
        """1/c ≥ 1, by which the clipped gradients must be multiplied. Call it after clipping, once a step.

        Args:
            loss_scale: what the loss was multiplied by (fp16) and unscaling has since divided the gradients by.
        """
        # Zeros where there is nothing: DDP also gives a process the gradients of parameters that had a part in the loss
        # of another one only, and all processes must add up the same elements.
        nothing = [torch.zeros_like(_few_of(parameter)) for parameter in self._parameters]
        watched = list(zip(self._parameters, nothing, strict=True))
        before = torch.cat([self._copies.pop(id(parameter), zero) for parameter, zero in watched]) / loss_scale
        after = torch.cat([zero if parameter.grad is None else _few_of(parameter.grad) for parameter, zero in watched])
        several = dist.is_initialized() and dist.get_world_size() > 1
        if several and not isinstance(self._parameters[0], DTensor):
            dist.all_reduce(before)
            before /= dist.get_world_size()
        products = torch.stack([before @ before, before @ after])
        if several and isinstance(self._parameters[0], DTensor):
            dist.all_reduce(products)
        ratio = float(products[0] / products[1])
        if not 0 < ratio < float("inf"):
            self.unknown += 1
            return 1.0
        return ratio if ratio > 1 + ROUNDING else 1.0

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


def _few_of(tensor: Any) -> Tensor:
    return local(tensor.detach()).reshape(-1)[:WATCHED_ELEMENTS].float()
