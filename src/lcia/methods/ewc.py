"""EWC (arXiv 1612.00796, Eq. 3): loss + λ/2 Σ_k F_k (θ_k − θ_prev,k)², F the diagonal of the Fisher information.

F = 1/n Σ_i (∂ℓ_i/∂θ)², ℓ_i = −log p(answer_i | prompt_i), over n training rows of the task that was just learned.

ℓ_i is summed over the tokens of the answer: only then is it the log-likelihood of the example, and F its Fisher
information; a mean would divide what a long answer tells by the square of its length. The labels are the true answers
(the empirical Fisher), not answers drawn from the model: one pass, and the rows at hand.

The gradients are squared example by example: the square of a batch's mean gradient is smaller by an order of
magnitude, because gradients of different examples cancel.

Several tasks in one adapter: F ← γ F + F_task with one anchor, the weights at the end of the last task (online EWC,
arXiv 1805.06370, γ = `decay`), or the last task's F alone, as CITB's code does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from lcia.backbone import answer_loss
from lcia.methods.base import Method, Training
from lcia.methods.options import count, number
from lcia.methods.passes import as_batch, draw, evaluating, flat
from lcia.stream import Task

_STATE = "fisher/"  # + adapter


def diagonal_fisher(losses: Iterable[torch.Tensor], weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """(P,) the mean over examples of their squared gradients, 1/n Σ_i (∂ℓ_i/∂θ)²; `.grad` is not touched.

    Args:
        losses: one scalar ℓ_i per example, best made one after the other: then one graph is in memory at a time.
        weights: θ, in the order of the result.
    """
    total = torch.zeros_like(flat(weights))
    examples = 0
    for loss in losses:
        # a projector that no image of the example went through has gradient 0
        gradients = torch.autograd.grad(loss, weights, materialize_grads=True)
        # squared before they are summed: the square of a mean is not the mean of squares
        total += flat(gradients).square()
        examples += 1
    return total / examples


class EWC(Method):
    """Stay near the weights before the task, the nearer the more an earlier task needs a number.

    An adapter's first task has no penalty, also where the adapter starts from another group's weights: what that group
    learned stays in that group's own adapter.

    Args:
        strength: λ. The loss of training is a mean per answer token and F belongs to a whole answer, so that λ = 1/T
            is the Laplace posterior of two equally large tasks with answers of T tokens; larger values are usual.
        fisher_examples: training rows that F is measured on, a draw that depends on the task's name alone; null = all.
        accumulate: add up F over the tasks of an adapter; false: the last task's F alone.
        decay: γ in [0, 1], what is left of the F of earlier tasks when one is added.
    """

    name = "ewc"
    idle_on_first_task = True
    measures_at_close = True

    def __init__(
        self,
        *,
        strength: float = 5000.0,
        fisher_examples: int | None = 128,
        accumulate: bool = True,
        decay: float = 1.0,
    ) -> None:
        if not isinstance(accumulate, bool):
            raise ValueError(f"accumulate must be true or false, got {accumulate!r}")
        if not accumulate and decay != 1.0:
            raise ValueError(f"decay is {decay!r} and accumulate false: nothing is added up that could decay")
        self._strength = number("strength", strength)
        self._fisher_examples = count("fisher_examples", fisher_examples)
        self._decay = number("decay", decay, high=1.0) if accumulate else 0.0
        self._fisher: dict[str, torch.Tensor] = {}  # adapter → (P,) F
        self._training: Training | None = None
        self._weights: list[torch.nn.Parameter] = []
        self._anchor: torch.Tensor | None = None  # (P,) θ_prev while a task is learned, and of its adapter
        self._importance = torch.empty(0)  # (P,) F, where the model is
        self._rows_measured = 0

    def begin(self, training: Training) -> None:
        self._training = training
        self._weights = list(training.parameters.values())
        self._anchor = None
        if not training.placement.is_new:
            self._anchor = flat(self._weights).detach()
            self._importance = self._fisher[training.placement.adapter].to(self._anchor.device)

    def penalty(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        if self._anchor is None:
            return None
        return self._strength / 2 * (self._importance * (flat(self._weights) - self._anchor) ** 2).sum()

    def close_task(self, task: Task) -> None:
        assert self._training is not None
        adapter, model = self._training.placement.adapter, self._training.model
        rows = draw(self._training.rows, self._fisher_examples, task.name, "fisher")
        device = self._weights[0].device
        with evaluating(model):
            losses = (answer_loss(model, as_batch([row], self.backbone, device), 1) for row in rows)
            fisher = diagonal_fisher(losses, self._weights)
        if adapter in self._fisher:
            fisher += self._decay * self._fisher[adapter].to(device)
        self._fisher[adapter] = fisher.cpu()
        self._rows_measured = len(rows)
        self._training, self._weights, self._anchor = None, [], None

    def state_dict(self) -> dict[str, Any]:
        return {f"{_STATE}{adapter}": fisher for adapter, fisher in self._fisher.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._fisher = {key.removeprefix(_STATE): fisher for key, fisher in state.items()}

    def adapters_changed(self, origin: Mapping[str, str]) -> None:
        known = self._fisher
        self._fisher = {name: known[source] for name, source in origin.items() if source in known}

    def cost(self) -> dict[str, float]:
        return {
            "numbers_stored": sum(fisher.numel() for fisher in self._fisher.values()),
            "extra_forward_rows": self._rows_measured,
            "extra_backward_rows": self._rows_measured,
        }
