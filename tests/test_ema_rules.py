"""Every rule against float64 loops written from the equations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ema_oracle import Oracle, closed_form
from lcia.ema import RULES, DynamicEMA
from lcia.ema import rules as pure
from lcia.ema.followed import FOLLOWED

pytestmark = pytest.mark.usefixtures("either_passes")

# odd on purpose: one element, one row more than a row of the flat buffer holds, empty dimensions of size one
SHAPES = {"bias": (1,), "odd": (3, 5), "cube": (2, 3, 7), "row": (257,), "wide": (1, 300)}
STEPS = 50


def parameters(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def walk(named: dict[str, nn.Parameter], steps: int, *, seed: int, gradient_scale: float = 3.0):
    """A random training: yields after every step, with weights moved and gradients set."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in named.values():
            with torch.no_grad():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient_scale * torch.randn(parameter.shape, generator=generator)
        yield


def numbers(tensor: Tensor) -> list[float]:
    return tensor.detach().double().flatten().tolist()


def largest_error(tensor: Tensor, expected: list[float]) -> float:
    """In units of the larger of 1 and the number itself: fp32 keeps digits, not places."""
    pairs = zip(numbers(tensor), expected, strict=True)
    return max(abs(a - b) / max(1, abs(b)) for a, b in pairs)


@pytest.mark.parametrize("rule", ["fixed", "eq12", "eq14", "eq45", "released"])
def test_a_published_rule_equals_its_oracle(rule):
    named = parameters(SHAPES)
    ema = DynamicEMA(named, rule=rule)
    oracles = {name: Oracle(rule, numbers(parameter)) for name, parameter in named.items()}
    for _ in walk(named, STEPS, seed=1):
        ema.step()
        for name, parameter in named.items():
            oracles[name].step(numbers(parameter), numbers(parameter.grad))
            assert largest_error(ema.averages[name], oracles[name].average) < 1e-6
            mean_beta = sum(oracles[name].beta) / parameter.numel()
            assert ema.betas[name] == pytest.approx(mean_beta, abs=1e-5)
    for name, parameter in named.items():
        mean_retained = sum(oracles[name].retained) / parameter.numel()
        sampled = rule == "eq12" and parameter.numel() > FOLLOWED
        tolerance = {"abs": 0.1} if sampled else {"rel": 1e-4}
        assert ema.retained_mass[name] == pytest.approx(mean_retained, **tolerance)
    expected_fraction = sum(oracle.fell_back for oracle in oracles.values()) / (STEPS * len(named))
    assert ema.fallback_fraction == pytest.approx(expected_fraction, abs=1e-9)
    if rule != "fixed":
        assert 1 / STEPS <= ema.fallback_fraction < 1, "the comparison must see both β and the fallback"


@pytest.mark.parametrize("per", ["element", "tensor", "layer"])
def test_fisher_equals_its_oracle(per):
    named = parameters(SHAPES)
    generator = torch.Generator().manual_seed(7)
    importance = {name: 30 * torch.rand(p.shape, generator=generator) ** 3 for name, p in named.items()}
    importance["odd"][0] = 0
    ema = DynamicEMA(
        named,
        rule="fisher",
        total_steps=STEPS,
        importance=importance,
        examples_per_gradient=4,
        strength=0.3,
        per=per,
    )
    oracles = {name: Oracle("fisher", numbers(p), steps=STEPS) for name, p in named.items()}
    for name, oracle in oracles.items():
        oracle.old, oracle.examples, oracle.strength = numbers(importance[name]), 4.0, 0.3
    averages = {name: numbers(p) for name, p in named.items()}  # with the β of a tensor or a layer
    products = dict.fromkeys(named, 1.0)
    for _ in walk(named, STEPS, seed=2):
        ema.step()
        for name, oracle in oracles.items():
            oracle.step(numbers(named[name]), numbers(named[name].grad))
        for name in named if per != "element" else ():
            # The share of the sums, not the mean of shares. Names without a dot all belong to one layer: the model.
            shared = [oracles[name]] if per == "tensor" else list(oracles.values())
            old = sum(other.strength * value for other in shared for value in other.old)
            total = sum(value for other in shared for value in other.importance())
            beta = (old / total) ** (1 / STEPS)
            assert ema.betas[name] == pytest.approx(beta, rel=1e-6)
            products[name] *= beta
            pairs = zip(averages[name], numbers(named[name]), strict=True)
            averages[name] = [beta * average + (1 - beta) * weight for average, weight in pairs]
    for name, oracle in oracles.items():
        assert largest_error(ema.importance[name], oracle.importance()) < 1e-4
        if per == "element":
            assert largest_error(ema.averages[name], oracle.average) < 1e-6
            tolerance = {"abs": 0.1} if named[name].numel() > FOLLOWED else {"rel": 1e-5}
            mean_retained = sum(oracle.retained) / len(oracle.retained)
            assert ema.retained_mass[name] == pytest.approx(mean_retained, **tolerance)
        else:
            assert largest_error(ema.averages[name], averages[name]) < 1e-6
            assert ema.retained_mass[name] == pytest.approx(products[name], rel=1e-5)
    assert ema.fallback_fraction == 0


