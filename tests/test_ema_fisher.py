"""The rule `fisher`: what must hold whatever the numbers are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lcia.ema import DynamicEMA

pytestmark = pytest.mark.usefixtures("either_passes")

SHAPE = (3, 11)


def moves(parameter_scale: float = 1.0, loss_scale: float = 1.0, **options) -> tuple[torch.Tensor, dict[str, float]]:
    """One task of 20 random steps, with the loss multiplied by one number and the parameter by another.

    Gradients then are multiplied by loss_scale / parameter_scale, and importance by the square of that.
    """
    generator = torch.Generator().manual_seed(0)
    factor = loss_scale / parameter_scale
    parameter = nn.Parameter(parameter_scale * torch.randn(SHAPE, generator=generator))
    importance = factor**2 * torch.rand(SHAPE, generator=generator)
    ema = DynamicEMA({"w": parameter}, rule="fisher", total_steps=20, importance={"w": importance}, **options)
    for _ in range(20):
        with torch.no_grad():
            parameter += parameter_scale * torch.randn(SHAPE, generator=generator)
        parameter.grad = factor * torch.randn(SHAPE, generator=generator)
        ema.step()
    return ema.averages["w"] / parameter_scale, ema.betas


@pytest.mark.parametrize("scales", [(1, 1024), (1, 2**-10), (64, 1), (2**-6, 1), (8, 32)])
def test_nothing_changes_when_the_loss_or_a_parameter_is_rescaled(scales):
    # powers of two, so that not even rounding differs
    expected, expected_betas = moves()
    found, betas = moves(*scales)
    assert torch.equal(found, expected)
    assert betas == expected_betas


def test_other_scales_change_rounding_only():
    expected, expected_betas = moves()
    found, betas = moves(parameter_scale=0.3, loss_scale=1e5)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert betas["w"] == pytest.approx(expected_betas["w"], rel=1e-6)


def test_two_quadratic_tasks_meet_at_their_joint_minimum():
    """Task 1 has curvature a and its minimum at m, task 2 has b and n: together (a·m + b·n) / (a + b).

    One example's loss is a/2·(θ − x)² with x scattered around m with variance 1/a, so that its Fisher information is
    a. Trained to convergence: the weights are at the minimum, gradients are the examples' scatter.
    """
    torch.manual_seed(0)
    a, b = (torch.rand(2, *SHAPE).add(0.05) * 10).unbind()
    m, n = torch.randn(2, *SHAPE).unbind()
    steps = 150
    parameter = nn.Parameter(torch.zeros(SHAPE))
    importance = None
    for curvature, minimum in ((a, m), (b, n)):
        ema = DynamicEMA({"w": parameter}, rule="fisher", total_steps=steps, importance=importance)
        with torch.no_grad():
            parameter.copy_(minimum)
        for t in range(steps):
            scatter = (-1) ** t / curvature.sqrt()
            loss = (curvature / 2 * (parameter - minimum - scatter) ** 2).sum()
            loss.backward()
            ema.step()
            parameter.grad = None
        importance = ema.importance
        ema.copy_to_model()
    assert torch.allclose(importance["w"], a + b, rtol=1e-4)
    assert torch.allclose(parameter, (a * m + b * n) / (a + b), atol=1e-5)


def test_two_quadratic_tasks_trained_to_convergence_meet_at_their_joint_minimum():
    """The same, with a training: from the start to the minimum, where a rest of 0.9 lets the average begin.

    Examples lie at m ± the scatter in turn, and the step that makes of θ their mean so far is 1 / (curvature · t).
    """
    torch.manual_seed(0)
    a, b = (torch.rand(2, *SHAPE).add(0.05) * 10).unbind()
    m, n = torch.randn(2, *SHAPE).unbind()
    steps = 1000
    parameter = nn.Parameter(torch.zeros(SHAPE))
    importance = None
    for curvature, minimum in ((a, m), (b, n)):
        ema = DynamicEMA(
            {"w": parameter}, rule="fisher", total_steps=steps, importance=importance, rest=0.9, fisher_decay=0.97
        )
        for t in range(1, steps + 1):
            example = minimum + (-1) ** t / curvature.sqrt()
            (curvature / 2 * (parameter - example) ** 2).sum().backward()
            with torch.no_grad():
                parameter -= parameter.grad / (curvature * t)
            ema.step()
            parameter.grad = None
        assert (parameter - minimum).abs().max() < 0.01, "converged"
        importance = ema.importance
        ema.copy_to_model()
    joint = (a * m + b * n) / (a + b)
    assert (parameter - joint).abs().max() < 0.01
    assert (parameter - n).abs().max() > 1


def test_two_quadratic_tasks_trained_by_sgd_meet_near_their_joint_minimum():
    """The same, with the way to the minimum: batches of 8 examples, 400 steps of SGD.

    On the way gradients are not scatter only: F_new is too large until its running mean has forgotten them.
    """
    torch.manual_seed(0)
    a, b = torch.tensor([0.5, 1.0, 2.0, 4.0]), torch.tensor([4.0, 1.0, 1.0, 0.5])
    m, n = torch.tensor([1.0, -1.0, 2.0, 0.0]), torch.tensor([0.0, 1.0, -1.0, 1.0])
    parameter = nn.Parameter(torch.zeros(4))
    importance = None
    for curvature, minimum in ((a, m), (b, n)):
        ema = DynamicEMA(
            {"w": parameter},
            rule="fisher",
            total_steps=400,
            importance=importance,
            examples_per_gradient=8,
            fisher_decay=0.9,
        )
        optimizer = torch.optim.SGD([parameter], lr=0.2)
        for _ in range(400):
            examples = minimum + torch.randn(8, 4) / curvature.sqrt()
            (curvature / 2 * (parameter - examples) ** 2).mean(0).sum().backward()
            optimizer.step()
            ema.step()
            optimizer.zero_grad()
        importance = ema.importance
        ema.copy_to_model()
    joint = (a * m + b * n) / (a + b)
    assert (parameter - joint).abs().max() < 0.25
    assert (parameter - n).abs().max() > 1, "without the average it would be at the second task's minimum"


def test_what_no_task_needs_is_free_and_what_the_new_one_does_not_need_is_fixed():
    parameter = nn.Parameter(torch.zeros(4))
    #                                 nobody  only new  only old  both
    importance = {"w": torch.tensor([0.0, 0.0, 2.0, 2.0])}
    ema = DynamicEMA({"w": parameter}, rule="fisher", total_steps=10, importance=importance)
    for _ in range(10):
        with torch.no_grad():
            parameter += 1 / 3
        parameter.grad = torch.tensor([0.0, 1.0, 0.0, 1.0])
        ema.step()
        average = ema.averages["w"]
        assert average[0] == parameter[0]
        assert average[1] == parameter[1]
        assert average[2] == 0
        assert 0 < average[3] < parameter[3]
    assert ema.fallback_fraction == 0
    assert ema.retained_mass["w"] == pytest.approx((0 + 0 + 1 + 2 / 3) / 4, rel=1e-5)


def test_the_first_task_is_not_averaged():
    parameter = nn.Parameter(torch.randn(SHAPE))
    ema = DynamicEMA({"w": parameter}, rule="fisher", total_steps=3)
    for _ in range(3):
        with torch.no_grad():
            parameter += torch.randn(SHAPE)
        parameter.grad = torch.randn(SHAPE)
        ema.step()
    assert torch.equal(ema.averages["w"], parameter.detach())
    assert ema.retained_mass["w"] == 0


def test_strength_and_forgetting():
    def after(importance, **options) -> DynamicEMA:
        parameter = nn.Parameter(torch.zeros(2))
        ema = DynamicEMA({"w": parameter}, "fisher", total_steps=5, importance=importance, **options)
        for _ in range(5):
            parameter.grad = torch.ones(2)
            ema.step()
        return ema

    before = {"w": torch.tensor([2.0, 6.0])}
    weak = after(before, strength=0.5)
    assert weak.retained_mass["w"] == pytest.approx((1 / 2 + 3 / 4) / 2, rel=1e-5)
    assert weak.importance["w"].tolist() == pytest.approx([2.0, 4.0])
    apart = after(before, strength=0.5, forgetting=1.0)
    assert apart.retained_mass == weak.retained_mass
    assert apart.importance["w"].tolist() == pytest.approx([3.0, 7.0])


def test_the_optimizers_second_moment_is_the_running_mean_where_nothing_is_clipped():
    torch.manual_seed(0)
    nets = [nn.Linear(6, 4) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    importance = {name: torch.rand(p.shape) / 100 for name, p in nets[0].named_parameters()}
    found = []
    for net, source in zip(nets, ("running", "adamw"), strict=True):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, betas=(0.9, 0.999))
        ema = DynamicEMA(
            net.named_parameters(),
            rule="fisher",
            total_steps=12,
            importance=importance,
            fisher_source=source,
            optimizer=optimizer,
        )
        generator = torch.Generator().manual_seed(1)
        for _ in range(12):
            net(torch.randn(5, 6, generator=generator)).square().mean().backward()
            optimizer.step()
            ema.step()
            optimizer.zero_grad()
        found.append((ema.averages, ema.importance))
    for running, adamw in zip(*found, strict=True):
        for name in running:
            assert torch.allclose(running[name], adamw[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("source", "bytes_each"), [("running", 12), ("adamw", 8)])
def test_f_new_costs_nothing_where_the_optimizer_keeps_it(source, bytes_each):
    """θ* and F_old alone: all that the object holds for its elements, but for work space."""
    net = nn.Linear(16, 16, bias=False)  # 256 elements: no padding
    ema = DynamicEMA(
        net.named_parameters(),
        rule="fisher",
        total_steps=5,
        importance={"weight": torch.ones(16, 16)},
        fisher_source=source,
        optimizer=torch.optim.AdamW(net.parameters(), lr=0.1),
    )
    assert sum(flat.nbytes for flat in ema._buffers.kept().values()) == 256 * bytes_each


def test_an_optimizer_without_a_second_moment_is_refused():
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ema = DynamicEMA(net.named_parameters(), rule="fisher", total_steps=5, fisher_source="adamw", optimizer=optimizer)
    net(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match="SGD keeps no running mean of squared gradients"):
        ema.step()


def test_per_example_squares_the_parts_and_running_squares_the_sum():
    """Four backward passes of one example each make one gradient."""
    torch.manual_seed(0)
    parts = torch.randn(3, 4, 5) / 4  # (steps, examples, elements): each loss is divided by the 4 examples
    found = {}
    for source in ("per_example", "running"):
        parameter = nn.Parameter(torch.zeros(5))
        ema = DynamicEMA(
            {"w": parameter},
            rule="fisher",
            total_steps=3,
            fisher_source=source,
            examples_per_gradient=4,
            fisher_decay=0.5,
        )
        for step in parts:
            for part in step:
                (parameter * part).sum().backward()
            ema.step()
            parameter.grad = None
        found[source] = ema.importance["w"]
    weights = torch.tensor([0.125, 0.25, 0.5]) / 0.875
    per_example = (weights[:, None] * 4 * parts.square().sum(1)).sum(0)
    running = (weights[:, None] * 4 * parts.sum(1).square()).sum(0)
    assert torch.allclose(found["per_example"], per_example, rtol=1e-5)
    assert torch.allclose(found["running"], running, rtol=1e-5)


@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_step_that_a_scaler_skips_leaves_no_trace_in_f_new(seen, bad):
    """All gradients of it, the finite ones too: their tensors took no step either."""
    parameters = {"w": nn.Parameter(torch.zeros(2)), "v": nn.Parameter(torch.zeros(3))}
    ema = DynamicEMA(parameters, rule="fisher", total_steps=2)
    if seen:
        parameters["w"].grad, parameters["v"].grad = torch.tensor([bad, 1e4]), torch.full((3,), 1e4)
        ema.observe()
        ema.discard()
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 2.0)
    ema.observe()
    ema.step()
    assert ema.importance["w"].tolist() == pytest.approx([4.0, 4.0])
    assert ema.importance["v"].tolist() == pytest.approx([4.0, 4.0, 4.0])


def test_per_example_forgets_the_parts_of_a_discarded_step():
    parameter = nn.Parameter(torch.zeros(2))
    ema = DynamicEMA({"w": parameter}, rule="fisher", total_steps=2, fisher_source="per_example")
    (parameter * torch.tensor([math.inf, 1.0])).sum().backward()
    ema.discard()
    parameter.grad = None
    (parameter * 2).sum().backward()
    ema.step()
    assert ema.importance["w"].tolist() == pytest.approx([4.0, 4.0])


def test_observe_before_clipping_and_observe_with_the_inverse_coefficient_agree():
    generator = torch.Generator().manual_seed(0)
    gradients = 5 * torch.randn(8, *SHAPE, generator=generator)
    importance = {"w": torch.rand(SHAPE, generator=generator)}
    found = []
    for way in ("before", "undo", "clipped"):
        parameter = nn.Parameter(torch.zeros(SHAPE))
        ema = DynamicEMA({"w": parameter}, rule="fisher", total_steps=8, importance=importance)
        for gradient in gradients:
            parameter.grad = gradient.clone()
            if way == "before":
                ema.observe()
            norm = torch.nn.utils.clip_grad_norm_([parameter], 1.0)
            if way == "undo":
                ema.observe(norm + 1e-6)  # the coefficient is 1 / (norm + 1e-6)
            ema.step()
        found.append(ema.importance["w"])
    before, undone, clipped = found
    assert torch.allclose(before, undone, rtol=1e-4)
    assert clipped.sum() < before.sum() / 10


def test_large_tensors_have_their_retained_mass_from_a_sample():
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.zeros(200, 300))
    importance = torch.rand(200, 300)
    ema = DynamicEMA({"w": parameter}, rule="fisher", total_steps=4, importance={"w": importance})
    for _ in range(4):
        parameter.grad = torch.ones(200, 300)
        ema.step()
    exact = float((importance / (importance + 1)).mean())
    assert ema.retained_mass["w"] == pytest.approx(exact, abs=0.031)


def test_hooks_on_backward_passes_end_with_their_average():
    parameter = nn.Parameter(torch.zeros(2))
    for close in (True, False):
        ema = DynamicEMA({"w": parameter}, rule="fisher", total_steps=2, fisher_source="per_example")
        assert len(parameter._backward_hooks) == 1
        if close:
            ema.close()
        else:
            del ema
        assert not parameter._backward_hooks
