"""L2: loss + λ Σ (θ − θ_prev)², θ_prev being the adapter's weights before the task.

Source: the baseline of that name in CITB (Zhang et al., 2023), whose code weighs all numbers alike: no Fisher.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lcia.methods.base import Method, Training
from lcia.methods.options import number
from lcia.methods.passes import flat
from lcia.stream import Task


class L2(Method):
    """Stay near the weights before the task, every number alike.

    An adapter's first task has no penalty, also where the adapter starts from another group's weights: what that group
    learned stays in that group's own adapter, so that nothing is lost by moving away.

    Args:
        strength: λ (CITB: 0.01); per squared unit of weight, against a loss in nats per answer token.
    """

    name = "l2"
    idle_on_first_task = True

    def __init__(self, *, strength: float = 0.01) -> None:
        self._strength = number("strength", strength)
        self._weights: list[torch.nn.Parameter] = []
        self._anchor: torch.Tensor | None = None  # (P,) θ_prev while a task is learned

    def begin(self, training: Training) -> None:
        self._weights = list(training.parameters.values())
        self._anchor = None if training.placement.is_new else flat(self._weights).detach()

    def penalty(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        if self._anchor is None:
            return None
        return self._strength * ((flat(self._weights) - self._anchor) ** 2).sum()

    def close_task(self, task: Task) -> None:
        self._weights, self._anchor = [], None
