"""The pool: the right weights train, nothing else moves, plain PEFT reads what it writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lcia.adapters import AdapterPool
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
        assert torch.equal(loaded(input_ids=IDS).logits, expected)


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
