"""Pools of own modules: the right one acts and trains, nothing else moves, what is saved comes back."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from lcia.adapters import AdapterPool, ModulePool, Pool
from lcia.adapters.targets import features, linear_layers, sublayers
from lcia.backbone import Backbone, load_backbone
from lcia.backbone.loading import weights_sha256
from lcia.errors import UserError
from lcia.methods import build_method

LORA = {"r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "target_modules": "all-linear"}
IDS = torch.arange(5, 25)[None]
METHODS = ("moelora", "adapter_cl")


def make_pool(method: str, backbone: Backbone, seed: int = 0, **options: Any) -> Pool:
    return build_method([(method, options)]).make_pool(backbone, LORA, seed)


@pytest.fixture(params=METHODS)
def make(request: pytest.FixtureRequest, tiny_model: Path) -> Callable[..., Pool]:
    """A new pool on a new model."""

    def made(seed: int = 0, dtype: str = "float32", **options: Any) -> Pool:
        return make_pool(request.param, load_backbone(str(tiny_model), dtype=dtype), seed, **options)

    return made


@pytest.fixture
def pool(make: Callable[..., Pool]) -> Pool:
    return make()


def disturb(pool: Pool, name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in pool.parameters(name).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def logits(pool: Pool, name: str | None, ids: torch.Tensor = IDS) -> torch.Tensor:
    with pool.active(name) as model, torch.no_grad():
        return model(input_ids=ids).logits


def base_sha256(pool: Pool) -> str:
    return weights_sha256({key: value for key, value in pool.model.named_parameters() if ".adapters." not in key})


# --- the function


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_adapter_is_the_base_model_bit_for_bit(make, dtype) -> None:
    pool = make(dtype=dtype)
    base = logits(pool, None)
    pool.add("a")
    assert {parameter.dtype for parameter in pool.parameters("a").values()} == {torch.float32}
    assert torch.equal(logits(pool, "a"), base)
    disturb(pool, "a", 0)
    changed = logits(pool, "a")
    assert changed.dtype == base.dtype
    assert not torch.allclose(changed, base, atol=1e-3)
    assert torch.equal(logits(pool, None), base)


def test_every_chosen_module_acts(pool) -> None:
    """Each small module on its own changes the answer, also those that hang below attention, which gives a tuple."""
    pool.add("a")
    base = logits(pool, None)
    layers = {key.split(".adapters.")[0] for key in pool.parameters("a")}
    assert len(layers) in (4, 14)  # attention and MLP of two layers; seven linear layers of each
    for layer in layers:
        pool.add(layer)
        disturb(pool, layer, 1)
        with torch.no_grad():
            for key, parameter in pool.parameters(layer).items():
                if not key.startswith(f"{layer}."):
                    parameter.zero_()
        assert not torch.equal(logits(pool, layer), base), layer
        pool.remove(layer)


def test_each_name_answers_with_its_own_weights(pool) -> None:
    pool.add("a")
    disturb(pool, "a", 0)
    alone = logits(pool, "a")
    pool.add("b")
    disturb(pool, "b", 1)
    assert torch.equal(logits(pool, "a"), alone)
    assert not torch.allclose(logits(pool, "b"), alone, atol=1e-3)


def test_the_active_adapter_is_the_one_before_again_after_another_was_asked(pool) -> None:
    for name in ("a", "b"):
        pool.add(name)
        disturb(pool, name, ord(name))
    pool.train_only("a")
    mine = pool.model(input_ids=IDS).logits.detach()
    logits(pool, "b")
    with pytest.raises(ZeroDivisionError), pool.active(None):
        raise ZeroDivisionError
    assert torch.equal(pool.model(input_ids=IDS).logits, mine)
    assert torch.equal(logits(pool, "a"), mine)


def test_left_padding_and_the_cache_of_generation_change_nothing(pool) -> None:
    pool.add("a")
    disturb(pool, "a", 2)
    with pool.active("a") as model:
        options = {"max_new_tokens": 5, "min_new_tokens": 5}
        alone = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **options)
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS], dim=1)
        mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
        assert torch.equal(model.generate(input_ids=padded, attention_mask=mask, **options)[:, 3:], alone)
    slow = IDS
    for _ in range(5):
        slow = torch.cat([slow, logits(pool, "a", slow)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(slow, alone)


def test_a_copy_of_the_model_has_adapters_of_its_own(pool) -> None:
    pool.add("a")
    disturb(pool, "a", 3)
    expected = logits(pool, "a")
    with pool.active("a") as model:
        twin = copy.deepcopy(model)
        disturb(pool, "a", 4)
        with torch.no_grad():
            assert torch.equal(twin(input_ids=IDS).logits, expected)


# --- training


def test_only_the_chosen_adapter_trains_and_the_base_never_moves(pool) -> None:
    before = base_sha256(pool)
    for name in ("a", "b"):
        pool.add(name)
        disturb(pool, name, ord(name))
    hashes = {name: pool.sha256(name) for name in ("a", "b")}
    mine = pool.train_only("b")
    assert set(mine) == {name for name, value in pool.model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.SGD(mine.values(), lr=0.1)
    pool.model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in mine.values())
    optimizer.step()
    assert pool.sha256("a") == hashes["a"]
    assert pool.sha256("b") != hashes["b"]
    assert base_sha256(pool) == before


def test_gradients_come_through_a_bfloat16_base(make) -> None:
    pool = make(dtype="bfloat16")
    pool.add("a")
    disturb(pool, "a", 5)
    mine = pool.train_only("a")
    pool.model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(value.grad is not None and value.grad.dtype == torch.float32 for value in mine.values())
    assert all(value.grad is not None and value.grad.any() for value in mine.values())


def test_adapters_are_not_stacked(pool) -> None:
    pool.add("a")
    pool.add("b")
    with pytest.raises(UserError, match="only LoRA can"):
        pool.train_only("b", beneath=("a",))


# --- names, starts, removal


def test_a_new_adapter_can_start_from_another_and_is_then_apart(pool) -> None:
    pool.add("a")
    disturb(pool, "a", 1)
    pool.add("b", start="a")
    assert pool.sha256("a") == pool.sha256("b")
    disturb(pool, "b", 2)
    assert pool.sha256("a") != pool.sha256("b")


def test_the_start_depends_on_the_name_and_the_seed_and_nothing_before(make) -> None:
    hashes = []
    for before, seed in (([], 3), (["x", "y"], 3), ([], 4)):
        pool = make(seed=seed)
        for name in before:
            pool.add(name)
        torch.rand(7)
        pool.add("a")
        pool.add("b")
        hashes.append(pool.sha256("a"))
        assert pool.sha256("b") != hashes[-1]
    assert hashes[0] == hashes[1] != hashes[2]


def test_names_that_contain_each_other_have_dots_or_are_those_of_python_are_kept_apart(pool) -> None:
    names = ["qa", "qa_2", "qa.2", "update", "adapters", "group_qa"]
    for i, name in enumerate(names):
        pool.add(name)
        disturb(pool, name, i)
    assert pool.names == names
    assert len({pool.sha256(name) for name in names}) == len(names)
    everything = [key for name in names for key in pool.parameters(name)]
    assert len(everything) == len(set(everything))
    by_name = dict(pool.model.named_parameters())
    assert all(by_name[key] is value for name in names for key, value in pool.parameters(name).items())


def test_a_removed_adapter_is_gone_and_the_others_stay(pool) -> None:
    for name in ("a", "b"):
        pool.add(name)
        disturb(pool, name, ord(name))
    base, expected, numbers = logits(pool, None), logits(pool, "b"), sum(1 for _ in pool.model.parameters())
    pool.train_only("a")
    pool.remove("a")
    assert pool.names == ["b"]
    assert torch.equal(logits(pool, "b"), expected)
    assert torch.equal(pool.model(input_ids=IDS).logits, base)
    assert sum(1 for _ in pool.model.parameters()) == numbers - len(pool.parameters("b"))
    with pytest.raises(ValueError, match="no adapter 'a'"):
        pool.remove("a")


@pytest.mark.parametrize("call", ["parameters", "train_only", "sha256", "remove"])
def test_an_unknown_adapter_is_named(pool, call) -> None:
    pool.add("a")
    with pytest.raises(ValueError, match=r"no adapter 'x'; the pool has \['a'\]"):
        getattr(pool, call)("x")
    with pytest.raises(ValueError, match="no adapter 'x'"), pool.active("x"):
        pass


def test_a_name_is_taken_once_and_cannot_be_that_of_a_stack(pool) -> None:
    pool.add("a")
    with pytest.raises(ValueError, match="'a' exists already"):
        pool.add("a")
    with pytest.raises(UserError, match=r"adapter 'a\+b'"):
        pool.add("a+b")


# --- files


def test_what_is_saved_gives_the_same_logits_in_a_new_pool(make, tmp_path) -> None:
    pool, other = make(), make(seed=9)
    pool.add("a")
    disturb(pool, "a", 3)
    pool.save("a", tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["method.json", "weights.safetensors"]
    other.load("b", tmp_path / "a")
    assert other.names == ["b"]
    assert other.sha256("b") == pool.sha256("a")
    assert torch.equal(logits(other, "b"), logits(pool, "a"))
    disturb(other, "b", 4)
    other.load("b", tmp_path / "a")
    assert other.sha256("b") == pool.sha256("a")


def test_damaged_and_missing_files_are_named(pool, tmp_path) -> None:
    pool.add("a")
    pool.save("a", tmp_path)
    weights, settings = tmp_path / "weights.safetensors", tmp_path / "method.json"
    text, content = settings.read_text(), weights.read_bytes()
    for wrong in ("{", "[]", "{}"):
        settings.write_text(wrong)
        with pytest.raises(UserError, match=r"method\.json"):
            pool.load("a", tmp_path)
    settings.write_text(text)
    weights.write_bytes(content[:-8])
    with pytest.raises(UserError, match=r"weights\.safetensors: not a readable"):
        pool.load("a", tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"weights\.safetensors: missing"):
        pool.load("a", tmp_path)
    weights.write_bytes(content)
    settings.unlink()
    with pytest.raises(UserError, match=r"method\.json: missing"):
        pool.load("a", tmp_path)


def test_other_settings_and_other_shapes_are_refused(make, tmp_path) -> None:
    pool = make()
    pool.add("a")
    pool.save("a", tmp_path)
    path = tmp_path / "method.json"
    values = json.loads(path.read_text())
    name = values["settings"]["name"]
    other = make(**({"experts": 4} if name == "moelora" else {"bottleneck": 7}))
    with pytest.raises(UserError, match="was trained with"):
        other.load("a", tmp_path)
    assert other.names == []
    values["settings"] |= {"experts": 4} if name == "moelora" else {"bottleneck": 7}
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="do not fit this model"):
        other.load("a", tmp_path)


# --- which modules


TINY: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gpt2": (GPT2Config, GPT2LMHeadModel, {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64}),
    "opt": (
        OPTConfig,
        OPTForCausalLM,
        {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "num_hidden_layers": 3, "num_attention_heads": 2},
    ),
    "gpt_neox": (
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2},
    ),
    "gemma": (
        GemmaConfig,
        GemmaForCausalLM,
        {
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
        },
    ),
}
SUBLAYERS = {
    "gpt2": ("transformer.h", ("attn", "mlp")),
    "opt": ("model.decoder.layers", ("self_attn", "fc2")),
    "gpt_neox": ("gpt_neox.layers", ("attention", "mlp")),
    "gemma": ("model.layers", ("self_attn", "mlp")),
}


def tiny(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config, model, options = TINY[name]
    ends = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return model(config(**ends, **options)).eval().requires_grad_(False)


@pytest.mark.parametrize("name", sorted(TINY))
def test_attention_and_mlp_are_found_in_every_layer(name) -> None:
    path, kinds = SUBLAYERS[name]
    assert list(sublayers(tiny(name), name)) == [f"{path}.{i}.{kind}" for i in range(3) for kind in kinds]


def test_a_model_without_attention_and_mlp_is_refused_by_name() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4))
    with pytest.raises(UserError, match="model snake: attention and MLP"):
        sublayers(model, "snake")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", sorted(TINY))
def test_other_architectures_train_from_the_base_models_function(name, method) -> None:
    model = tiny(name)
    pool = make_pool(method, Backbone(name, model, None, ""))  # type: ignore[arg-type]
    base = logits(pool, None)
    pool.add("a")
    assert torch.equal(logits(pool, "a"), base)
    disturb(pool, "a", 0)
    assert not torch.allclose(logits(pool, "a"), base, atol=1e-3)
    mine = pool.train_only("a")
    pool.model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in mine.values())


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "down_proj"], ["self_attn.k_proj"], r".*\.1\.mlp\.(up|gate)_proj"]
)
def test_the_linear_layers_are_those_that_peft_finds(tiny_model, targets) -> None:
    model = load_backbone(str(tiny_model), dtype="float32").model
    mine = linear_layers(model, targets)
    shapes = {path: features(layer) for path, layer in mine.items()}
    lora = AdapterPool(model, {**LORA, "target_modules": targets}, "tiny")
    lora.add("a")
    theirs: dict[str, list[int]] = {}
    for key, parameter in lora.parameters("a").items():
        path = key.removeprefix("base_model.model.").split(".lora_")[0]
        theirs.setdefault(path, []).append(parameter.shape[1] if ".lora_A." in key else parameter.shape[0])
    assert list(mine) == list(theirs)
    assert {path: list(shape) for path, shape in shapes.items()} == theirs


def test_the_vocabulary_projection_is_left_out_and_conv1d_is_linear() -> None:
    found = linear_layers(tiny("gpt2"), "all-linear")
    assert [path.removeprefix("transformer.h.0.") for path in found][:4] == [
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    ]
    assert len(found) == 12
    assert features(found["transformer.h.0.attn.c_attn"]) == (16, 48)
    assert features(found["transformer.h.0.mlp.c_proj"]) == (64, 16)


def test_modules_that_are_not_linear_are_refused(tiny_model) -> None:
    model = load_backbone(str(tiny_model), dtype="float32").model
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp is a LlamaMLP, not a linear layer"):
        linear_layers(model, ["mlp"])
    with pytest.raises(UserError, match="has no module"):
        linear_layers(model, ["nothing_like_it"])


def test_a_lora_pool_is_still_what_methods_train_by_default(tiny_model) -> None:
    backbone = load_backbone(str(tiny_model), dtype="float32")
    assert isinstance(make_pool("lcia", backbone), AdapterPool)
    combined = build_method([("lcia", {}), ("moelora", {})]).make_pool(backbone, LORA, 0)
    assert isinstance(combined, ModulePool)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (["moelora", "adapter_cl"], "moelora and adapter_cl each train modules of their own"),
        (["moelora", "o_lora"], "o_lora works on the matrices of LoRA adapters"),
        (["pgp", "moelora"], "pgp works on the matrices of LoRA adapters"),
        (["lcia", "adapter_cl"], "two parts decide which adapter"),
    ],
)
def test_methods_that_do_not_go_together_are_refused(parts, message) -> None:
    with pytest.raises(UserError, match=message):
        build_method([(part, {}) for part in parts])
