"""The pool: the right weights train, nothing else moves, plain PEFT reads what it writes."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from lcia.adapters import AdapterPool, answering
from lcia.adapters.lora import LoraLinear, use_own_forward
from lcia.backbone import load_backbone
from lcia.errors import UserError

LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}
IDS = torch.arange(5, 25)[None]


@pytest.fixture
def pool(tiny_model: Path) -> AdapterPool:
    return AdapterPool(load_backbone(str(tiny_model), dtype="float32").model, LORA, "tiny")


def disturb(pool: AdapterPool, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in pool.parameters(name).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def logits(pool: AdapterPool, name: str | None) -> torch.Tensor:
    with pool.active(name) as model, torch.no_grad():
        return model(input_ids=IDS).logits


def test_a_new_adapter_is_the_base_model_and_no_adapter_is_it_bit_for_bit(pool: AdapterPool) -> None:
    base = logits(pool, None)
    pool.add("a")
    disturb(pool, "a", 0)
    assert not torch.equal(logits(pool, "a"), base)
    assert torch.equal(logits(pool, None), base)


def test_only_the_chosen_adapter_trains(pool: AdapterPool) -> None:
    pool.add("a")
    pool.add("b")
    pool.train_only("b")
    trained = {name for name, parameter in pool.model.named_parameters() if parameter.requires_grad}
    assert trained == set(pool.parameters("b"))
    assert not trained & set(pool.parameters("a"))


def test_a_new_adapter_can_start_from_another_and_is_then_apart(pool: AdapterPool) -> None:
    pool.add("a")
    disturb(pool, "a", 1)
    pool.add("b", start="a")
    assert pool.sha256("a") == pool.sha256("b")
    disturb(pool, "b", 2)
    assert pool.sha256("a") != pool.sha256("b")


def test_the_start_of_an_adapter_does_not_depend_on_what_came_before(tiny_model: Path) -> None:
    hashes = []
    for before in ([], ["x", "y"]):
        pool = AdapterPool(load_backbone(str(tiny_model), dtype="float32").model, LORA, "tiny", seed=3)
        for name in before:
            pool.add(name)
        torch.rand(7)
        pool.add("a")
        hashes.append(pool.sha256("a"))
    assert hashes[0] == hashes[1]


def test_names_that_contain_each_other_are_kept_apart(pool: AdapterPool) -> None:
    pool.add("qa")
    pool.add("qa_2")
    assert not set(pool.parameters("qa")) & set(pool.parameters("qa_2"))


def test_plain_peft_loads_a_saved_adapter(pool: AdapterPool, tiny_model: Path, tmp_path: Path) -> None:
    pool.add("a")
    disturb(pool, "a", 3)
    expected = logits(pool, "a")
    pool.save("a", tmp_path / "a")
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager")
    loaded = PeftModel.from_pretrained(base, tmp_path / "a").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_save_and_load_are_exact_and_damage_is_named(pool: AdapterPool, tmp_path: Path) -> None:
    pool.add("a")
    disturb(pool, "a", 4)
    before = pool.sha256("a")
    pool.save("a", tmp_path / "a")
    disturb(pool, "a", 5)
    pool.load("a", tmp_path / "a")
    assert pool.sha256("a") == before
    weights = tmp_path / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        pool.load("a", tmp_path / "a")


def test_a_mixed_batch_gives_what_each_row_gives_alone(pool: AdapterPool, tiny_model: Path) -> None:
    from lcia.backbone import Encoded, load_backbone
    from lcia.evaluation import Decoding, generate_answers

    reader = load_backbone(str(tiny_model), "float32", "auto").reader
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        pool.add(name)
        for parameter in pool.parameters(name).values():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    prompts = [Encoded(tuple(range(10, 10 + length)), ()) for length in (7, 3, 12, 5, 9, 4)]
    groups = ["a", None, "b", "b", "a", None]
    decoding = Decoding(max_new_tokens=8, batch_size=4, max_length=64)
    mixed = generate_answers(pool, reader, groups, prompts, decoding)
    alone = [
        generate_answers(pool, reader, [group], [prompt], decoding)[0]
        for group, prompt in zip(groups, prompts, strict=True)
    ]
    assert mixed == alone
    swapped = generate_answers(pool, reader, ["b", None, "a", "a", "b", None], prompts, decoding)
    assert [a == b for a, b in zip(mixed, swapped, strict=True)] == [False, True, False, False, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [4, 6])  # of r = 3: a scale that is no power of two, and one that is
@pytest.mark.parametrize("names", [["one"], ["one", "two"], None])
def test_a_layer_is_w_x_plus_s_b_a_x(dtype: torch.dtype, alpha: int, names: list[str] | None) -> None:
    """Forward and gradients against float64, and PEFT's own bit for bit; None: a row of each and one of none."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(6, 5).to(dtype).requires_grad_(False))
    config = LoraConfig(r=3, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name="one", autocast_adapter_dtype=True)
    model.add_adapter("two", config)
    use_own_forward(model)
    layer = model.base_model.model[0]
    assert type(layer) is LoraLinear
    x = torch.randn(3, 2, 6).to(dtype).requires_grad_()
    each = [["one"], ["two"], []] if names is None else [names] * 3

    def expected(one: torch.Tensor, active: list[str]) -> torch.Tensor:
        scale = alpha / 3
        parts = [scale * layer.lora_B[n].weight.double() @ layer.lora_A[n].weight.double() for n in active]
        weight = layer.base_layer.weight.double() + sum(parts, torch.zeros(5, 6, dtype=torch.float64))
        return one.double() @ weight.T + layer.base_layer.bias.double()

    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 3e-2}
    wanted = torch.stack([expected(one, active) for one, active in zip(x, each, strict=True)])
    model.base_model.set_adapter(names or ["one"])
    options = {} if names else {"adapter_names": ["one", "two", "__base__"]}
    found = layer(x, **options)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, **close)
    if names is None:
        for row, name in enumerate(("one", "two")):
            model.base_model.set_adapter(name)
            assert torch.equal(layer(x[row]), found[row])
        assert torch.equal(layer.base_layer(x[2]), found[2])
        return
    weights = [layer.lora_A[names[0]].weight, layer.lora_B[names[0]].weight, x]
    assert torch.equal(found, peft.tuners.lora.Linear.forward(layer, x))
    mine = torch.autograd.grad(found.double().square().sum(), weights)
    right = torch.autograd.grad(wanted.square().sum(), weights)
    loose = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-1}
    for one, other in zip(mine, right, strict=True):
        torch.testing.assert_close(one.double(), other.double(), **loose)


