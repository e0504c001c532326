"""What the rows of a batch share is computed once, and nothing else changes: against each row alone, in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
)

from lcia.backbone import answer_loss, collate, prefix
from lcia.backbone.chat import Encoded
from lcia.backbone.layout import DECODER_ONLY

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 49,
    "pad_token_id": 0,
}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, num_key_value_heads=2),
    "qwen2": Qwen2Config(**SHAPE, num_key_value_heads=2),
    "gpt2": GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=49, **NO_DROPOUT),
    "gpt_neox": GPTNeoXConfig(**SHAPE),
    "opt": OPTConfig(**SHAPE, ffn_dim=64, word_embed_proj_dim=32, dropout=0.0),
}
SHARED = tuple(range(1, 13))
ROWS = [
    Encoded((*SHARED, 20, 21, 22), (30, 49)),
    Encoded((*SHARED, 23), (31, 32, 33, 49)),
    Encoded((*SHARED, 24, 25, 26, 27, 28, 29, 20), (34, 49)),
]


def model_of(config: PretrainedConfig, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.generation_config.pad_token_id = 0
    return model


def outspoken(config: PretrainedConfig) -> Any:
    """With weights so large that an answer depends on all of its prompt: small ones give every prompt the same."""
    model = model_of(config).eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.mul_(8)
    return model


def gradients(model: Any) -> list[torch.Tensor]:
    return [weights.grad for weights in model.parameters() if weights.grad is not None]


@pytest.mark.parametrize("name", CONFIGS)
def test_eager_and_fused_attention_learn_the_same(name: str) -> None:
    """Which of them is taken is a matter of speed."""
    found = []
    for attention in ("eager", "sdpa"):
        model = model_of(CONFIGS[name], attention)
        loss = answer_loss(model, collate(ROWS, pad_id=0), 9)
        loss.backward()
        found.append([loss, *gradients(model)])
    for eager, fused in zip(*found, strict=True):
        torch.testing.assert_close(eager, fused, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_answers_are_those_of_the_prompts_one_by_one(name: str) -> None:
    model = outspoken(CONFIGS[name])
    prompts = [row.prompt for row in ROWS]
    batch = collate([Encoded(prompt, ()) for prompt in prompts], pad_id=0)
    cache = prefix.of_batch(model, batch)
    assert cache is not None
    assert cache.get_seq_length() == len(SHARED)
    together = DECODER_ONLY.generate(model, batch, 6)
    for prompt, found in zip(prompts, together, strict=True):
        alone = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=6)
        expected = alone[0, len(prompt) :].tolist()
        assert found.tolist()[: len(expected)] == expected
    turned = [(*reversed(SHARED), *prompt[len(SHARED) :]) for prompt in prompts]
    others = DECODER_ONLY.generate(model, collate([Encoded(prompt, ()) for prompt in turned], pad_id=0), 6)
    assert others.tolist() != together.tolist()  # what is shared matters
    assert len({tuple(answer) for answer in together.tolist()}) == len(prompts)  # and what is not


@pytest.mark.parametrize("start", [0, len(SHARED)])
@pytest.mark.parametrize("name", CONFIGS)
def test_prompts_of_like_length_are_passed_together(name: str, start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against each prompt alone; one of them is nothing but its last token behind what all begin with."""
    monkeypatch.setattr(prefix, "LEAST_ON_CPU", 1)
    model = outspoken(CONFIGS[name])
    lengths, passes = (3, 1, 7, 3, 9, 2), []
    prompts = [(*SHARED[:start], *range(20, 20 + length)) for length in lengths]
    batch = collate([Encoded(prompt, ()) for prompt in prompts], pad_id=0)
    handle = model.register_forward_pre_hook(
        lambda module, args, given: passes.append(given["input_ids"].shape), with_kwargs=True
    )
    together = DECODER_ONLY.generate(model, batch, 6)
    handle.remove()
    own = 9 - 1 + start if start == 0 else 9 - 1
    assert sum(rows * length for rows, length in passes if length > 1) < len(prompts) * own
    for prompt, found in zip(prompts, together, strict=True):
        alone = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=6)
        expected = alone[0, len(prompt) :].tolist()
        assert found.tolist()[: len(expected)] == expected


