"""float32 products by oneDNN against float64, and when they are torch's own."""

from __future__ import annotations

import warnings
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lcia.backbone import load_backbone, products
from lcia.backbone.products import Linear, product, use_own_products

ours = pytest.mark.skipif(not products.available(), reason="torch without oneDNN, or no processor of AMD's")


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
    with patch.object(products, "_LEAST", 0):
        found = product(x, weight, bias)
    assert found.shape == (*rows, outputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    if learns:
        right = torch.autograd.grad((wanted * factors).sum(), learns)
        mine = torch.autograd.grad((found * factors).sum(), learns)
        for one, other in zip(mine, right, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


def test_a_sums_gradient_is_one_number_seen_everywhere() -> None:
    x, weight = torch.randn(7, 40), torch.randn(3, 40, requires_grad=True)
    with patch.object(products, "_LEAST", 0):
        product(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(3, 40))


def test_gradients_have_gradients() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(7, 40, requires_grad=True), torch.randn(3, 40, requires_grad=True)
    found = []
    for least in (0, 1000):
        with patch.object(products, "_LEAST", least):
            first = torch.autograd.grad(product(x, weight).square().sum(), [x, weight], create_graph=True)
            found.append(torch.autograd.grad(sum(one.square().sum() for one in first), [x, weight]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2)  # of numbers up to 10,000


def test_what_it_gives_may_be_added_to_in_its_place() -> None:
    """As a layer of LoRA does, with and without gradients."""
    x, weight = torch.randn(2, 7, 40, requires_grad=True), torch.randn(3, 40)
    with patch.object(products, "_LEAST", 0):
        product(x, weight).add_(x[..., :3]).sum().backward()
        with torch.no_grad():
            product(x, weight).add_(1)
    expected = weight.sum(0).expand(2, 7, 40) + torch.tensor([1.0] * 3 + [0.0] * 37)
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)


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
    wide, narrow, half = torch.nn.Linear(256, 256), torch.nn.Linear(256, 8), torch.nn.Linear(256, 256).bfloat16()
    model = torch.nn.Sequential(wide, narrow, half, torch.nn.Bilinear(2, 2, 2))
    use_own_products(model)
    assert [type(module) for module in model] == [Linear, Linear, Linear, torch.nn.Bilinear]
    x = torch.randn(3, 256)
    wide(x)
    assert multiplied == [torch.float32]
    narrow(x)
    half(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert wide(x).dtype == torch.bfloat16
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of a switch for GPUs that it sets, too
        with torch.backends.mkldnn.flags(enabled=False):
            wide(x)
    assert multiplied == [torch.float32]


def test_elsewhere_it_is_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_AVAILABLE", False)
    monkeypatch.setattr(products, "_LEAST", 0)
    x, weight = torch.randn(3, 4), torch.randn(2, 4, requires_grad=True)
    assert torch.equal(product(x, weight), torch.nn.functional.linear(x, weight))
    assert "Product" not in type(product(x, weight).grad_fn).__name__


def test_a_loaded_model_multiplies_so(tiny_model: Path) -> None:
    model = load_backbone(str(tiny_model), "float32", "auto").model
    kinds = {type(module) for module in model.modules() if isinstance(module, torch.nn.Linear)}
    assert kinds == {Linear}