@pytest.mark.parametrize("names", [["one"], None])
@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 24)])
@given(seed=st.integers(0, 999), alpha=st.integers(1, 16))
def test_answers_round_what_is_added_as_much_as_w_x(
    dtype: torch.dtype, digits: int, names: list[str] | None, seed: int, alpha: int
) -> None:
    """The bound of an error analysis, u half a unit in the last of `digits` places: W x + b is rounded once, A, B, A x
    and the sum once each. Elsewhere it is PEFT's bit for bit."""
    torch.manual_seed(seed)
    base = torch.nn.Sequential(torch.nn.Linear(24, 7).to(dtype).requires_grad_(False))
    config = LoraConfig(r=3, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(base, config, adapter_name="one", autocast_adapter_dtype=True)
    use_own_forward(model.eval())
    layer = model.base_model.model[0]
    x = torch.randn(3, 2, 24).to(dtype)
    options = {} if names else {"adapter_names": ["one", "one", "__base__"]}
    rows = slice(None) if names else slice(0, 2)
    with torch.no_grad():
        with answering():
            found = layer(x, **options)[rows].double()
        bias, scale = layer.base_layer.bias.double(), alpha / 3
        down, up = layer.lora_A["one"].weight.double(), layer.lora_B["one"].weight.double()
        weight, one = layer.base_layer.weight.double(), x[rows].double()
        plain, added = one @ weight.T + bias, scale * one @ down.T @ up.T
        u = 2.0**-digits
        most = u * plain.abs() + 3.1 * u * scale * (one.abs() @ down.abs().T @ up.abs().T) + u * found.abs()
        assert ((found - plain - added).abs() <= most + 1e-5).all()
        right = peft.tuners.lora.Linear.forward(layer, x)
        assert torch.equal(layer(x), right)


def test_tokens_of_all_rows_in_one_line_are_not_taken_for_rows() -> None:
    """OPT and experts pass (B L, d): names of B rows say nothing about it."""
    config = LoraConfig(r=3, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5)), config, adapter_name="one")
    use_own_forward(model)
    with pytest.raises(ValueError, match="adapter_names"):
        model.base_model.model[0](torch.randn(6, 6), adapter_names=["one", "__base__"])


