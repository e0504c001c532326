"""Gradient projection for LoRA (arXiv 2405.13383): no movement in the directions that earlier tasks' inputs take.

A matrix W (out, in) that reads x gives the same output on x after W ← W + ΔW if ΔW x = 0. With U (in, k) an orthonormal
basis of what it read on earlier tasks,

    W ← W_0 + ΔW − ΔW U Uᵀ,    ΔW = W − W_0,    W_0 the weights before the task

after every optimizer step, for A (it reads the layer's input x) and for B (it reads A x) of every layer.

What is projected is the displacement and not the gradient: AdamW divides the gradient by its running size, number by
number, which turns it out of the subspace it was projected to, and its weight decay was never in it. The displacement
is what moves the output, so that momentum, preconditioning and weight decay all have to keep to it. It is taken from
the start of the task and not from the step before: the same in exact arithmetic, without adding up roundings.

U comes from the singular values σ_i of the inputs X (tokens, in) of some training rows of each task: the smallest k
whose Σ_{i≤k} σ_i² ≥ energy · Σ σ_i². A later task adds what U does not hold yet (GPM, arXiv 2103.09762).
σ_i² are the eigenvalues of XᵀX, so that X itself is never kept.

Shapes: (out, in) a matrix, r the rank, (in, k) a basis, (in, in) a second moment.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from lcia.backbone import answer_logits
from lcia.errors import UserError
from lcia.methods.base import Method, Training
from lcia.methods.options import count, number
from lcia.methods.passes import as_batch, draw, evaluating, second_moments
from lcia.stream import Task

_STATE = "basis/"  # + adapter / matrix


def joined_basis(basis: torch.Tensor, moment: torch.Tensor, energy: float) -> torch.Tensor:
    """(in, k') `basis` and, behind it, the fewest directions with which it holds the share `energy` of tr(XᵀX).

    Args:
        basis: (in, k) orthonormal columns; k may be 0.
        moment: (in, in) XᵀX.
    """
    held, moment = basis.double(), moment.double()
    missing = energy * moment.trace() - (held * (moment @ held)).sum()
    if missing <= 0:
        return basis
    outside = torch.eye(len(moment), dtype=moment.dtype, device=moment.device) - held @ held.T
    values, vectors = torch.linalg.eigh(outside @ moment @ outside)  # ascending
    values, vectors = values.flip(0), vectors.flip(1)
    new = min(int((values.cumsum(0) < missing).sum()) + 1, len(moment) - basis.shape[1])
    added = torch.linalg.qr(outside @ vectors[:, :new]).Q  # (in, new)
    return torch.cat([basis, added.to(basis.dtype)], dim=1)


def inside(displacement: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """(out, in) ΔW U Uᵀ: the part of ΔW that inputs in the span of U (in, k) can feel."""
    return displacement @ basis @ basis.T


class PGP(Method):
    """Keeps the movement of A and B orthogonal to the inputs they had in earlier tasks of the same adapter.

    Args:
        energy: the share of the inputs' squared singular values that is protected, above 0 and below 1 (the paper's
            range is 0.5 to 0.97).
        examples: training rows of a task whose inputs are looked at, a draw that depends on the task's name alone;
            null = all.
    """

    name = "pgp"
    idle_on_first_task = True
    measures_at_close = True
    changes_at_close = True

    def __init__(self, *, energy: float = 0.9, examples: int | None = 128) -> None:
        self._energy = number("energy", energy, high=1.0, positive=True)
        if self._energy == 1.0:
            raise ValueError("energy must be below 1: protecting every direction leaves none to learn in")
        self._examples = count("examples", examples)
        self._bases: dict[str, dict[str, torch.Tensor]] = {}  # adapter → matrix → (in, k), fp32
        self._training: Training | None = None
        self._protected: list[tuple[torch.nn.Parameter, torch.Tensor, torch.Tensor]] = []  # W, W_0, U
        self._rows_passed = 0

    def begin(self, training: Training) -> None:
        self._training = training
        matrices = {_matrix(name): weight for name, weight in training.parameters.items()}
        bases = self._bases.get(training.placement.adapter, {})
        self._protected = [
            (weight, weight.detach().clone(), bases[matrix].to(weight.device))
            for matrix, weight in matrices.items()
            if matrix in bases
        ]

    def after_step(self) -> None:
        self._project()

    @torch.no_grad()
    def _project(self) -> None:
        for weight, start, basis in self._protected:
            weight.sub_(inside(weight - start, basis))

    @torch.no_grad()
    def close_task(self, task: Task) -> None:
        assert self._training is not None
        # A part that averaged the weights did so before they were projected, step by step; its average is what stays.
        self._project()
        model, adapter = self._training.model, self._training.placement.adapter
        weights = {_matrix(name): weight.detach() for name, weight in self._training.parameters.items()}
        layers = {layer: model.get_submodule(layer) for layer, _ in (matrix.rsplit(".", 1) for matrix in weights)}
        rows = draw(self._training.rows, self._examples, task.name, "inputs")
        device = next(iter(weights.values())).device
        with evaluating(model):
            # one row at a time: no padding counts as input
            passes = (answer_logits(model, as_batch([row], self.backbone, device)) for row in rows)
            moments = second_moments(layers, passes)
        bases = self._bases.setdefault(adapter, {})
        before: tuple[torch.Tensor, torch.Tensor] | None = None  # the layer before: second moment, basis
        for layer, moment in moments.items():
            # query, key and value read the same inputs: one basis serves them
            if before is None or not torch.equal(moment, before[0]):
                before = moment, self._joined(bases.get(f"{layer}.lora_A"), moment)
            bases[f"{layer}.lora_A"] = before[1]
            a = weights[f"{layer}.lora_A"].double()  # (r, in)
            bases[f"{layer}.lora_B"] = self._joined(bases.get(f"{layer}.lora_B"), a @ moment.double() @ a.T)
        self._rows_passed = len(rows)
        self._training, self._protected = None, []

    def _joined(self, basis: torch.Tensor | None, moment: torch.Tensor) -> torch.Tensor:
        known = torch.zeros(len(moment), 0) if basis is None else basis
        return joined_basis(known.to(moment.device), moment, self._energy).cpu()

    def log(self) -> dict[str, float]:
        """The share of the input dimensions of all A, and of all B, in which nothing may move."""
        shares: dict[str, list[float]] = {"A": [], "B": []}
        for matrix, basis in self._bases.get(self._training.placement.adapter, {}).items() if self._training else ():
            shares[matrix[-1]].append(basis.shape[1] / basis.shape[0])
        return {f"protected_{kind}": sum(values) / len(values) for kind, values in shares.items() if values}

    def state_dict(self) -> dict[str, Any]:
        tensors: dict[str, torch.Tensor] = {}
        same: dict[str, dict[str, str]] = {}  # adapter → matrix → the one whose basis it shares
        for adapter, bases in self._bases.items():
            first: dict[int, str] = {}
            for matrix, basis in bases.items():
                shared = first.setdefault(id(basis), matrix)
                if shared == matrix:
                    tensors[f"{_STATE}{adapter}/{matrix}"] = basis
                else:
                    same.setdefault(adapter, {})[matrix] = shared
        return {**tensors, "same": same}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._bases = {}
        for key, basis in state.items():
            if key.startswith(_STATE):
                adapter, matrix = key.removeprefix(_STATE).split("/", 1)
                self._bases.setdefault(adapter, {})[matrix] = basis
        for adapter, matrices in state["same"].items():
            for matrix, shared in matrices.items():
                self._bases[adapter][matrix] = self._bases[adapter][shared]

    def adapters_changed(self, origin: Mapping[str, str]) -> None:
        known = self._bases
        self._bases = {name: dict(known[source]) for name, source in origin.items() if source in known}

    def cost(self) -> dict[str, float]:
        numbers = sum(value.numel() for value in self.state_dict().values() if isinstance(value, torch.Tensor))
        return {"numbers_stored": numbers, "extra_forward_rows": self._rows_passed}


def _matrix(parameter: str) -> str:
    """`LAYER.lora_A` or `LAYER.lora_B` for a parameter's full name, which also names the adapter.

    Raises:
        UserError: something else than the LoRA of a linear layer is trained.
    """
    found = re.fullmatch(r"(.+\.lora_[AB])\.[^.]+\.weight", parameter)
    if found is None:
        raise UserError(
            f"pgp: {parameter} is trained, and it knows the LoRA of linear layers only; "
            "of a model that sees, set projector: none"
        )
    return found[1]
