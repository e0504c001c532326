"""The averaging rules: pure functions from what one step shows to how far the average moves.

Every rule gives the move 1 − β of θ*_t = β θ*_{t−1} + (1 − β) θ_t (Eq. 1 of arXiv 2410.10868), not β itself: for long
tasks β is so near 1 that its last digits are the whole answer.

A rule names what it reads. Read per element it gets tensors, read per tensor or per layer it gets their L1 norms; the
same function serves both, which is exactly how the paper goes from Eq. 12 to Eq. 14. What can be read: READS, and

    previous_offset   ‖θ_{t−1} − θ*_{t−1}‖ = β_{t−1}·‖θ_{t−1} − θ*_{t−2}‖: known from the step before, so that no copy
                      of θ_{t−1} is kept; exists as a norm only
    exponent          1 / total_steps, a number
    fallback          the constant β, a number
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lcia.errors import did_you_mean


@dataclass(frozen=True)
class Rule:
    """One averaging rule: `move(**reads)` gives 1 − β.

    Attributes:
        move: the equation. Its arguments are named in `reads`; all have one shape, and so has the result.
        reads: what the rule looks at, names in READS, or one of the three at the top of this file.
        per: what one β belongs to unless the user says otherwise: "element", "tensor" or "layer".
        falls_back: whether a β outside the open interval (0, 1) is replaced by the fallback and counted.
        into: the read in whose memory `move` may write its result, given as `out`: new memory for every block costs a
            third of a step.
    """

    move: Callable[..., Tensor]
    reads: tuple[str, ...]
    per: str = "tensor"
    falls_back: bool = True
    into: str | None = None


@dataclass(frozen=True)
class Moment:
    """What one step shows of some rows of all weights; every tensor is (rows, W), `correction` is (rows, 1)."""

    weights: Tensor  # θ_t
    average: Tensor  # θ*_{t−1}
    gradient: Tensor | None = None  # g_t
    previous_gradient: Tensor | None = None  # g_{t−1}
    previous_weights: Tensor | None = None  # θ_{t−1}
    importance: Tensor | None = None  # F_old; None is zero
    squares: Tensor | None = None  # running mean of g², biased towards its start at zero
    correction: Tensor | None = None  # what makes F_new / λ of it


# name: how it is made of a moment, written to `out`, or to a new tensor when that is None
READS: dict[str, Callable[[Moment, Tensor | None], Tensor]] = {
    "offset": lambda now, out: torch.sub(now.weights, now.average, out=out),
    "step": lambda now, out: torch.sub(now.weights, _known(now.previous_weights), out=out),
    "gradient": lambda now, out: _known(now.gradient),
    "gradient_plus_one": lambda now, out: torch.add(_known(now.gradient), 1, out=out),
    "gradient_change": lambda now, out: torch.sub(_known(now.gradient), _known(now.previous_gradient), out=out),
    # none in the first task: nothing is needed by an earlier one
    "importance": lambda now, out: torch.zeros_like(now.weights) if now.importance is None else now.importance,
    "curvature": lambda now, out: torch.mul(_known(now.squares), _known(now.correction), out=out),
}


def _known(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise TypeError("the rule reads something that its DynamicEMA does not keep")
    return tensor


def constant(*, fallback: float) -> Tensor:
    """`fixed`: β is a constant, the fallback itself (Tables 6 and 7 of the paper: 0.99)."""
    return torch.tensor(1 - fallback, dtype=torch.float64)


def stationary(*, gradient_plus_one: Tensor, step: Tensor, offset: Tensor, gradient_change: Tensor) -> Tensor:
    """`eq12`, `eq14`: β = (g_t + 1) · (θ_t − θ_{t−1}) / ((θ_t − θ*_{t−1}) · (g_t − g_{t−1})).

    Per element it is Eq. 12 with the second derivative by differences (Eq. 13); of L1 norms it is Eq. 14.
    """
    return 1 - gradient_plus_one * step / (offset * gradient_change)


def printed(*, previous_offset: Tensor, gradient_plus_one: Tensor, offset: Tensor, gradient_change: Tensor) -> Tensor:
    """`eq45`: 1 − β = ‖θ_{t−1} − θ*_{t−1}‖ · ‖g_t + 1‖ / (‖θ_t − θ*_{t−1}‖ · ‖g_t − g_{t−1}‖) (Eq. 45, App. E)."""
    return previous_offset * gradient_plus_one / (offset * gradient_change)


def released(*, gradient: Tensor, offset: Tensor, gradient_change: Tensor) -> Tensor:
    """`released`: 1 − β = 2 (1 + ‖g_t‖) / (‖θ_t − θ*_{t−1}‖ · ‖g_t − g_{t−1}‖).

    What the authors' published code computes (github.com/JingyangQiao/CoIN, commit efa9cb4, peft/tuners/lora.py).
    """
    return 2 * (1 + gradient) / (offset * gradient_change)


def fisher(*, importance: Tensor, curvature: Tensor, exponent: float, out: Tensor | None = None) -> Tensor:
    """`fisher`: β = w^(1/total_steps), w = λF_old / (λF_old + F_new), so that Π β over the task is w.

    `importance` is F_old, `curvature` F_new / λ: only their ratio counts. `out` may be one of them.

    Two quadratic losses with curvatures F_old around the start point and F_new around the new minimum have their joint
    minimum at w · start + (1 − w) · new: the mean of the Laplace posterior. Where the old tasks need nothing
    (F_old = 0) the average follows the training, where the new one needs nothing (F_new = 0) it does not move.
    Nothing to fall back from: β is in [0, 1] for any F ≥ 0, and unchanged when all F are multiplied by one number.
    """
    # 1 − β of w = 1 / (1 + F_new / λF_old). 0/0 is an element nobody has needed yet: w = 0, it follows the training
    ratio = torch.div(curvature, importance, out=out).nan_to_num_(nan=math.inf, posinf=math.inf)
    return ratio.log1p_().mul_(-exponent).expm1_().neg_()


RULES: dict[str, Rule] = {
    "fixed": Rule(constant, ("fallback",), falls_back=False),
    "eq12": Rule(stationary, ("gradient_plus_one", "step", "offset", "gradient_change"), per="element"),
    "eq14": Rule(stationary, ("gradient_plus_one", "step", "offset", "gradient_change")),
    "eq45": Rule(printed, ("previous_offset", "gradient_plus_one", "offset", "gradient_change")),
    "released": Rule(released, ("gradient", "offset", "gradient_change")),
    "fisher": Rule(fisher, ("importance", "curvature", "exponent"), per="element", falls_back=False, into="curvature"),
}


def find_rule(name: str) -> Rule:
    """The rule of that name. Raises ValueError, naming the nearest one, when there is none."""
    if name not in RULES:
        raise ValueError(f"unknown rule {name!r}. {did_you_mean(name, RULES)}")
    return RULES[name]


def constant_retaining(mass: float, total_steps: int) -> float:
    """The constant β with β^total_steps = mass: the share of the start point left at the end of the task (Eq. 21)."""
    if not 0 < mass < 1:
        raise ValueError(f"retained is {mass}, it must lie in (0, 1)")
    return float(mass ** (1 / total_steps))
