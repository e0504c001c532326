"""MoELoRA: the module against its equation, one expert against plain LoRA, and whole runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lcia import training
from lcia.adapters import AdapterPool
from lcia.adapters.experts import LoraExperts
from lcia.backbone import load_backbone
from lcia.errors import UserError
from lcia.methods import build_method
from lcia.progress import Reporter
from lcia.run import resume, train
from lcia.run_folder import RunFolder

IDS = torch.arange(5, 25)[None]


def measure(config: Any) -> dict[str, Any]:
    with Reporter() as reporter:
        return train(config, reporter)


def filled(module: torch.nn.Module, seed: int) -> Any:
    """Every parameter drawn from a normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


# --- the equation


def plain_mixture(module: LoraExperts, w0: torch.Tensor, x: list[float], scale: float) -> list[float]:
    """W₀x + s Σ_i softmax(Rx)_i B_i A_i x of one token, one number at a time, in float64."""
    R, A, B = (tensor.double().tolist() for tensor in (module.router, module.A, module.B))
    experts, rank = len(R), len(A) // len(R)

    def dot(a: list[float], b: list[float]) -> float:
        return sum(p * q for p, q in zip(a, b, strict=True))

    weights = [math.exp(dot(row, x)) for row in R]
    total = [dot(row, x) for row in w0.double().tolist()]
    for i in range(experts):
        share = weights[i] / sum(weights)
        inner = [dot(A[i * rank + k], x) for k in range(rank)]
        for out, row in enumerate(B):
            total[out] += scale * share * dot(row[i * rank : (i + 1) * rank], inner)
    return total


def test_the_mixture_equals_plain_loops_token_by_token() -> None:
    module = filled(LoraExperts(5, 4, experts=3, rank=2, scale=0.7), seed=0)
    generator = torch.Generator().manual_seed(1)
    w0 = torch.randn(4, 5, generator=generator)
    x = torch.randn(2, 3, 5, generator=generator)
    found = module(x @ w0.T, x)  # (2, 3, 4)
    for row in range(2):
        for token in range(3):
            expected = plain_mixture(module, w0, x[row, token].double().tolist(), 0.7)
            assert found[row, token].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("chosen", range(4))
def test_a_one_hot_router_is_that_experts_lora_exactly(chosen) -> None:
    """Small whole numbers: every sum is exact, in whatever order it is taken. Other experts' shares underflow to 0."""
    module = LoraExperts(6, 5, experts=4, rank=3, scale=2.0)
    generator = torch.Generator().manual_seed(2)
    whole = {name: torch.randint(-4, 5, p.shape, generator=generator).float() for name, p in module.named_parameters()}
    w0 = torch.randint(-4, 5, (5, 6), generator=generator).float()
    x = torch.randint(-4, 5, (2, 7, 6), generator=generator).float()
    x[..., 0] = 1.0
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(whole[name])
        module.router[:, 0] += torch.where(torch.arange(4) == chosen, 1000.0, 0.0)
    a, b = whole["A"][3 * chosen : 3 * chosen + 3], whole["B"][:, 3 * chosen : 3 * chosen + 3]
    assert torch.equal(module(x @ w0.T, x), x @ w0.T + 2.0 * (x @ a.T @ b.T))


def test_tokens_are_routed_one_by_one() -> None:
    module = filled(LoraExperts(5, 4, experts=3, rank=2, scale=0.7), seed=3)
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(4))
    together = module(torch.zeros(2, 3, 4), x)
    apart = torch.stack([torch.stack([module(torch.zeros(4), x[i, j]) for j in range(3)]) for i in range(2)])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


def test_a_new_mixture_adds_nothing_and_its_router_and_a_are_within_their_bounds() -> None:
    torch.manual_seed(0)
    module = LoraExperts(16, 8, experts=4, rank=2, scale=2.0).requires_grad_(False)
    x, output = torch.randn(3, 16), torch.randn(3, 8)
    assert torch.equal(module(output, x), output)
    assert not module.B.any()
    for start in (module.router, module.A):
        assert 0.9 * 0.25 < start.abs().max() <= 0.25  # 1 / √16
        assert start.std() == pytest.approx(0.25 / math.sqrt(3), rel=0.2)  # of a uniform distribution


