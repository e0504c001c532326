"""What DynamicEMA promises around the equations: what it starts from, what it refuses, what it keeps."""

from __future__ import annotations

import math
import random
import warnings

import pytest
import torch
from torch import nn

from lcia.ema import RULES, DynamicEMA

pytestmark = pytest.mark.usefixtures("either_passes")

KEYWORDS = {"fisher": {"total_steps": 10}}
# Floats per element, from the issue: θ*, and what the rule compares with. fisher reads the optimizer's F_new.
STATE_BYTES = {"fixed": 4, "eq45": 8, "released": 8, "eq12": 12, "eq14": 12}


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def train(net: nn.Module, ema: DynamicEMA, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(net.parameters()).dtype
    for _ in range(steps):
        batch = torch.randn(6, 5, generator=generator).to(dtype)
        net(batch).square().mean().backward()
        optimizer.step()
        ema.step()
        optimizer.zero_grad()


def copies(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_average_starts_at_the_weights_before_the_first_step():
    net = model()
    before = copies(dict(net.named_parameters()))
    ema = DynamicEMA(net.named_parameters(), rule="fixed", fallback=1.0)
    assert equal(ema.averages, before)
    train(net, ema, torch.optim.SGD(net.parameters(), lr=0.1), 3)
    assert equal(ema.averages, before), "β = 1 keeps θ*_0, which is θ_0 and not θ_1"


def test_frozen_parameters_are_left_out():
    net = model()
    net[0].requires_grad_(False)
    assert set(DynamicEMA(net.named_parameters()).averages) == {"2.weight", "2.bias"}
    net.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to average"):
        DynamicEMA(net.named_parameters())


def test_averages_of_a_bf16_model_are_kept_in_fp32():
    net = model(torch.bfloat16)
    ema = DynamicEMA(net.named_parameters(), rule="fixed", fallback=0.999)
    start = copies(ema.averages)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 1
            parameter.grad = torch.zeros_like(parameter)
    target = copies(dict(net.named_parameters()))
    for _ in range(1000):
        ema.step()
    for name, average in ema.averages.items():
        assert average.dtype == torch.float32
        way = (average - start[name]) / (target[name].float() - start[name])
        # in bf16 it would be 0.016: the move of 0.001 is rounded away
        assert torch.allclose(way, torch.full_like(way, 1 - 0.999**1000), rtol=1e-3)


def test_a_missing_gradient_raises_and_names_the_parameter():
    net = model()
    ema = DynamicEMA(net.named_parameters())
    before = copies(ema.averages)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    net[2].bias.grad = None
    with pytest.raises(RuntimeError, match=r"2\.bias has no gradient"):
        ema.step()
    assert equal(ema.averages, before)
    assert ema.steps == 0


@pytest.mark.parametrize("rule", sorted(RULES))
def test_an_optional_parameter_without_gradient_stays_and_is_counted(rule):
    net = model()
    importance = {name: torch.ones_like(p).detach() for name, p in net.named_parameters()}
    ema = DynamicEMA(
        net.named_parameters(),
        rule=rule,
        optional=["0.bias"],
        total_steps=10,
        importance=importance if rule == "fisher" else None,
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    train(net, ema, optimizer, 2)
    stayed = ema.averages["0.bias"].clone()
    moved = ema.averages["0.weight"].clone()
    retained = ema.retained_mass["0.bias"]
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    net[0].bias.grad = None
    optimizer.step()
    ema.step()
    assert torch.equal(ema.averages["0.bias"], stayed)
    assert not torch.equal(ema.averages["0.weight"], moved)
    assert ema.retained_mass["0.bias"] == retained
    assert ema.betas["0.bias"] == 1
    assert ema.missing_gradients == {"0.bias": 1}
    optimizer.zero_grad()
    train(net, ema, optimizer, 2)
    assert math.isfinite(ema.averages["0.bias"].sum())


def test_a_missing_gradient_leaves_the_memory_of_eq45_as_it_was():
    """As if the step had not been: the next β compares with the last gradient and lag that there were."""
    torch.manual_seed(0)
    shape = (40,)
    weights, gradients = torch.randn(5, *shape), 3 * torch.randn(5, *shape)
    found = []
    for skip in (False, True):
        parameters = {"a": nn.Parameter(torch.zeros(shape)), "b": nn.Parameter(torch.zeros(shape))}
        ema = DynamicEMA(parameters, rule="eq45", optional=["a"])
        for t in range(5):
            for parameter in parameters.values():
                parameter.grad = gradients[t].clone()
            with torch.no_grad():
                parameters["a"].copy_(weights[t])
            ema.step()
            if skip:
                parameters["a"].grad = None
                ema.step()
        found.append(ema.averages["a"].clone())
    assert torch.equal(*found)


def test_weights_that_are_not_finite_raise_and_leave_the_averages_untouched():
    for rule in sorted(RULES):
        net = model()
        ema = DynamicEMA(net.named_parameters(), rule=rule, total_steps=10)
        train(net, ema, torch.optim.SGD(net.parameters(), lr=0.1), 2)
        before, steps = copies(ema.averages), ema.steps
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        with torch.no_grad():
            net[2].weight[1, 1] = math.nan
        with pytest.raises(RuntimeError, match=r"2\.weight is not finite"):
            ema.step()
        assert equal(ema.averages, before), rule
        assert ema.steps == steps, rule


@pytest.mark.parametrize("rule", ["eq12", "eq14", "eq45", "released", "fisher"])
def test_a_gradient_that_is_not_finite_is_counted_and_named_once(rule):
    net = model()
    importance = {name: torch.ones_like(p).detach() for name, p in net.named_parameters()}
    ema = DynamicEMA(
        net.named_parameters(),
        rule=rule,
        total_steps=10,
        importance=importance if rule == "fisher" else None,
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    train(net, ema, optimizer, 3)
    fraction = ema.fallback_fraction
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    net[0].weight.grad[0, 0] = math.inf
    with pytest.warns(UserWarning, match=r"gradient of 0\.weight is not finite"):
        ema.step()
    counted = ema.fallback_fraction * 4 * ema.steps - fraction * 4 * (ema.steps - 1)
    assert counted >= 1 - 1e-9  # exactly what it adds: test_ema_rules.py
    net[0].weight.grad[0, 0] = math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema.step()
    for average in ema.averages.values():
        assert average.isfinite().all()
    if rule == "fisher":
        assert all(value.isfinite().all() for value in ema.importance.values())


def test_applied_swaps_the_weights_and_gives_them_back_bit_for_bit():
    net = model(torch.bfloat16)
    ema = DynamicEMA(net.named_parameters(), rule="fixed", fallback=0.5)
    train(net, ema, torch.optim.SGD(net.parameters(), lr=0.5), 3)
    raw = copies(dict(net.named_parameters()))
    with ema.applied():
        for name, parameter in net.named_parameters():
            assert torch.equal(parameter, ema.averages[name].bfloat16())
            assert not torch.equal(parameter, raw[name])
    assert equal(dict(net.named_parameters()), raw)

    def fail() -> None:
        with ema.applied():
            raise KeyError("the weights come back even then")

    with pytest.raises(KeyError):
        fail()
    assert equal(dict(net.named_parameters()), raw)
    ema.copy_to_model()
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, ema.averages[name].bfloat16())


VARIANTS = [
    *((rule, {}) for rule in sorted(RULES)),
    ("eq14", {"per": "layer"}),
    ("eq45", {"grad_dtype": torch.bfloat16}),
    ("fisher", {"per": "tensor"}),
    ("fisher", {"rest": 0.5}),
    ("fisher", {"fisher_source": "adamw"}),
    ("fisher", {"fisher_source": "per_example"}),
]


@pytest.mark.parametrize("stop", random.Random(0).sample(range(1, 10), 3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("rule", "options"), VARIANTS, ids=lambda value: value if isinstance(value, str) else str(value)
)
def test_interrupted_and_resumed_is_bit_identical(rule, options, dtype, stop, tmp_path):
    def begin() -> tuple[nn.Module, DynamicEMA, torch.optim.Optimizer]:
        net = model(dtype)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        if rule == "fisher":
            importance = {name: torch.full_like(p, 1e-4).detach().float() for name, p in net.named_parameters()}
            needed = {"importance": importance, "optimizer": optimizer}
        else:
            needed = {}
        return net, DynamicEMA(net.named_parameters(), rule=rule, total_steps=10, **needed, **options), optimizer

    net, ema, optimizer = begin()
    train(net, ema, optimizer, stop, seed=1)
    ema.save(tmp_path / "ema.safetensors")
    kept = ({k: v.clone() for k, v in net.state_dict().items()}, optimizer.state_dict())
    torch.save(kept, tmp_path / "rest.pt")
    train(net, ema, optimizer, 10 - stop, seed=2)

    other_net, other_ema, other_optimizer = begin()
    weights, state = torch.load(tmp_path / "rest.pt", weights_only=True)
    other_net.load_state_dict(weights)
    other_optimizer.load_state_dict(state)
    other_ema.load(tmp_path / "ema.safetensors")
    train(other_net, other_ema, other_optimizer, 10 - stop, seed=2)

    assert equal(net.state_dict(), other_net.state_dict())
    for number, state in optimizer.state_dict()["state"].items():
        assert equal(state, other_optimizer.state_dict()["state"][number])
    mine, theirs = ema.state_dict(), other_ema.state_dict()
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        same = torch.equal(value, theirs[key]) if isinstance(value, torch.Tensor) else value == theirs[key]
        assert same, key
    assert ema.betas == other_ema.betas
    assert ema.fallback_fraction == other_ema.fallback_fraction


def test_a_state_does_not_depend_on_the_order_of_the_parameters():
    net = model()
    ema = DynamicEMA(net.named_parameters(), rule="released")
    train(net, ema, torch.optim.SGD(net.parameters(), lr=0.1), 3)
    other = DynamicEMA(dict(reversed(list(net.named_parameters()))), rule="released")
    other.load_state_dict(ema.state_dict())
    assert other.retained_mass == ema.retained_mass
    assert other.averages.keys() == ema.averages.keys()
    assert all(torch.equal(other.averages[name], value) for name, value in ema.averages.items())


def test_a_state_dict_is_a_copy():
    net = model()
    ema = DynamicEMA(net.named_parameters(), rule="fixed")
    state = ema.state_dict()
    before = state["average/0.bias"].clone()
    train(net, ema, torch.optim.SGD(net.parameters(), lr=1.0), 2)
    assert torch.equal(state["average/0.bias"], before)
    assert not torch.equal(ema.averages["0.bias"], before)


def test_a_state_of_another_rule_or_model_is_refused_and_changes_nothing():
    net = model()
    ema = DynamicEMA(net.named_parameters(), rule="eq45")
    before = copies(ema.averages)
    with pytest.raises(ValueError, match="rule 'fixed'"):
        ema.load_state_dict(DynamicEMA(net.named_parameters(), rule="fixed").state_dict())
    larger = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"average of 0\.weight is \(8, 5\), the parameter \(7, 5\)"):
        ema.load_state_dict(DynamicEMA(larger.named_parameters(), rule="eq45").state_dict())
    state = ema.state_dict()
    del state["average/2.bias"]
    with pytest.raises(ValueError, match=r"the first is 2\.bias"):
        ema.load_state_dict(state)
    assert equal(ema.averages, before)


def test_bad_arguments_are_refused_with_the_nearest_name():
    net = model()
    for arguments, message in [
        ({"rule": "fischer"}, "Did you mean 'fisher'"),
        ({"rule": "fisher"}, "needs total_steps"),
        ({"rule": "fisher", "total_steps": 5, "fisher_source": "adam"}, "Did you mean 'adamw'"),
        ({"rule": "fisher", "total_steps": 5, "fisher_source": "adamw"}, "give optimizer="),
        ({"rule": "fisher", "total_steps": 5, "strength": 0}, "strength is 0"),
        ({"rule": "fisher", "total_steps": 5, "forgetting": -0.1}, "forgetting is -0.1, it must be a number from 0"),
        ({"rule": "eq45", "per": "element"}, "no β per element"),
        ({"rule": "eq45", "per": "layers"}, "Did you mean 'layer'"),
        ({"fallback": 1.5}, "fallback is 1.5"),
        ({"retained": 0.3}, "give those too"),
        ({"retained": 1.3, "total_steps": 5}, r"must lie in \(0, 1\)"),
        ({"total_steps": 0}, "total_steps is 0"),
        ({"rule": "fisher", "total_steps": 5, "retained": 0.3}, "'fisher' does not read retained"),
        ({"strength": 0.3}, "'eq45' does not read strength"),
        ({"fisher_source": "adamw"}, "'eq45' does not read fisher_source"),
        ({"optional": ["0.weigth"]}, r"Did you mean '0\.weight'"),
    ]:
        with pytest.raises(ValueError, match=message):
            DynamicEMA(net.named_parameters(), **arguments)


def test_importance_must_fit_the_parameters():
    net = model()

    def begin(importance: dict[str, torch.Tensor]) -> None:
        DynamicEMA(net.named_parameters(), rule="fisher", total_steps=5, importance=importance)

    good = {name: torch.ones_like(p).detach() for name, p in net.named_parameters()}
    begin(good)
    with pytest.raises(ValueError, match=r"1 parameters have none, the first is 2\.bias"):
        begin({name: value for name, value in good.items() if name != "2.bias"})
    with pytest.raises(ValueError, match="belong to no parameter, the first is more"):
        begin(good | {"more": torch.ones(1)})
    with pytest.raises(ValueError, match=r"importance of 0\.bias is \(2,\)"):
        begin(good | {"0.bias": torch.ones(2)})
    with pytest.raises(ValueError, match=r"0\.bias has an element that is negative"):
        begin(good | {"0.bias": -torch.ones(7)})


@pytest.mark.parametrize("rule", sorted(STATE_BYTES))
def test_bytes_of_state_per_parameter(rule):
    parameter = nn.Parameter(torch.zeros(64, 1024))
    ema = DynamicEMA({"a": parameter}, rule=rule)
    assert state_bytes(ema) / parameter.numel() == STATE_BYTES[rule]


def test_fisher_from_the_optimizer_keeps_eight_bytes_and_half_gradients_six():
    parameter = nn.Parameter(torch.zeros(64, 1024))
    importance = {"a": torch.ones(64, 1024)}
    optimizer = torch.optim.AdamW([parameter])
    ema = DynamicEMA(
        {"a": parameter},
        rule="fisher",
        total_steps=5,
        importance=importance,
        fisher_source="adamw",
        optimizer=optimizer,
    )
    assert state_bytes(ema) / parameter.numel() == 8
    half = DynamicEMA({"a": parameter}, rule="eq45", grad_dtype=torch.bfloat16)
    assert state_bytes(half) / parameter.numel() == 6


def state_bytes(ema: DynamicEMA) -> int:
    return sum(
        value.numel() * value.element_size()
        for key, value in ema.state_dict().items()
        if isinstance(value, torch.Tensor) and not key.startswith("memory/")
    )


@pytest.mark.parametrize("block_elements", [256, 1024, 1 << 22])
def test_blocks_of_any_size_give_the_same_averages(block_elements, monkeypatch):
    """A tensor may be cut at any row, and a block may hold many tensors."""
    torch.manual_seed(0)
    shapes = [(3, 100), (1,), (700,), (2, 2), (256,), (5, 130)]
    weights = [torch.randn(6, *shape) for shape in shapes]
    gradients = [3 * torch.randn(6, *shape) for shape in shapes]

    def run(rule: str) -> dict[str, torch.Tensor]:
        named = {str(i): nn.Parameter(weight[0].clone()) for i, weight in enumerate(weights)}
        importance = {name: torch.ones_like(p).detach() for name, p in named.items()}
        ema = DynamicEMA(named, rule=rule, total_steps=6, importance=importance if rule == "fisher" else None)
        for t in range(6):
            for i, parameter in enumerate(named.values()):
                parameter.data.copy_(weights[i][t])
                parameter.grad = gradients[i][t].clone()
            ema.step()
        return copies(ema.averages)

    for rule in RULES:
        expected = run(rule)
        monkeypatch.setattr("lcia.ema.layout.CPU_BLOCK_ELEMENTS", block_elements)
        found = run(rule)
        monkeypatch.undo()
        for name in expected:
            assert torch.allclose(expected[name], found[name], rtol=0, atol=1e-6), (rule, name)


def test_weights_that_are_not_contiguous_are_averaged_too():
    parameter = nn.Parameter(torch.randn(6, 4).t())
    ema = DynamicEMA({"a": parameter}, rule="fixed", fallback=0.0)
    with torch.no_grad():
        parameter.mul_(3)
    parameter.grad = torch.zeros_like(parameter)
    ema.step()
    assert torch.equal(ema.averages["a"], parameter.detach())
    with ema.applied():
        pass


def test_what_hides_its_weights_or_gradients_is_refused():
    zero = nn.Parameter(torch.ones(3))
    zero.ds_id = 4
    with pytest.raises(RuntimeError, match="lm_head is managed by DeepSpeed ZeRO"):
        DynamicEMA({"lm_head": zero})
    flat = nn.Parameter(torch.ones(3))
    flat._fsdp_flattened = True
    with pytest.raises(RuntimeError, match="FSDP1"):
        DynamicEMA({"lm_head": flat})
    with pytest.raises(RuntimeError, match="lm_head has no elements"):
        DynamicEMA({"lm_head": nn.Parameter(torch.ones(0))})
    with pytest.raises(ValueError, match="complex64"):
        DynamicEMA({"lm_head": nn.Parameter(torch.ones(2, dtype=torch.complex64))})


def test_fisher_goes_on_with_as_many_examples_a_gradient():
    """F_new is a mean over steps: another batch would scale the rest of it otherwise."""
    net = model()
    first = DynamicEMA(net.named_parameters(), "fisher", total_steps=9, examples_per_gradient=8)
    train(net, first, torch.optim.SGD(net.parameters(), lr=0.1), 2)
    same = DynamicEMA(net.named_parameters(), "fisher", total_steps=9, examples_per_gradient=8.0)
    same.load_state_dict(first.state_dict())
    other = DynamicEMA(net.named_parameters(), "fisher", total_steps=9, examples_per_gradient=16)
    with pytest.raises(ValueError, match="examples_per_gradient 8, this DynamicEMA has 16: batch × accumulation"):
        other.load_state_dict(first.state_dict())
