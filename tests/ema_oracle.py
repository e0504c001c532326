"""The dynamic EMA once more, in float64, as loops over single numbers: what the equations say and nothing else.

Equation numbers are those of arXiv 2410.10868. Shares no code with lcia.ema.
"""

from __future__ import annotations

import math

FALLBACK = 0.99


def norm(values: list[float]) -> float:
    total = 0.0
    for value in values:
        total += abs(value)
    return total


def divide(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan


def minus(left: list[float], right: list[float]) -> list[float]:
    return [a - b for a, b in zip(left, right, strict=True)]


class Oracle:
    """One tensor, or the tensors of one layer one after another, as a flat list of numbers.

    `step` takes θ_t and g_t; θ* is in `average`, the β of every element in `beta`, Π β in `retained`.
    """

    def __init__(self, rule: str, start: list[float], *, fallback: float = FALLBACK, steps: int = 0):
        self.rule = rule
        self.fallback = fallback
        self.average = list(start)
        self.weights = list(start)
        self.gradient: list[float] | None = None
        self.beta = [1.0] * len(start)
        self.retained = [1.0] * len(start)
        self.fell_back = 0.0  # in steps
        self.total_steps = steps
        # fisher
        self.old = [0.0] * len(start)
        self.mean_square = [0.0] * len(start)
        self.count = 0
        self.decay = 0.999
        self.examples = 1.0
        self.strength = 1.0

    def step(self, weights: list[float], gradient: list[float]) -> None:
        size = len(weights)
        if self.rule == "fisher":
            self.beta = self.fisher(gradient)
        elif self.rule == "fixed":
            self.beta = [self.fallback] * size
        else:
            proposed = self.propose(weights, gradient)
            fell = 0
            for i in range(size):
                # Eq. 15 and the line after it: 0.99 wherever β is not in the open interval
                good = not math.isnan(proposed[i]) and 0 < proposed[i] < 1
                self.beta[i] = proposed[i] if good else self.fallback
                fell += not good
            self.fell_back += fell / size
        for i in range(size):
            # Eq. 1
            self.average[i] = self.beta[i] * self.average[i] + (1 - self.beta[i]) * weights[i]
            self.retained[i] *= self.beta[i]
        self.weights = list(weights)
        self.gradient = list(gradient)

    def propose(self, weights: list[float], gradient: list[float]) -> list[float]:
        size = len(weights)
        if self.gradient is None:
            return [math.nan] * size
        offset = minus(weights, self.average)  # θ_t − θ*_{t−1}
        step = minus(weights, self.weights)  # θ_t − θ_{t−1}
        change = minus(gradient, self.gradient)  # g_t − g_{t−1}
        plus_one = [value + 1 for value in gradient]
        if self.rule == "eq12":
            betas = []
            for i in range(size):
                second_derivative = divide(change[i], step[i])  # Eq. 13
                betas.append(divide(plus_one[i], offset[i] * second_derivative))  # Eq. 12
            return betas
        below = norm(offset) * norm(change)
        if self.rule == "eq14":
            beta = divide(norm(plus_one) * norm(step), below)
        elif self.rule == "eq45":
            lag = minus(self.weights, self.average)  # θ_{t−1} − θ*_{t−1}
            beta = 1 - divide(norm(lag) * norm(plus_one), below)
        elif self.rule == "released":
            beta = 1 - divide(2 * (1 + norm(gradient)), below)
        else:
            raise ValueError(self.rule)
        return [beta] * size

    def fisher(self, gradient: list[float]) -> list[float]:
        self.count += 1
        betas = []
        for i, value in enumerate(gradient):
            self.mean_square[i] = self.decay * self.mean_square[i] + (1 - self.decay) * value * value
            new = self.examples * self.mean_square[i] / (1 - self.decay**self.count)
            old = self.strength * self.old[i]
            share = old / (old + new) if old + new else 0.0
            betas.append(share ** (1 / self.total_steps))
        return betas

    def importance(self) -> list[float]:
        correction = 1 - self.decay**self.count
        return [
            self.strength * old + self.examples * mean / correction
            for old, mean in zip(self.old, self.mean_square, strict=True)
        ]


def closed_form(start: float, weights: list[float], betas: list[float]) -> float:
    """Eq. 21: θ*_n = Π_i β_i · θ_0 + Σ_i (1 − β_i) · Π_{j>i} β_j · θ_i."""
    total = start
    for beta in betas:
        total *= beta
    for i, weight in enumerate(weights):
        term = (1 - betas[i]) * weight
        for later in betas[i + 1 :]:
            term *= later
        total += term
    return total