def test_dropout_is_of_training_alone_and_leaves_the_router_alone() -> None:
    module = filled(LoraExperts(64, 8, experts=2, rank=2, scale=2.0, dropout=0.5), seed=5)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(6))
    output = torch.zeros(3, 8)
    module.eval()
    assert torch.equal(module(output, x), module(output, x))
    module.train()
    assert not torch.equal(module(output, x), module(output, x))
    with torch.no_grad():  # where the inner values are those of dropout alone, they are 0 or twice what they were
        module.A.copy_(torch.eye(4, 64))
        module.B.copy_(torch.eye(8, 4))
        share = torch.softmax(x @ module.router.T, dim=-1).repeat_interleave(2, dim=-1)  # (3, E r)
        kept = module(output, x)[:, :4] / (2.0 * share * x[:, :4])
    assert all(min(abs(value), abs(value - 2.0)) < 1e-4 for value in kept.flatten().tolist())


def test_bfloat16_inputs_are_computed_in_float32() -> None:
    module = filled(LoraExperts(6, 5, experts=2, rank=2, scale=1.0), seed=7)
    x, output = torch.randn(4, 6).bfloat16(), torch.randn(4, 5).bfloat16()
    found = module(output, x)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, module(output.float(), x.float()).bfloat16())


# --- beside plain LoRA


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_one_expert_is_plain_lora_of_peft(tiny_model, targets) -> None:
    lora = {"r": 4, "lora_alpha": 12.0, "lora_dropout": 0.0, "target_modules": targets}
    plain = AdapterPool(load_backbone(str(tiny_model), dtype="float32").model, lora, "tiny")
    plain.add("a")
    mixture = build_method([("moelora", {"experts": 1})]).make_pool(
        load_backbone(str(tiny_model), dtype="float32"), lora, 0
    )
    mixture.add("a")
    generator = torch.Generator().manual_seed(0)
    theirs = {key.removeprefix("base_model.model."): value for key, value in plain.parameters("a").items()}
    with torch.no_grad():
        for key, value in mixture.parameters("a").items():
            layer, _, own = key.partition(".adapters.group_a.")
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
            if own in ("A", "B"):
                theirs.pop(f"{layer}.lora_{own}.group_a.weight").copy_(value)
        assert theirs == {}
        with plain.active("a") as model:
            expected = model(input_ids=IDS).logits
        with mixture.active("a") as model:
            found = model(input_ids=IDS).logits
        with mixture.active(None) as model:
            base = model(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - base).norm() > 1000 * (found - expected).norm()


# --- options


@pytest.mark.parametrize("value", [0, -1, 2.0, "2", True, None])
def test_a_bad_number_of_experts_is_refused_by_name(value) -> None:
    with pytest.raises(UserError, match="moelora: experts must be a whole number from 1"):
        build_method([("moelora", {"experts": value})])


def test_a_rank_that_cannot_be_shared_is_refused_before_the_run_begins(tiny_config) -> None:
    config = tiny_config(method={"name": "moelora", "experts": 3})
    with pytest.raises(UserError, match="key 'lora_r': 4 cannot be shared by the 3 experts"):
        measure(config)
    assert not Path(config.output_dir).exists()


# --- whole runs


