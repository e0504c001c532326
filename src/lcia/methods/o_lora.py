"""O-LoRA (Wang et al., EMNLP 2023 Findings, arXiv 2310.14152): L + λ₁ Σ_{t'<t} Σ |A_t A_t'ᵀ| + λ₂ Σ ‖θ_t‖₂.

Each task gets a LoRA of its own, learned on top of the earlier ones, which are frozen and stay in the sum:
W = W₀ + (α / r) Σ_t B_t A_t. Rows of A_t orthogonal to those of A_t' leave what the earlier tasks read untouched.

Shapes: r rank, in features of a layer's input, P earlier tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lcia.adapters import stack_name
from lcia.grouping import Match
from lcia.methods.base import Method, Placement, Training
from lcia.methods.options import number
from lcia.stream import Row, Task


def overlap(new: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
    """Σ_jk |(A_t A_t'ᵀ)_jk|, the entrywise L1 norm: 0 where every row of `new` is orthogonal to every earlier one.

    Args:
        new: (r, in), A of the task being learned.
        earlier: (P r, in), A of all earlier tasks, one below the other.
    """
    return (new @ earlier.T).abs().sum()


class OLoRA(Method):
    """A LoRA per task, kept orthogonal to the earlier ones; all of them together answer every request.

    Args:
        orthogonality: λ₁ of Σ |A_t A_t'ᵀ| (the paper's 0.5).
        shrinkage: λ₂ of Σ ‖θ_t‖₂, the Frobenius norms (not squared) of the new A and B of every layer (0: off).
    """

    name = "o_lora"
    published_learning_rate = 1e-3
    one_task_per_adapter = True

    def __init__(self, *, orthogonality: float = 0.5, shrinkage: float = 0.0) -> None:
        self._orthogonality = number("orthogonality", orthogonality)
        self._shrinkage = number("shrinkage", shrinkage)
        self._learned: list[str] = []  # adapters, in the order in which they were added to the sum

    def open_task(self, task: Task) -> Placement:
        return Placement(task.name, is_new=True, beneath=tuple(self._learned))

    def begin(self, training: Training) -> None:
        self._weights = list(training.parameters.values())
        new = _down_projections(training.parameters)
        earlier = [_down_projections(self.pool.parameters(adapter)) for adapter in training.placement.beneath]
        # one product per layer, however many tasks lie beneath: (r, in) with (P r, in)
        self._pairs = [
            (weight, torch.cat(matrices)) for weight, *matrices in zip(new, *earlier, strict=True) if matrices
        ]

    def penalty(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        terms = [self._orthogonality * overlap(new, earlier) for new, earlier in self._pairs]
        if self._shrinkage:
            terms += [self._shrinkage * torch.linalg.vector_norm(weight) for weight in self._weights]
        return torch.stack(terms).sum() if terms else None

    def close_task(self, task: Task) -> None:
        self._learned.append(task.name)
        self._weights, self._pairs = [], []

    def route(self, requests: Sequence[Row]) -> list[Match]:
        group = stack_name(self._learned) if self._learned else None
        return [Match(group, 1.0, {})] * len(requests)

    def state_dict(self) -> dict[str, Any]:
        return {"learned": list(self._learned)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._learned = list(state["learned"])

    def cost(self) -> dict[str, float]:
        return {"adapters_stored": len(self._learned)}


def _down_projections(parameters: Mapping[str, torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """A of every layer, in the model's order, which is the same for every adapter."""
    return [weight for name, weight in parameters.items() if ".lora_A." in name]
