"""What the new task needs: F_new, the diagonal of its Fisher information, from gradients that training makes anyway.

With g a mean over n examples, three readings of the same quantity E[(∂ log p / ∂θ)²] per example:

    running       n · mean over steps of g²           its own running mean, of gradients as they are before clipping
    adamw         n · v̂                               the optimizer's bias-corrected second moment: no state of our own,
                                                      but of clipped gradients, and with the optimizer's horizon
    per_example   n · mean over steps of Σ_i m_i²     g = Σ m_i, the parts that single backward passes add: exact when
                                                      every backward pass holds one example

Near a minimum E[g] = 0 and they agree. On the way there the first two count E[g]² n times, the last one once: with a
large batch and a short task, `running` and `adamw` find the new task more demanding than it is.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lcia.ema.sharding import local

SOURCES = ("running", "adamw", "per_example")


def bias_correction(decay: float | Tensor, observed: Tensor) -> Tensor:
    """1 / (1 − decay^observed), 0 where nothing has been observed: a running mean that began at zero, made unbiased."""
    return torch.where(observed > 0, 1 / (1 - decay ** observed.clamp_min(1)), torch.zeros_like(observed))


def adamw_second_moment(
    optimizer: Any, parameters: Mapping[str, Tensor], optional: Collection[str] = ()
) -> tuple[list[Tensor], Tensor]:
    """The running means of g² that Adam or AdamW keeps, and the factors (n,) that make them unbiased.

    Args:
        optional: names that may have had no gradient yet; of these the optimizer keeps nothing until they have.

    Raises:
        ValueError: the optimizer keeps none for a parameter (another optimizer, or it has not stepped yet).
    """
    decays = {
        id(parameter): group["betas"][1]
        for group in optimizer.param_groups
        if "betas" in group
        for parameter in group["params"]
    }
    counting_there = {  # on the parameter's device; else on the CPU
        id(parameter)
        for group in optimizer.param_groups
        if group.get("fused") or group.get("capturable")
        for parameter in group["params"]
    }
    moments, decay, steps = [], [], []
    for name, parameter in parameters.items():
        state = optimizer.state.get(parameter, {})
        if id(parameter) in decays and not state and name in optional:
            step = torch.zeros((), device=parameter.device if id(parameter) in counting_there else "cpu")
            state = {"exp_avg_sq": torch.zeros_like(parameter, requires_grad=False), "step": step}
        if id(parameter) not in decays or "exp_avg_sq" not in state:
            raise ValueError(
                f"the optimizer {type(optimizer).__name__} keeps no running mean of squared gradients (exp_avg_sq) for "
                f"{name}: fisher_source='adamw' needs torch.optim.Adam or AdamW after a step; 'running' works with all"
            )
        moments.append(local(state["exp_avg_sq"]))
        decay.append(decays[id(parameter)])
        steps.append(torch.as_tensor(state["step"], dtype=torch.float32))
    observed = torch.stack(steps)
    return moments, bias_correction(torch.tensor(decay, dtype=observed.dtype, device=observed.device), observed)


def watch_backward_passes(parameters: Iterable[Tensor]) -> tuple[list[Tensor], list[RemovableHandle]]:
    """Tensors to which every backward pass adds the square of what it adds to each gradient, and the hooks' handles."""

    def add_square_to(total: Tensor) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            wide = gradient.detach().float()
            total.addcmul_(wide, wide)

        return hook

    totals, handles = [], []
    for parameter in parameters:
        totals.append(torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False))
        handles.append(parameter.register_hook(add_square_to(totals[-1])))
    return totals, handles


def remove_hooks(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
