"""LwF (arXiv 1606.09282): cross entropy + weight · KL(p_old ‖ p_new), a mean over the new task's answer tokens.

p = softmax(z / T) over the vocabulary; z_old are the logits of the model with the adapter's weights before the task, on
the new task's own rows: no old data. The paper minimises the cross entropy −Σ p_old log p_new, whose gradient is that
of KL(p_old ‖ p_new), with T = 2 and weight 1, and without the factor T² of distillation (arXiv 1503.02531, §2).
TRACE's code swaps the two arguments of the divergence; this follows the paper.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch.nn.functional import kl_div

from lcia.backbone import answer_logits
from lcia.files import write_json
from lcia.methods.base import Method, Training
from lcia.methods.options import number
from lcia.methods.passes import evaluating
from lcia.processes import count
from lcia.stream import Task

_FILE = "lwf.json"  # in a checkpoint inside a task: the rows the teacher has seen


def distillation(new: torch.Tensor, old: torch.Tensor, temperature: float) -> torch.Tensor:
    """Σ_n KL(softmax(old_n / T) ‖ softmax(new_n / T)): a scalar, of logits (N, V)."""
    log_new = (new / temperature).log_softmax(-1)
    log_old = (old / temperature).log_softmax(-1)
    # torch's second argument stands first in the divergence
    return kl_div(log_new, log_old, reduction="sum", log_target=True)


class LwF(Method):
    """Answer the new task's rows as the weights before the task would.

    An adapter's first task has no teacher, also where the adapter starts from another group's weights: what that group
    learned stays in that group's own adapter.

    Args:
        weight: of the divergence against the cross entropy, both in nats per answer token.
        temperature: T; above 1, the less likely tokens count more.
    """

    name = "lwf"
    idle_on_first_task = True

    def __init__(self, *, weight: float = 1.0, temperature: float = 2.0) -> None:
        self._weight = number("weight", weight)
        self._temperature = number("temperature", temperature, positive=True)
        self._training: Training | None = None
        self._old_weights: list[torch.Tensor] = []  # θ_prev while a task with a teacher is learned
        self._rows_taught = 0

    def begin(self, training: Training) -> None:
        self._rows_taught = 0
        self._training = None if training.placement.is_new else training
        if self._training is not None:
            self._old_weights = [weight.detach().clone() for weight in training.parameters.values()]

    def penalty(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        if self._training is None:
            return None
        model = self._training.model
        with self._before_the_task(self._training.parameters), evaluating(model), torch.no_grad():
            old, _ = answer_logits(model, batch)  # (N, V)
        self._rows_taught += len(batch["labels"]) * count()
        divergence = distillation(batch["answer_logits"], old, self._temperature)
        return self._weight * divergence / batch["answer_tokens"]

    @contextlib.contextmanager
    def _before_the_task(self, parameters: Mapping[str, torch.nn.Parameter]) -> Iterator[None]:
        """The adapter holds θ_prev inside, its own weights again after: tensors change places, nothing is copied."""
        # Not in place: the graph of the training loss, not yet gone back through, needs the weights it was made with.
        weights = [parameter.data for parameter in parameters.values()]
        for parameter, old in zip(parameters.values(), self._old_weights, strict=True):
            parameter.data = old
        try:
            yield
        finally:
            for parameter, weight in zip(parameters.values(), weights, strict=True):
                parameter.data = weight

    def close_task(self, task: Task) -> None:
        self._training, self._old_weights = None, []

    def save_progress(self, folder: Path) -> None:
        write_json(folder / _FILE, {"rows_taught": self._rows_taught})

    def load_progress(self, folder: Path) -> None:
        saved = json.loads((folder / _FILE).read_text(encoding="utf-8"))["rows_taught"]
        self._rows_taught = max(self._rows_taught, saved)  # passes that were made are not taken back

    def cost(self) -> dict[str, float]:
        return {"extra_forward_rows": self._rows_taught}