def test_one_adapter_is_trained_task_after_task(tiny_config) -> None:
    config = tiny_config(method="moelora", lora_alpha=6)
    results = measure(config)
    folder = Path(config.output_dir)
    assert set(results["groups"].values()) == {"shared"}
    hashes = [record["sha256"]["shared"] for record in RunFolder(folder).records("stage_learned")]
    assert len(set(hashes)) == 3
    weights = load_file(folder / "pool" / "shared" / "weights.safetensors")
    layers = {key.rpartition(".")[0] for key in weights}
    assert len(layers) == 14
    first = "model.layers.0.self_attn.q_proj"
    shapes = {key.removeprefix(f"{first}."): list(value.shape) for key, value in weights.items() if first in key}
    assert shapes == {"router": [2, 32], "A": [4, 32], "B": [32, 4]}
    assert all(weights[f"{layer}.B"].any() for layer in layers)
    assert results["cost"]["trained_parameters"] == sum(value.numel() for value in weights.values())
    settings = json.loads((folder / "pool" / "shared" / "method.json").read_text())
    assert settings == {
        "base_model": config.model,
        "settings": {
            "name": "moelora",
            "experts": 2,
            "r": 4,
            "lora_alpha": 6.0,
            "lora_dropout": 0.0,
            "target_modules": "all-linear",
        },
    }
    card = (folder / "pool" / "shared" / "README.md").read_text()
    assert "library_name: lcia" in card
    assert "Mixture of 2 LoRA experts" in card


def test_the_router_and_every_expert_learn(tiny_config, tmp_path) -> None:
    """Against the start, which depends on seed and name alone: B from its first step on, A and the router after it."""
    config = tiny_config(method="moelora", tasks=["colours"])
    measure(config)
    backbone = load_backbone(config.model, dtype="float32")
    lora = {"r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "target_modules": "all-linear"}
    pool = build_method([("moelora", {})]).make_pool(backbone, lora, config.seed)
    pool.add("shared")
    start = {key.replace(".adapters.group_shared", ""): value for key, value in pool.parameters("shared").items()}
    end = load_file(Path(config.output_dir) / "pool" / "shared" / "weights.safetensors")
    assert start.keys() == end.keys()
    for key, value in end.items():
        moved = (value - start[key]).abs()
        assert moved.any(), key
        if not key.endswith("router"):
            rank_axis = 0 if key.endswith("A") else 1
            assert all(part.any() for part in moved.chunk(2, dim=rank_axis)), key


def test_grouping_decides_which_mixture_learns_a_task(tiny_config) -> None:
    config = tiny_config(method=["lcia", "moelora"])
    results = measure(config)
    assert results["groups"] == {"colours": "colours", "animals": "animals", "paints": "colours"}
    assert results["ema"]["retained_mass"]["paints"] == pytest.approx(0.3, rel=1e-3)
    pool = Path(config.output_dir) / "pool"
    assert sorted(path.name for path in pool.iterdir()) == ["animals", "colours"]
    assert all((path / "weights.safetensors").is_file() for path in pool.iterdir())


class Killed(Exception):
    """Stands for the process dying at this very call."""


def test_a_task_goes_on_behind_its_last_checkpoint_to_the_same_bits(tiny_config, tmp_path, monkeypatch) -> None:
    """With dropout: what it drops behind the checkpoint must be what it would have dropped."""
    options = {"method": "moelora", "lora_dropout": 0.2, "max_steps": 4, "save_steps": 2}
    options["tasks"] = ["colours", "animals"]
    whole = measure(tiny_config(**options, output_dir=str(tmp_path / "whole")))
    on_step_end, taken = training._Moments.on_step_end, 0

    def dying(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 7:
            raise Killed
        return on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(training._Moments, "on_step_end", dying)
    with pytest.raises(Killed):
        measure(tiny_config(**options, output_dir=str(tmp_path / "cut")))
    assert [path.name for path in (tmp_path / "cut" / "state").iterdir()] == ["checkpoint-2"]
    with Reporter() as reporter:
        resumed = resume(tmp_path / "cut", reporter)
    hashes = [[r["sha256"] for r in RunFolder(tmp_path / run).records("stage_learned")] for run in ("whole", "cut")]
    assert hashes[0] == hashes[1]
    assert resumed["matrix"] == whole["matrix"]
