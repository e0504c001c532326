"""Parameters that are spread over processes: which part is here, and how a sum over all parts is made.

DDP needs nothing: every process holds every weight, and the gradients are averaged before anybody reads them. FSDP2
holds DTensors: the averages stay sharded, element by element they need no neighbour, and only sums have to travel, of
all tensors in one message. FSDP1 and DeepSpeed ZeRO show a reader neither whole weights nor gradients, and under
accelerate the ZeRO engine has already cleared the gradients when a callback runs: refused.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate


def refuse_unreadable(name: str, parameter: Tensor) -> None:
    """Raise RuntimeError for a parameter whose weights or gradient are kept where nobody can read them."""
    if getattr(parameter, "ds_id", None) is not None or getattr(parameter, "_hp_mapping", None) is not None:
        raise RuntimeError(
            f"{name} is managed by DeepSpeed ZeRO, which keeps weights or gradients in its own partitions and clears "
            "them inside engine.step(): DynamicEMA cannot read them. Use DDP or FSDP2 instead"
        )
    if getattr(parameter, "_fsdp_flattened", False):
        raise RuntimeError(f"{name} is a view into an FSDP1 flat parameter: use FSDP2 (fsdp_version: 2) instead.")
    if parameter.numel() == 0:
        raise RuntimeError(
            f"{name} has no elements on this process although it is not a DTensor, so something unknown shards it: "
            "DynamicEMA understands plain parameters (one process, DDP) and DTensors (FSDP2)."
        )


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(local_part: Tensor, original: Tensor) -> Tensor:
    """This process's part as the kind of tensor that `original` is: a DTensor again where that is one."""
    if not isinstance(original, DTensor):
        return local_part
    return DTensor.from_local(
        local_part, original.device_mesh, original.placements, shape=original.shape, stride=original.stride()
    )


def whole(tensor: Tensor) -> Tensor:
    """All elements, from all processes. A collective call where `tensor` is a DTensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, original: Tensor) -> Tensor:
    """The part of `value`, a whole tensor or a DTensor, that this process holds of `original`."""
    if not isinstance(original, DTensor):
        return value
    if not isinstance(value, DTensor):  # every process has the whole
        value = DTensor.from_local(
            value.to(original.device),
            original.device_mesh,
            [Replicate()] * original.device_mesh.ndim,
            run_check=False,
        )
    return value.redistribute(original.device_mesh, original.placements).to_local()


def forget_gathered(model: nn.Module | None) -> None:
    """Make FSDP2 gather all weights anew, after somebody has changed the sharded ones.

    It keeps those of some modules behind a forward pass, for a backward pass that an evaluation does not have.
    """
    for module in () if model is None else model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class Reduction:
    """Sums over all processes that hold a part.

    Args:
        parameters: {name: parameter}; DTensors must share one mesh. Without a DTensor `sum` returns what it is given.
    """

    def __init__(self, parameters: dict[str, Tensor]):
        self.mesh: DeviceMesh | None = None
        copies = []
        for name, parameter in parameters.items():
            if isinstance(parameter, DTensor):
                if self.mesh is not None and parameter.device_mesh != self.mesh:
                    raise ValueError(f"{name} lies on {parameter.device_mesh}, other parameters on {self.mesh}")
                self.mesh = parameter.device_mesh
        for parameter in parameters.values():
            copies.append(self._copies(parameter))
        self._share = torch.tensor([1 / count for count in copies], dtype=torch.float64)  # (n,)

    def _copies(self, parameter: Tensor) -> int:
        """How many processes of the mesh hold the same elements."""
        if self.mesh is None:
            return 1
        if not isinstance(parameter, DTensor):
            return self.mesh.size()
        return math.prod(
            size
            for size, placement in zip(self.mesh.shape, parameter.placements, strict=True)
            if isinstance(placement, Replicate)
        )

    @property
    def sharded(self) -> bool:
        return self.mesh is not None

    @property
    def processes(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1

    def sum(self, values: Tensor) -> Tensor:  # (k, n) -> (k, n)
        """Σ over the processes, each element of a parameter counted once. One message for all."""
        if self.mesh is None:
            return values
        values = values * self._share.to(values)
        for dimension in range(self.mesh.ndim):
            dist.all_reduce(values, group=self.mesh.get_group(dimension))
        return values
