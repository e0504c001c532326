"""Model Tailor (Zhu et al., ICML 2024, arXiv 2402.12048): keep the most important changes of a task, undo the rest.

For each trained matrix, with θ' before the task, θ tuned on it, Δ = θ − θ', and X the inputs of its layer:

    H = X Xᵀ + damping · mean(diag(X Xᵀ)) · I
    score = ½ z(|Δ|) + ½ z(θ² / diag(H⁻¹)²)           z: standardised over the matrix; diag by column
    K = the `keep` share of highest score, U = the rest
    θ_U ← θ'_U,   θ_K ← θ_K + δ_K

where δ makes up for what is undone: row by row, δ_U = θ'_U − θ_U is given, and δ_K minimises the change of the layer's
output, ‖δ X‖² + damping · ‖δ‖² (Optimal Brain Surgeon with all of U removed together), so that

    δ_K = − H_KK⁻¹ H_KU δ_U

A layer's LoRA is two matrices: A reads the layer's input x, B reads A x, whose second moment is A (X Xᵀ) Aᵀ.
H times a constant gives the same result: X Xᵀ is a sum over tokens here, not a mean.

Shapes: (out, in) a matrix, (in, in) H; r the rank.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lcia.backbone import answer_logits
from lcia.errors import UserError
from lcia.methods.base import Method, Training
from lcia.methods.options import count, number
from lcia.methods.passes import as_batch, draw, evaluating, second_moments
from lcia.stream import Task

_ELEMENTS_AT_ONCE = 2**24  # of the systems solved together: 128 MiB


def standardise(values: torch.Tensor) -> torch.Tensor:
    """z: mean 0 and standard deviation 1 over all elements; all 0 where they do not differ."""
    centred = values - values.mean()
    deviation = centred.square().mean().sqrt()
    return centred / deviation if deviation > 0 else torch.zeros_like(values)


def damped(second_moment: torch.Tensor, damping: float) -> torch.Tensor:
    """(in, in) H, positive definite. Inputs that are all zero say nothing: H = I."""
    identity = torch.eye(len(second_moment), dtype=second_moment.dtype, device=second_moment.device)
    mean = second_moment.diagonal().mean()
    return second_moment + damping * mean * identity if mean > 0 else identity


def kept_elements(before: torch.Tensor, tuned: torch.Tensor, hessian: torch.Tensor, keep: float) -> torch.Tensor:
    """(out, in) True for the round(keep · out · in) elements of highest score, at least one; the first of equals."""
    inverse_diagonal = torch.cholesky_inverse(torch.linalg.cholesky(hessian)).diagonal()  # (in,)
    salience = standardise((tuned - before).abs())
    sensitivity = standardise(tuned**2 / inverse_diagonal**2)
    score = (salience + sensitivity) / 2  # (out, in)
    chosen = score.flatten().argsort(descending=True, stable=True)[: max(1, round(keep * score.numel()))]
    kept = torch.zeros_like(score, dtype=torch.bool)
    kept.view(-1)[chosen] = True
    return kept


def compensation(undone: torch.Tensor, kept: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """(out, in) δ_K = − H_KK⁻¹ H_KU δ_U of every row, zero outside K.

    Args:
        undone: (out, in) δ_U, zero inside K.
        kept: (out, in) K.
        hessian: (in, in).
    """
    result = torch.zeros_like(undone)
    rows_at_once = max(1, _ELEMENTS_AT_ONCE // hessian.numel())
    for start in range(0, len(undone), rows_at_once):
        rows = slice(start, start + rows_at_once)
        widest = int(kept[rows].sum(1).max())
        # The systems of all rows get one size k: behind a row's own columns come ones that are not its own.
        columns = kept[rows].to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :widest]  # (rows, k)
        own = kept[rows].gather(1, columns)  # (rows, k)
        both = own[:, :, None] & own[:, None, :]  # (rows, k, k)
        block = torch.where(both, hessian[columns[:, :, None], columns[:, None, :]], 0.0)  # H_KK, (rows, k, k)
        block.diagonal(dim1=1, dim2=2)[~own] = 1.0
        pull = torch.where(own, -(undone[rows] @ hessian).gather(1, columns), 0.0)  # − H_KU δ_U, (rows, k)
        solved = torch.cholesky_solve(pull[:, :, None], torch.linalg.cholesky(block))[:, :, 0]  # (rows, k)
        result[rows].scatter_(1, columns, solved)
    return result


def tailored(
    before: torch.Tensor, tuned: torch.Tensor, second_moment: torch.Tensor, keep: float, damping: float
) -> torch.Tensor:
    """θ after the method; the elements outside K are those of `before`, bit for bit.

    Args:
        before: (out, in) θ'.
        tuned: (out, in) θ.
        second_moment: (in, in) X Xᵀ.
    """
    start, end = before.double(), tuned.double()
    hessian = damped(second_moment.double(), damping)
    kept = kept_elements(start, end, hessian, keep)
    undone = torch.where(kept, 0.0, start - end)
    return torch.where(kept, end + compensation(undone, kept, hessian), start).to(before.dtype)


class ModelTailor(Method):
    """Training as ever; when a task is over, most of what it changed is undone.

    Args:
        keep: the share of a matrix's elements whose change is kept (the paper's 10 %).
        calibration: training rows whose layer inputs make H, a draw that depends on the task's name alone (128);
            null = all.
        damping: of H, as a share of the mean of its diagonal (0.01).
        tailor_first: tailor an adapter's first task as well. That is the paper's setting: what must be preserved is the
            model before the task, whoever taught it; without it the first task alone would be kept whole, and how much
            of a task is kept would depend on its place in the stream.
    """

    name = "model_tailor"
    measures_at_close = True
    changes_at_close = True

    def __init__(
        self, *, keep: float = 0.1, calibration: int | None = 128, damping: float = 0.01, tailor_first: bool = True
    ) -> None:
        if not isinstance(tailor_first, bool):
            raise ValueError(f"tailor_first must be true or false, got {tailor_first!r}")
        self._keep = number("keep", keep, high=1.0, positive=True)
        self._calibration = count("calibration", calibration)
        self._damping = number("damping", damping, positive=True)
        self._tailor_first = tailor_first
        self.idle_on_first_task = not tailor_first
        self._training: Training | None = None
        self._rows_passed = 0

    def begin(self, training: Training) -> None:
        self._training = None
        self._rows_passed = 0
        if training.placement.is_new and not self._tailor_first:
            return
        self._training = training
        self._layers = _lora_layers(training.parameters)
        self._before = {name: weight.detach().clone() for name, weight in training.parameters.items()}

    @torch.no_grad()
    def close_task(self, task: Task) -> None:
        if self._training is None:
            return
        model, weights = self._training.model, self._training.parameters
        layers = {layer: model.get_submodule(layer) for layer in self._layers}
        rows = draw(self._training.rows, self._calibration, task.name, "calibration")
        device = next(iter(weights.values())).device
        with evaluating(model):
            # one row at a time: no padding counts as input
            passes = (answer_logits(model, as_batch([row], self.backbone, device)) for row in rows)
            moments = second_moments(layers, passes)
        for layer, (name_a, name_b) in self._layers.items():
            a, b = weights[name_a], weights[name_b]  # (r, in), (out, r)
            # no token was sent to a layer such as an idle expert: then there is no output to compensate for
            inputs = moments.get(layer, torch.zeros(a.shape[1], a.shape[1], device=device))  # (in, in)
            inner = a.double() @ inputs.double() @ a.double().T  # (r, r), by A as it was tuned
            a.copy_(tailored(self._before[name_a], a, inputs, self._keep, self._damping))
            b.copy_(tailored(self._before[name_b], b, inner, self._keep, self._damping))
        self._rows_passed = len(rows)
        self._training, self._before = None, {}

    def cost(self) -> dict[str, float]:
        return {"extra_forward_rows": self._rows_passed}


def _lora_layers(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """{layer: (name of its A, name of its B)}.

    Raises:
        UserError: something else than the LoRA of a linear layer is trained.
    """
    found: dict[str, dict[str, str]] = {}
    for name in names:
        layer, kind, _ = name.partition(".lora_A.") if ".lora_A." in name else name.partition(".lora_B.")
        if not kind:
            raise UserError(
                f"model_tailor: {name} is trained, and it knows the LoRA of linear layers only; "
                "of a model that sees, set projector: none"
            )
        found.setdefault(layer, {})[kind] = name
    return {layer: (matrices[".lora_A."], matrices[".lora_B."]) for layer, matrices in found.items()}