@pytest.mark.parametrize("rule", ["eq14", "eq45", "released"])
def test_one_beta_per_layer_uses_the_norms_of_the_whole_layer(rule):
    shapes = {"a.weight": (4, 3), "b.weight": (2, 2), "a.bias": (4,), "c.lora_A.x.weight": (2, 5)}
    shapes |= {"c.lora_B.x.weight": (3, 2)}
    named = parameters(shapes)
    layers = {"a": ["a.weight", "a.bias"], "b": ["b.weight"], "c": ["c.lora_A.x.weight", "c.lora_B.x.weight"]}
    ema = DynamicEMA(named, rule=rule, per="layer")

    def together(names: list[str], gradients: bool = False) -> list[float]:
        return [value for name in names for value in numbers(named[name].grad if gradients else named[name])]

    oracles = {layer: Oracle(rule, together(names)) for layer, names in layers.items()}
    for _ in walk(named, STEPS, seed=3):
        ema.step()
        for layer, names in layers.items():
            oracles[layer].step(together(names), together(names, gradients=True))
            found = torch.cat([ema.averages[name].flatten() for name in names])
            assert largest_error(found, oracles[layer].average) < 1e-6
            for name in names:
                assert ema.betas[name] == pytest.approx(oracles[layer].beta[0], abs=1e-5)
    assert 0 < ema.fallback_fraction < 1


def test_the_lag_of_eq45_is_known_without_a_copy_of_the_last_weights():
    named = parameters(SHAPES)
    ema = DynamicEMA(named, rule="eq45")
    state = ema.state_dict()
    assert {key.split("/")[0] for key in state if "/" in key} == {"average", "previous_gradient", "memory"}
    for _ in walk(named, 10, seed=4):
        ema.step()
        for name, parameter in named.items():
            lag = (parameter.detach().double() - ema.averages[name].double()).abs().sum()
            order = sorted(named).index(name)
            assert float(ema.state_dict()["memory/offset"][order]) == pytest.approx(float(lag), rel=1e-5)


@given(
    start=st.floats(-5, 5),
    steps=st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 1)), min_size=1, max_size=20),
)
@settings(max_examples=40, deadline=None)
def test_the_average_is_the_closed_form_of_appendix_a(start, steps):
    parameter = nn.Parameter(torch.tensor([start], dtype=torch.float32))
    begun = float(parameter.detach())
    ema = DynamicEMA({"w": parameter}, rule="fixed")
    weights = []
    product = 1.0
    for weight, beta in steps:
        ema.fallback = beta
        with torch.no_grad():
            parameter.fill_(weight)
        parameter.grad = torch.zeros(1)
        ema.step()
        weights.append(float(parameter.detach()))
        product *= beta
    expected = closed_form(begun, weights, [beta for _, beta in steps])
    assert float(ema.averages["w"]) == pytest.approx(expected, abs=2e-5)
    assert ema.retained_mass["w"] == pytest.approx(product, rel=1e-9, abs=1e-12)


@given(
    seed=st.integers(0, 10_000),
    gradient_scale=st.sampled_from([1e-6, 1e-2, 1.0, 1e3, 1e12]),
    rule=st.sampled_from(sorted(RULES)),
)
@settings(max_examples=60, deadline=None)
def test_beta_lies_in_its_interval(seed, gradient_scale, rule):
    named = parameters({"a": (5, 3), "b": (1,)}, seed)  # what is told of b is not a mean
    importance = {name: torch.rand(p.shape) * gradient_scale**2 for name, p in named.items()}
    ema = DynamicEMA(named, rule=rule, total_steps=4, importance=importance if rule == "fisher" else None)
    for _ in walk(named, 4, seed=seed, gradient_scale=gradient_scale):
        before = {name: value.clone() for name, value in ema.averages.items()}
        ema.step()
        for beta in ema.betas.values():
            assert 0 <= beta <= 1 if rule == "fisher" else 0 < beta < 1
        for name, average in ema.averages.items():  # of every element: its average lies between what it is one of
            low, high = torch.minimum(before[name], named[name]), torch.maximum(before[name], named[name])
            assert ((average >= low - 1e-6) & (average <= high + 1e-6)).all()
    if rule == "fisher":
        assert ema.fallback_fraction == 0