def test_a_layer_that_is_not_plain_is_pefts(pool: AdapterPool) -> None:
    """Merged, or switched off by PEFT's own means."""
    pool.add("a")
    disturb(pool, "a", 0)
    expected = logits(pool, "a")
    with torch.no_grad():
        pool.model.merge_adapter()
        torch.testing.assert_close(pool.model(input_ids=IDS).logits, expected, rtol=1e-4, atol=1e-4)
        pool.model.unmerge_adapter()
        with pool.model.disable_adapter():
            assert torch.equal(pool.model(input_ids=IDS).logits, logits(pool, None))


def test_batches_are_of_like_length_and_answers_in_the_order_asked(
    pool: AdapterPool, tiny_model: Path, monkeypatch
) -> None:
    from lcia.backbone import Encoded, load_backbone
    from lcia.evaluation import Decoding, generate_answers

    reader = load_backbone(str(tiny_model), "float32", "auto").reader
    pool.add("a")
    prompts = [Encoded(tuple(range(10, 10 + length)), ()) for length in (9, 2, 5, 3, 8)]
    decoding = Decoding(max_new_tokens=8, batch_size=2, max_length=64)
    alone = [generate_answers(pool, reader, ["a"], [prompt], decoding)[0] for prompt in prompts]
    lengths, collate = [], reader.collate
    monkeypatch.setattr(reader, "collate", lambda rows: lengths.append([len(row) for row in rows]) or collate(rows))
    assert generate_answers(pool, reader, ["a"] * 5, prompts, decoding) == alone
    assert lengths == [[2, 3], [5, 8], [9]]


def test_a_prompt_that_comes_again_is_answered_once(pool: AdapterPool, tiny_model: Path, monkeypatch) -> None:
    from lcia.backbone import Encoded, load_backbone
    from lcia.evaluation import Decoding, generate_answers

    reader = load_backbone(str(tiny_model), "float32", "auto").reader
    generator = torch.Generator().manual_seed(0)
    pool.add("a")
    for parameter in pool.parameters("a").values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    one, other = (Encoded(tuple(range(10, 10 + length)), ()) for length in (7, 3))
    prompts, groups = [one, other, one, one, other], ["a", None, "a", None, None]
    decoding = Decoding(max_new_tokens=8, batch_size=4, max_length=64)
    asked, told, collate = [], [], reader.collate
    monkeypatch.setattr(reader, "collate", lambda rows: asked.extend(rows) or collate(rows))
    answers = generate_answers(pool, reader, groups, prompts, decoding, told.append)
    assert len(asked) == 3
    assert sum(told) == 5  # progress counts what was asked for
    monkeypatch.undo()
    assert answers == [
        generate_answers(pool, reader, [group], [prompt], decoding)[0]
        for group, prompt in zip(groups, prompts, strict=True)
    ]
    assert answers[0] != answers[3]
