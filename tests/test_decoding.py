"""Greedy answers of a batch are those of its prompts one by one, in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MistralConfig, PretrainedConfig

from lcia.backbone import answer_loss, collate, packing
from lcia.backbone.chat import Encoded
from lcia.backbone.layout import DECODER_ONLY
from test_packing import CONFIGS, LATENT, ROWS, SHAPE, SHARED, model_of, rounded

NEW = 6
PROMPTS = [row.prompt for row in ROWS]


def outspoken(config: PretrainedConfig, attention: str = "sdpa") -> Any:
    """With weights so large that an answer depends on all of its prompt: small ones give every prompt the same."""
    model = model_of(config, attention).eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.mul_(8)
    return model


def one_by_one(model: Any, prompts: list[tuple[int, ...]], new: int = NEW) -> list[list[int]]:
    """By transformers alone, ended ones filled with the padding token 0."""
    answers = []
    for prompt in prompts:
        mask = torch.ones(1, len(prompt), dtype=torch.long)
        found = model.generate(torch.tensor([prompt]), attention_mask=mask, max_new_tokens=new)[0, len(prompt) :]
        answers.append([*found.tolist(), *[0] * (new - len(found))])
    return answers


def together(model: Any, prompts: list[tuple[int, ...]], new: int = NEW) -> list[list[int]]:
    batch = collate([Encoded(prompt, ()) for prompt in prompts], pad_id=0)
    found = DECODER_ONLY.generate(model, batch, new)
    return [[*row, *[0] * (new - len(row))] for row in found.tolist()]


@contextmanager
def passes(model: Any) -> Iterator[list[tuple[int, int]]]:
    """The shapes of the tokens that pass through the model."""
    shapes: list[tuple[int, int]] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    handle.remove()


def test_latent_keys_and_values_are_laid_out() -> None:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values of unlike sizes."""
    model = outspoken(LATENT)
    answers = together(model, PROMPTS)
    assert answers == one_by_one(model, PROMPTS)
    assert len({tuple(answer) for answer in answers}) == len(PROMPTS)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
def test_answers_are_those_of_the_prompts_one_by_one(name: str, attention: str) -> None:
    model = outspoken(CONFIGS[name], attention)
    with passes(model) as shapes:
        answers = together(model, PROMPTS)
    assert shapes[0] == (1, rounded(len(SHARED) + sum(len(prompt) - len(SHARED) for prompt in PROMPTS)))
    assert answers == one_by_one(model, PROMPTS)
    turned = [(*reversed(SHARED), *prompt[len(SHARED) :]) for prompt in PROMPTS]
    assert together(model, turned) != answers  # what is shared matters
    assert len({tuple(answer) for answer in answers}) == len(PROMPTS)  # and what is not


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_that_has_ended_leaves_the_batch(name: str) -> None:
    model = outspoken(CONFIGS[name])
    free = one_by_one(model, PROMPTS)
    model.generation_config.eos_token_id = [free[0][1], free[2][3]]  # the first ends at its second, ...
    expected = one_by_one(model, PROMPTS)
    lengths = [
        1 + next((i for i, t in enumerate(row) if t in model.generation_config.eos_token_id), NEW - 1) for row in free
    ]
    assert len(set(lengths)) > 1
    with passes(model) as shapes:
        assert together(model, PROMPTS) == expected
    assert shapes[1:] == [(sum(length > step for length in lengths), 1) for step in range(1, max(lengths))]


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(1, 48), min_size=1, max_size=9), min_size=2, max_size=6),
    start=st.integers(0, 9),
    ends=st.lists(st.integers(1, 49), max_size=12),
    cuts=st.booleans(),
)
def test_any_prompts_have_the_answers_of_each_alone(
    prompts: list[list[int]], start: int, ends: list[int], cuts: bool
) -> None:
    model = outspoken(CONFIGS["llama"])
    model.generation_config.eos_token_id = ends or None
    asked = [(*SHARED[:start], *prompt) for prompt in prompts]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packing, "LEAST_PAIRS", 1 if cuts else 2**20)
        assert together(model, asked) == one_by_one(model, asked)


def test_a_model_that_cannot_be_given_a_line_answers_as_transformers_does() -> None:
    window = outspoken(MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=4))
    with passes(window) as shapes:
        assert together(window, PROMPTS) == one_by_one(window, PROMPTS)
    assert shapes[0][0] == len(PROMPTS)


def test_what_is_not_passed_in_one_line() -> None:
    model = model_of(CONFIGS["llama"]).eval()
    batch = collate([Encoded(prompt, ()) for prompt in PROMPTS], pad_id=0)
    assert packing.of_prompts(model, batch) is not None
    assert packing.of_prompts(model, {**batch, "query": torch.zeros(3, 3)}) is None  # rows with weights of their own
    assert packing.of_prompts(model, collate([Encoded(PROMPTS[0], ())], pad_id=0)) is None
    assert packing.of_prompts(model, collate([Encoded((), ()), Encoded((3, 4), ())], pad_id=0)) is None


def test_a_line_is_not_filled_with_tokens_of_images() -> None:
    """They would be more than its images have parts."""
    model, batch = model_of(CONFIGS["llama"]).eval(), collate([Encoded(prompt, ()) for prompt in PROMPTS], pad_id=0)
    tokens = len(SHARED) + sum(len(prompt) - len(SHARED) for prompt in PROMPTS)
    for image_token, length in ((PROMPTS[-1][-1], tokens), (48, rounded(tokens))):
        packed = packing.of_prompts(model, batch, image_token)
        assert packed is not None
        assert len(packed.places) == length


def test_prompts_that_are_all_the_same_keep_their_last_token() -> None:
    model = outspoken(CONFIGS["llama"])
    batch = collate([Encoded(SHARED, ())] * 2, pad_id=0)
    packed = packing.of_prompts(model, batch)
    assert packed is not None
    assert packed.shared == len(SHARED) - 1
    assert together(model, [SHARED] * 2) == one_by_one(model, [SHARED] * 2)


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
