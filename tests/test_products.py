"""float32 products by oneDNN against float64, and when they are torch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcia.backbone import products
from lcia.backbone.products import Linear, product, use_own_products

ours = pytest.mark.skipif(not products.available(), reason="torch without oneDNN, or no x86 processor")


@given(
    rows=st.lists(st.integers(1, 5), max_size=3),
    wide=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    biased=st.booleans(),
    learned=st.tuples(st.booleans(), st.booleans()),
    strided=st.booleans(),
    seed=st.integers(0, 999),
)
def test_product_and_gradients_are_those_of_float64(
    rows: list[int], wide: tuple[int, int], biased: bool, learned: tuple[bool, bool], strided: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    inputs, outputs = wide
    x = torch.randn(*rows, 2 * inputs)[..., ::2] if strided else torch.randn(*rows, inputs)
    weight, bias = torch.randn(outputs, inputs), torch.randn(outputs) if biased else None
    factors = torch.randn(*rows, outputs)  # of a loss
    given_ = [tensor for tensor in (x, weight, bias) if tensor is not None]
    learns = [tensor for tensor, is_learned in zip(given_, (*learned, True), strict=False) if is_learned]
    for tensor in learns:
        tensor.requires_grad_()
    wanted = sum((x.double()[..., i, None] * weight.double()[:, i] for i in range(inputs)), torch.zeros(1).double())
    wanted = wanted if bias is None else wanted + bias.double()
    found = product(x, weight, bias)
    assert found.shape == (*rows, outputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    if learns:
        right = torch.autograd.grad((wanted * factors).sum(), learns)
        mine = torch.autograd.grad((found * factors).sum(), learns)
        for one, other in zip(mine, right, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_no_tokens() -> None:
    assert product(torch.empty(0, 3), torch.randn(2, 3)).shape == (0, 2)


@ours
def test_float32_is_multiplied_by_onednn_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied: list[torch.dtype] = []
    multiply = products._multiply

    def counted(x: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
        multiplied.append(x.dtype)
        return multiply(x, *others)

    monkeypatch.setattr(products, "_multiply", counted)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4).bfloat16(), torch.nn.Bilinear(2, 2, 2))
    use_own_products(model)
    assert [type(module) for module in model] == [Linear, Linear, torch.nn.Bilinear]
    model[0](torch.randn(3, 4))
    assert multiplied == [torch.float32]
    model[1](torch.randn(3, 4).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert model[0](torch.randn(3, 4)).dtype == torch.bfloat16
    assert multiplied == [torch.float32]


def test_elsewhere_it_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_AVAILABLE", False)
    x, weight = torch.randn(3, 4), torch.randn(2, 4, requires_grad=True)
    assert torch.equal(product(x, weight), torch.nn.functional.linear(x, weight))
    assert "Product" not in type(product(x, weight).grad_fn).__name__


@ours
def test_a_loaded_model_multiplies_so(tiny_model) -> None:
    from lcia.adapters import AdapterPool
    from lcia.backbone import load_backbone

    backbone = load_backbone(str(tiny_model), "float32", "auto")
    linear = [module for module in backbone.model.modules() if isinstance(module, torch.nn.Linear)]
    assert linear
    assert all(type(module) is Linear for module in linear)
    pool = AdapterPool(backbone.model, {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"}, "tiny")
    pool.add("a")
    pool.add("b")
    factors = [module for name, module in pool.model.named_modules() if name.endswith((".group_a", ".group_b"))]
    assert factors
    assert all(type(module) is Linear for module in factors if isinstance(module, torch.nn.Linear))