def test_rows_with_weights_of_their_own_are_passed_in_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever told the model the queries of all rows does not hear of parts."""
    monkeypatch.setattr(prefix, "LEAST_ON_CPU", 1)
    monkeypatch.setattr(prefix, "of_prompts", lambda *_: pytest.fail("cut into parts"))
    model = model_of(CONFIGS["llama"]).eval()
    batch = collate([Encoded((20, 21), ()), Encoded((*SHARED, 22), ())], pad_id=0)
    assert DECODER_ONLY.generate(model, {**batch, "query": torch.zeros(2, 3)}, 2).shape[0] == 2


def test_keys_that_follow_the_longest_position_of_a_pass_are_not_gone_on_from() -> None:
    plain = {"rope_type": "default", "rope_theta": 1e4}
    for kind, goes_on in (("default", True), ("dynamic", False)):
        rope = {**plain, "rope_type": kind, **({} if goes_on else {"factor": 2.0})}
        model = model_of(LlamaConfig(**SHAPE, num_key_value_heads=2, rope_parameters=rope))
        assert prefix.sees_all_before(model) == goes_on


@given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=20), least=st.integers(1, 60))
def test_every_cut_saves_enough_and_none_is_left_out(lengths: list[int], least: int) -> None:
    parts = prefix._of_like_length(lengths, least)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    assert [lengths[row] for part in parts for row in part] == sorted(lengths)
    padded = len(lengths) * max(lengths)
    assert padded - sum(len(part) * max(lengths[row] for row in part) for part in parts) >= (len(parts) - 1) * least
    for part in parts:  # no other cut would
        own = [lengths[row] for row in part]
        assert all(place * (own[-1] - own[place - 1]) < least for place in range(1, len(own)))


def test_nothing_is_shared_where_it_would_change_something_or_save_nothing() -> None:
    batch = collate(ROWS, pad_id=0)
    window = model_of(MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=4))
    assert prefix.of_batch(window, batch) is None
    plain = model_of(CONFIGS["llama"])
    assert prefix.of_batch(plain, collate(ROWS[:1], pad_id=0)) is None
    assert prefix.of_batch(plain, collate([Encoded((5, *row.prompt), row.answer) for row in ROWS], 0)) is not None
    assert prefix.of_batch(plain, collate([ROWS[0], Encoded((40, 41), (42,))], pad_id=0)) is None
    assert prefix.of_batch(plain, {**batch, "query": torch.zeros(3, 3)}) is None


def test_prompts_that_are_all_the_same_keep_their_last_token() -> None:
    model = model_of(CONFIGS["llama"]).eval()
    batch = collate([Encoded(SHARED, ())] * 2, pad_id=0)
    cache = prefix.of_batch(model, batch)
    assert cache is not None
    assert cache.get_seq_length() == len(SHARED) - 1
    assert DECODER_ONLY.generate(model, batch, 3).shape == (2, 3)


def test_the_vocabulary_matrix_is_not_copied_once_per_row() -> None:
    """A slice of the hidden states made torch copy it: half of a step of SmolLM2, and 2 GB for 40 prompts."""
    model = model_of(CONFIGS["llama"], attention="eager")  # whose products show that the profiler looks
    model.requires_grad_(False)  # as a base model is: a matrix that is trained is never copied
    model.model.layers[0].self_attn.q_proj.requires_grad_(True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        answer_loss(model, collate(ROWS, pad_id=0), 8).backward()
        with torch.no_grad():
            DECODER_ONLY.generate(model, collate(ROWS, pad_id=0), 2)
    batched = [event.input_shapes for event in profile.events() if event.name == "aten::bmm"]
    assert batched
    assert not [shapes for shapes in batched if any(50 in shape for shape in shapes)]