@pytest.mark.parametrize("rule", ["eq12", "eq14", "eq45", "released"])
def test_a_gradient_that_is_not_finite_counts_as_one_fallback(rule):
    """In a step and a tensor in which the rule has a β of its own, unless the gradient is spoilt."""
    named = parameters(SHAPES)
    ema, spoilt = DynamicEMA(named, rule=rule), DynamicEMA(named, rule=rule)
    for _ in walk(named, STEPS, seed=1):
        before = ema.state_dict()
        counts = before["memory/fell_back"].clone()
        ema.step()
        after = ema.state_dict()["memory/fell_back"]
        chosen = next((i for i in range(len(named)) if after[i] - counts[i] < 1), None)  # alphabetical
        if chosen is None:
            continue
        name = sorted(named)[chosen]
        spoilt.load_state_dict(before)
        named[name].grad.view(-1)[0] = torch.inf
        with pytest.warns(UserWarning, match=f"gradient of {name} is not finite"):
            spoilt.step()
        after[chosen] = counts[chosen] + 1
        assert torch.allclose(spoilt.state_dict()["memory/fell_back"], after)
        return
    pytest.fail("the rule fell back in every step of every tensor")


@given(
    old=st.one_of(st.just(0.0), st.floats(1e-15, 1e15)),
    new=st.one_of(st.just(0.0), st.floats(1e-15, 1e15)),
    steps=st.integers(1, 5000),
)
@settings(deadline=None)
def test_fisher_is_a_number_for_any_importance(old, new, steps):
    found = float(pure.fisher(importance=torch.tensor([old]), curvature=torch.tensor([new]), exponent=1 / steps))
    assert 0 <= found <= 1
    # 1 − β is what it gives, and for a long task its last digits are the whole answer
    expected = -math.expm1(-math.log1p(new / old) / steps) if old else 1.0
    assert found == pytest.approx(expected, rel=1e-5, abs=torch.finfo(torch.float32).tiny)


def test_the_first_step_of_a_published_rule_is_a_fallback_and_counted():
    for rule in ("eq12", "eq14", "eq45", "released"):
        named = parameters({"a": (2, 2)})
        ema = DynamicEMA(named, rule=rule, fallback=0.75)
        next(walk(named, 1, seed=0))
        ema.step()
        assert ema.fallback_fraction == 1, rule
        assert ema.betas == {"a": 0.75}, rule


def test_read_literally_eq45_is_the_constant_on_a_small_model():
    """The warning of this project: ‖g + 1‖ is about the number of elements, so that 1 − β is far above 1."""
    named = parameters({"a": (64, 8), "b": (8, 64)})
    ema = DynamicEMA(named, rule="eq45")
    for _ in walk(named, 20, seed=0, gradient_scale=1e-3):
        ema.step()
    assert ema.fallback_fraction == 1


def test_retained_chooses_the_constant_whose_product_is_that_mass():
    named = parameters({"a": (3,)})
    for total_steps in (7, 300):
        ema = DynamicEMA(named, rule="fixed", total_steps=total_steps, retained=0.3)
        for _ in walk(named, total_steps, seed=1):
            ema.step()
        assert ema.retained_mass["a"] == pytest.approx(0.3, rel=1e-9)
    fallback = DynamicEMA(named, rule="eq45", total_steps=100, retained=0.5)
    assert fallback.fallback == pytest.approx(math.exp(math.log(0.5) / 100))


def test_the_rules_are_functions_of_tensors():
    one, two, three = (torch.tensor(value, dtype=torch.float64) for value in (1.0, 2.0, 3.0))
    assert float(pure.released(gradient=one, offset=two, gradient_change=three)) == pytest.approx(4 / 6)
    found = pure.printed(previous_offset=one, gradient_plus_one=two, offset=two, gradient_change=three)
    assert float(found) == pytest.approx(1 / 3)
    found = pure.stationary(gradient_plus_one=one, step=two, offset=two, gradient_change=three)
    assert float(found) == pytest.approx(1 - 1 / 3)
    found = pure.fisher(importance=one.clone(), curvature=three, exponent=0.5)
    assert float(found) == pytest.approx(1 - math.sqrt(1 / 4))


def test_half_precision_gradients_change_little_and_halve_their_memory():
    named = parameters({"a": (40, 7)})
    full = DynamicEMA(named, rule="eq45")
    half = DynamicEMA(named, rule="eq45", grad_dtype=torch.bfloat16)
    for _ in walk(named, 20, seed=5):
        full.step()
        half.step()
    assert half.state_dict()["previous_gradient/a"].dtype == torch.bfloat16
    assert half.averages["a"].dtype == torch.float32
    difference = (full.averages["a"] - half.averages["a"]).abs().max()
    assert 0 < difference < 0.02
