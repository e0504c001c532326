"""A-GEM (arXiv 1812.00420): the step may not raise the loss on an episodic memory, to first order.

    g ← g                                   if g·g_ref ≥ 0
    g ← g − (g·g_ref / ‖g_ref‖²) g_ref      else

g is the gradient of the step over all trained numbers as one vector, g_ref that of the answer loss on a batch drawn
from the memory.

The gradients that are projected are clipped already. Clipping the norm multiplies g by one positive number c, and the
projection of c·g is c times the projection of g: the same condition, the same direction. The projection never makes a
vector longer, so that what was clipped stays within the bound. `see_grads` comes before clipping, but there other parts
of a composition look at the gradients of the loss, which must be the same whether this part stands before or behind
them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from lcia.backbone import answer_loss
from lcia.files import write_json
from lcia.methods.base import Training
from lcia.methods.memory import EpisodicMemory
from lcia.methods.options import count
from lcia.methods.passes import as_batch, draw, evaluating, flat
from lcia.stream import Row

_FILE = "agem.json"  # in a checkpoint inside a task


def project(gradient: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """(P,) the vector nearest to g whose inner product with g_ref is not negative; g itself where that holds."""
    product = gradient @ reference
    if product >= 0:
        return gradient
    return gradient - product / (reference @ reference) * reference


class AGEM(EpisodicMemory):
    """Projects gradients that would raise the loss on rows of earlier tasks in the same adapter.

    Args:
        memory: rows kept of each task, a draw that depends on the task's name alone; null = all.
        reference_batch: rows g_ref averages over, drawn for every step by the task's name and the step's number; null:
            as many as one step of the training.
    """

    name = "agem"

    def __init__(self, *, memory: int | None = 10, reference_batch: int | None = None) -> None:
        super().__init__(memory=memory)
        self._reference_batch = count("reference_batch", reference_batch)
        self._steps = 0  # of this task
        self._projected = 0  # steps of this task whose gradient was changed
        self._weights: list[torch.nn.Parameter] = []
        self._rows: list[Row] = []  # of the memory, for this task
        self._rows_per_step = 0  # of them, in one g_ref
        self._rows_at_once = 1  # of these, in one pass through the model

    def begin(self, training: Training) -> None:
        super().begin(training)
        self._weights = list(training.parameters.values())
        self._rows = self.remembered(training.placement.adapter)
        self._rows_per_step = min(self._reference_batch or training.examples_per_gradient, len(self._rows))
        self._steps, self._projected = training.first_step, 0

    def penalty(self, batch: Mapping[str, torch.Tensor]) -> None:
        """None; the training's own micro-batch says how many rows the memory of the machine has room for."""
        self._rows_at_once = len(batch["labels"])

    def reference_gradient(self) -> torch.Tensor:
        """(P,) g_ref of this step, up to a positive factor; `.grad` is not touched.

        Without dropout: then it is the gradient of the loss itself, and no random number of the training is used up.
        """
        assert self._training is not None
        task, model = self._training.task, self._training.model
        rows = draw(self._rows, self._rows_per_step, task.name, "reference", str(self._steps))
        total = torch.zeros_like(flat(self._weights))
        with evaluating(model):
            for start in range(0, len(rows), self._rows_at_once):
                batch = as_batch(rows[start : start + self._rows_at_once], self.backbone, total.device)
                # a sum over tokens and not their mean: the projection is the same for every length of g_ref
                loss = answer_loss(model, batch, 1)
                # a projector that no image of the batch went through has gradient 0
                total += flat(torch.autograd.grad(loss, self._weights, materialize_grads=True))
        return total

    def shape_grads(self) -> None:
        if self._rows:
            gradients = [weight.grad for weight in self._weights if weight.grad is not None]
            if len(gradients) < len(self._weights):
                raise RuntimeError("agem: a trained parameter has no gradient, so there is no vector g to project")
            gradient = flat(gradients)
            allowed = project(gradient, self.reference_gradient())
            if allowed is not gradient:
                self._projected += 1
                for part, target in zip(allowed.split([g.numel() for g in gradients]), gradients, strict=True):
                    target.copy_(part.view_as(target))
        self._steps += 1

    def log(self) -> dict[str, float]:
        """The share of this task's steps so far whose gradient was projected."""
        return {"projected_fraction": self._projected / self._steps} if self._training and self._rows else {}

    def save_progress(self, folder: Path) -> None:
        write_json(folder / _FILE, {"projected": self._projected})

    def load_progress(self, folder: Path) -> None:
        self._projected = json.loads((folder / _FILE).read_text(encoding="utf-8"))["projected"]

    def cost(self) -> dict[str, float]:
        passed = self._steps * self._rows_per_step
        return {**super().cost(), "extra_forward_rows": passed, "extra_backward_rows": passed}
