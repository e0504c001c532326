"""θ* rests at its start for a share of the task and then moves: the same Π β in fewer steps."""

from __future__ import annotations

import math

import pytest
import torch

from ema_oracle import Oracle, closed_form
from lcia.ema import RULES, DynamicEMA

pytestmark = pytest.mark.usefixtures("either_passes")

STEPS, SIZE = 12, 15


def trajectory(seed: int = 0) -> tuple[list[float], list[list[float]], list[list[float]]]:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(SIZE, generator=generator, dtype=torch.float64)
    # of a size at which some steps of the published rules are in range and some are not
    weights = start + torch.randn(STEPS, SIZE, generator=generator, dtype=torch.float64).cumsum(0)
    gradients = 3 * torch.randn(STEPS, SIZE, generator=generator, dtype=torch.float64)
    return [tensor.float().double().tolist() for tensor in (start, weights, gradients)]  # type: ignore[return-value]


def averaged(rule: str, **options: float) -> tuple[DynamicEMA, list[list[float]]]:
    start, weights, gradients = trajectory()
    parameter = torch.nn.Parameter(torch.tensor(start).float())
    importance = {"p": torch.linspace(0.1, 2, SIZE)} if rule == "fisher" else None
    ema = DynamicEMA({"p": parameter}, rule=rule, total_steps=STEPS, importance=importance, **options)  # type: ignore[arg-type]
    seen = []
    for weight, gradient in zip(weights, gradients, strict=True):
        parameter.data = torch.tensor(weight).float()
        parameter.grad = torch.tensor(gradient).float()
        ema.step()
        seen.append(ema.averages["p"].tolist())
    return ema, seen


@pytest.mark.parametrize("rest", [0.0, 0.25, 0.5, 0.99])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_with_a_rest_is_the_oracle_that_begins_later(rule: str, rest: float) -> None:
    start, weights, gradients = trajectory()
    resting = min(int(rest * STEPS), STEPS - 1)
    oracle = Oracle(rule, start, steps=STEPS - resting)
    if rule == "fisher":
        oracle.old = torch.linspace(0.1, 2, SIZE).double().tolist()
    ema, seen = averaged(rule, rest=rest)
    for number, (weight, gradient) in enumerate(zip(weights, gradients, strict=True), start=1):
        oracle.step(weight, gradient)
        if number <= resting:  # it looks on, and neither moves nor counts
            oracle.average, oracle.retained, oracle.fell_back = list(start), [1.0] * SIZE, 0.0
        assert seen[number - 1] == pytest.approx(oracle.average, abs=2e-5)
    assert ema.retained_mass["p"] == pytest.approx(math.fsum(oracle.retained) / SIZE, rel=1e-5, abs=1e-7)
    assert ema.fallback_fraction == pytest.approx(oracle.fell_back / (STEPS - resting))


@pytest.mark.parametrize("rest", [0.0, 0.5, 0.9])
def test_the_retained_mass_does_not_depend_on_the_rest(rest: float) -> None:
    ema, seen = averaged("fixed", retained=0.3, rest=rest)
    assert ema.retained_mass["p"] == pytest.approx(0.3, rel=1e-6)
    start, weights, _ = trajectory()
    moving = STEPS - ema.rest_steps
    betas = [0.3 ** (1 / moving)] * moving
    late = weights[ema.rest_steps :]
    expected = [closed_form(start[i], [weight[i] for weight in late], betas) for i in range(SIZE)]
    assert seen[-1] == pytest.approx(expected, abs=1e-5)


def test_a_rest_up_to_the_last_step_interpolates_between_start_and_end() -> None:
    ema, seen = averaged("fixed", retained=0.3, rest=0.999)
    start, weights, _ = trajectory()
    assert ema.rest_steps == STEPS - 1
    assert seen[-1] == pytest.approx([0.3 * a + 0.7 * b for a, b in zip(start, weights[-1], strict=True)], abs=1e-5)


def test_skipped_steps_are_steps_of_the_rest() -> None:
    """A gradient scaler that skips steps must not keep the average from moving before the task ends."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    ema = DynamicEMA({"p": parameter}, rule="fixed", fallback=0.5, total_steps=4, rest=0.75)
    for step in range(4):
        parameter.grad = torch.ones(1)
        with torch.no_grad():
            parameter.fill_(step)
        if step == 1:
            ema.discard()
        else:
            ema.step()
        again = DynamicEMA({"p": parameter}, rule="fixed", fallback=0.5, total_steps=4, rest=0.75)
        again.load_state_dict(ema.state_dict())
        ema = again
        assert ema.has_moved == (step == 3)
    assert ema.averages["p"].item() == 1.5


def test_what_a_rest_cannot_be() -> None:
    parameter = {"p": torch.nn.Parameter(torch.zeros(2))}
    for rest in (-0.1, 1.0, 1.5):
        with pytest.raises(ValueError, match=r"rest is .*\[0, 1\)"):
            DynamicEMA(parameter, rule="fixed", total_steps=5, rest=rest)
    with pytest.raises(ValueError, match="total_steps"):
        DynamicEMA(parameter, rule="fixed", rest=0.5)
