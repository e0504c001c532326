"""A batch in one line has the loss and gradients of its rows, one by one, in fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    DeepseekV3Config,
    DogeConfig,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertDecoderConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
)

from lcia.adapters.experts import LoraExperts
from lcia.backbone import answer_loss, collate, packing
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
LATENT = DeepseekV3Config(  # keys and values of unlike sizes
    **SHAPE,
    num_key_value_heads=4,
    kv_lora_rank=8,
    q_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=6,
    first_k_dense_replace=2,
)
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


TOKENS = sum(len(row.answer) for row in ROWS)
OWN = sum(len(row) - 1 - len(SHARED) for row in ROWS)  # of a row's last token nothing is asked


def gradients(model: Any) -> list[torch.Tensor]:
    return [weights.grad for weights in model.parameters() if weights.grad is not None]


def rounded(tokens: int) -> int:
    return tokens + -tokens % packing.LINE_STEP


def alone(model: Any, rows: list[Encoded]) -> tuple[float, list[torch.Tensor]]:
    """No padding, nothing shared, all logits: the definition."""
    model.zero_grad()
    loss = 0.0
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.answer]])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(row.prompt) - 1 : -1]
        part = cross_entropy(logits, torch.tensor(row.answer), reduction="sum") / TOKENS
        part.backward()
        loss += part.item()
    return loss, [gradient.clone() for gradient in gradients(model)]


@pytest.mark.parametrize("cuts", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradients_are_those_of_the_rows_one_by_one(
    name: str, attention: str, cuts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cuts:  # each row of another length in a part of its own
        monkeypatch.setattr(packing, "LEAST_PAIRS", 1)
    model = model_of(CONFIGS[name], attention)
    batch = collate(ROWS, pad_id=0)
    passed: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, given: passed.append(given["input_ids"].numel()), with_kwargs=True
    )
    loss = answer_loss(model, batch, TOKENS)
    handle.remove()
    loss.backward()
    assert passed == [rounded(len(SHARED) + OWN)]
    assert model.config._attn_implementation == attention  # as before
    together = [gradient.clone() for gradient in gradients(model)]
    expected, right = alone(model, ROWS)
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    for mine, plain in zip(together, right, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        LATENT,
        GptOssConfig(  # sinks
            **SHAPE,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=2,
            num_experts_per_tok=1,
            layer_types=["full_attention"] * 2,
            sliding_window=64,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
    ],
)
def test_kinds_of_attention_stay_what_they_are(config: PretrainedConfig) -> None:
    model, batch = model_of(config, "eager").eval(), collate(ROWS, pad_id=0)
    assert packing.of_batch(model, batch) is not None
    loss = answer_loss(model, batch, TOKENS).item()
    assert loss == pytest.approx(alone(model, ROWS)[0], rel=1e-5)


def test_under_autocast_a_line_is_what_its_rows_are() -> None:
    for attention in ("eager", "sdpa"):
        model = model_of(CONFIGS["llama"], attention)
        with torch.autocast("cpu", torch.bfloat16):
            loss = answer_loss(model, collate(ROWS, pad_id=0), TOKENS)
        assert loss.item() == pytest.approx(alone(model, ROWS)[0], rel=1e-2)


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


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.lists(st.integers(1, 3), min_size=1, max_size=9), st.lists(st.integers(1, 9), min_size=1)),
        min_size=2,
        max_size=4,
    ),
    start=st.integers(0, 9),
)
def test_any_batch_has_the_logits_of_its_padded_rows(rows: list[tuple[list[int], list[int]]], start: int) -> None:
    model = model_of(CONFIGS["llama"])
    encoded = [Encoded((*SHARED[:start], *prompt), tuple(answer[:9])) for prompt, answer in rows]
    batch = collate(encoded, pad_id=0)
    logits, targets = DECODER_ONLY.answer_logits(model, batch)
    full = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}).logits
    labels = batch["labels"][:, 1:]
    expected = full[:, -labels.shape[1] - 1 : -1][labels >= 0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert targets.tolist() == labels[labels >= 0].tolist()


def test_answers_between_which_nothing_is_learned_are_those_of_the_rows() -> None:
    """A conversation: what the user says between two answers has no label."""
    rows = [Encoded((*SHARED, 20), (30, 31, 32, 33), unlearned=(1, 2)), *ROWS]
    model = model_of(CONFIGS["llama"])
    batch = collate(rows, pad_id=0)
    assert packing.of_batch(model, batch) is not None
    logits, targets = DECODER_ONLY.answer_logits(model, batch)
    parts = [DECODER_ONLY.answer_logits(model, collate([row], pad_id=0)) for row in rows]
    torch.testing.assert_close(logits, torch.cat([part for part, _ in parts]), rtol=1e-4, atol=1e-5)
    assert targets.tolist() == torch.cat([part for _, part in parts]).tolist()
    assert len(targets) == TOKENS + 2


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=4),  # a token does not see all before it
        LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4),  # attention of its own
        BertConfig(**{**SHAPE, "bos_token_id": 1}),  # an encoder: a token sees those behind it
        DogeConfig(**SHAPE, num_key_value_heads=2),  # its layers hide keys, too
        ModernBertDecoderConfig(
            **{**SHAPE, "bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 2}, layer_types=["full_attention"] * 2
        ),
    ],
)
def test_a_model_whose_attention_cannot_be_laid_out_is_given_rows(config: PretrainedConfig) -> None:
    model, batch = model_of(config, "eager"), collate(ROWS, pad_id=0)
    assert packing.of_batch(model, batch) is None
    logits, _ = DECODER_ONLY.answer_logits(model, batch)
    assert len(logits) == TOKENS


def test_keys_that_follow_the_longest_position_of_a_pass_are_not_gone_on_from() -> None:
    plain = {"rope_type": "default", "rope_theta": 1e4}
    for kind, goes_on in (("default", True), ("dynamic", False)):
        rope = {**plain, "rope_type": kind, **({} if goes_on else {"factor": 2.0})}
        model = model_of(LlamaConfig(**SHAPE, num_key_value_heads=2, rope_parameters=rope))
        assert packing.sees_all_before(model) == goes_on


def test_layers_that_are_computed_again_are_given_rows() -> None:
    batch = collate(ROWS, pad_id=0)
    model = model_of(CONFIGS["llama"]).train()
    assert packing.of_batch(model, batch) is not None
    model.activation_checkpointing_enable()
    assert packing.of_batch(model, batch) is None
    assert packing.of_batch(model.eval(), batch) is not None
    model = model_of(CONFIGS["llama"]).train()
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])  # as accelerate has it for FSDP2
    assert packing.of_batch(model, batch) is None


def test_where_something_is_random_each_row_draws_for_itself() -> None:
    """Nothing is shared, and padding is left out all the same."""
    batch = collate(ROWS, pad_id=0)
    random = model_of(LlamaConfig(**SHAPE, attention_dropout=0.1))
    # of the adapters, wherever they stand: PEFT's, and the experts of moelora
    models = [random]
    for dropping in (torch.nn.Dropout(0.1), LoraExperts(4, 4, experts=2, rank=1, scale=1.0, dropout=0.1)):
        models.append(model_of(CONFIGS["llama"]))
        models[-1].adapter = dropping
    for model in models:
        packed = packing.of_batch(model.train(), batch)
        assert packed is not None
        assert (packed.shared, len(packed.places)) == (0, rounded(sum(len(row) - 1 for row in ROWS)))
        packed = packing.of_batch(model.eval(), batch)
        assert packed is not None
        assert packed.shared == len(SHARED)
    # the dropout of a layer is asked once for the line: all rows' attention weights, and no others
    answer_loss(random.train(), batch, TOKENS).backward()
    assert all(torch.isfinite(gradient).all() for gradient in gradients(random))


@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=20), shared=st.integers(0, 20), least=st.integers(1, 999)
)
def test_every_cut_saves_enough_and_none_is_left_out(lengths: list[int], shared: int, least: int) -> None:
    def pairs(width: int) -> int:
        return width * (shared + width)

    parts = packing.of_like_length(lengths, shared, least)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    if len(parts) > 1:
        assert [lengths[row] for part in parts for row in part] == sorted(lengths)
    spent = sum(len(part) * pairs(max(lengths[row] for row in part)) for part in parts)
    assert len(lengths) * pairs(max(lengths)) - spent >= (len(parts) - 1) * least
    for part in parts:  # no other cut would
        own = sorted(lengths[row] for row in part)
        assert all(place * (pairs(own[-1]) - pairs(own[place - 1])) < least for place in range(1, len(own)))


def test_batches_of_which_little_would_be_saved_stay_as_they_are() -> None:
    model = model_of(CONFIGS["llama"])
    assert packing.of_batch(model, collate(ROWS[:1], pad_id=0)) is None
    even = [Encoded((first, *range(2, 30)), (31, 49)) for first in range(5)]
    assert packing.of_batch(model, collate(even, pad_id=0)) is None
    uneven = [*even, Encoded((40, 41), (42,))]
    packed = packing.of_batch(model, collate(uneven, pad_id=0))
    assert packed is not None
    assert (packed.shared, packed.parts[0].width, len(packed.places)) == (0, 32, rounded(5 * 30 + 2))
    asked = {**collate(uneven, pad_id=0), "query": torch.zeros(6, 3)}  # rows may have weights of their own
    assert packing.of_batch(model, asked) is None


def test_a_prompt_without_a_token_stays_in_its_own_row() -> None:
    """Its first answer token is predicted by nothing, and by no other row."""
    model = model_of(CONFIGS["llama"])
    rows = [Encoded((20, 21, 22, 23), (30, 31)), Encoded((), (32, 33, 34))]
    logits, _ = DECODER_ONLY.answer_logits(model, collate(rows, pad_id=0))
    others = [Encoded((24, 25, 26, 27), (40, 41)), rows[1]]
    again, _ = DECODER_ONLY.answer_logits(model, collate(others, pad_id=0))
    torch.testing.assert_close(logits[2:], again[2:])


def test_noise_in_embeddings_is_that_of_rows() -> None:
    model, batch = model_of(CONFIGS["llama"]), collate(ROWS, pad_id=0)
    model.get_input_embeddings().neftune_noise_alpha = 5.0  # as transformers' Trainer does
    assert packing.of_batch(model.train(), batch) is None
    assert packing.of_batch(model.eval(), batch) is not None
