"""Requests of several groups answered together: each as if it had come alone, whatever the adapters are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lcia.adapters import Pool, find_projector
from lcia.adapters.increments import IncrementPool
from lcia.backbone import Backbone, Encoded, load_backbone
from lcia.evaluation import Decoding, generate_answers
from lcia.methods import build_method
from lcia.stream import Row, load_stream
from tiny_vision import square_stream, tiny_llava

LORA = {
    "r": 4,
    "lora_alpha": 8.0,
    "lora_dropout": 0.0,
    "target_modules": ["q_proj", "v_proj", "up_proj", "q", "v", "wi"],
}
OPTIONS: dict[str, dict[str, Any]] = {"adapter_cl": {"bottleneck": 4}, "continual_llava": {"slots": 3, "chosen": 2}}
TEXTS = (
    "Name the colour",
    "Which animal is it",
    "a",
    "a much longer request, so that there is padding",
    "why",
    "two\nlines",
)
ONE_BY_ONE = ["a", None, "b", "b", "a", None]
STACKS = ["a", "a+b", None, "b", "a+b", "a"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_t5: Path) -> dict[str, Path]:
    return {"llama": tiny_model, "t5": tiny_t5, "llava": tiny_llava(tmp_path_factory.mktemp("llava"))}


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """Two tasks, with and without an image."""
    stream = load_stream(str(square_stream(tmp_path_factory.mktemp("squares"))))
    return [*stream[0].test[:3], *stream[1].train[:3]]


def texts() -> list[Row]:
    return [Row(str(i), text, (("user", text),), ()) for i, text in enumerate(TEXTS)]


def filled(method: str, backbone: Backbone) -> Pool:
    """A pool of two adapters that all do something."""
    pool = build_method([(method, OPTIONS.get(method, {}))]).make_pool(backbone, dict(LORA), 0)
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        pool.add(name)
        with torch.no_grad():
            for parameter in pool.parameters(name).values():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
            if isinstance(pool, IncrementPool):
                pool.choice(name).used.copy_(torch.rand(3, generator=generator))
    return pool


def query(row: Encoded) -> np.ndarray[Any, Any]:
    """A vector for any text, as wide as those of the sentence encoder."""
    return np.random.default_rng(sum(map(ord, row.instruction))).normal(size=384).astype(np.float32)


def _write_text(backbone: Backbone) -> None:
    """Tokens without text get no logits: random models would write nothing else."""
    with torch.no_grad():
        backbone.model.get_output_embeddings().weight[backbone.tokenizer.all_special_ids] = 0


@pytest.mark.parametrize(
    ("method", "model", "groups", "mixable"),
    [
        ("lora", "llama", ONE_BY_ONE, True),
        ("lora", "t5", ONE_BY_ONE, True),
        ("lora", "llava", ONE_BY_ONE, False),  # with a projector of its own each
        ("o_lora", "llama", STACKS, False),
        ("o_lora", "t5", STACKS, False),
        ("moelora", "llama", ONE_BY_ONE, False),
        ("moelora", "t5", ONE_BY_ONE, False),
        ("adapter_cl", "llama", ONE_BY_ONE, False),
        ("adapter_cl", "t5", ONE_BY_ONE, False),
        ("eproj", "llava", ONE_BY_ONE, False),
        ("continual_llava", "llama", STACKS, False),
        ("continual_llava", "llava", STACKS, False),
    ],
)
def test_requests_of_several_groups_are_answered_as_each_alone(
    folders: dict[str, Path], squares: list[Row], method: str, model: str, groups: Sequence[str | None], mixable: bool
) -> None:
    backbone = load_backbone(str(folders[model]), dtype="float32")
    if backbone.layout.sees:
        backbone = replace(backbone, projector=find_projector(backbone.model, "auto", model))
    pool = filled(method, backbone)
    if isinstance(pool, IncrementPool):
        backbone.reader.query = query
    _write_text(backbone)
    rows = squares if backbone.layout.sees else texts()
    prompts = [backbone.reader.encode_prompt(row) for row in rows]
    decoding = Decoding(max_new_tokens=5, batch_size=4, max_length=256)

    def asked(names: Sequence[str | None], several: Sequence[Encoded]) -> list[str]:
        return generate_answers(pool, backbone.reader, names, several, decoding)

    assert pool.can_mix(groups) == mixable
    together = asked(groups, prompts)
    alone = {group: [asked([group], [prompt])[0] for prompt in prompts] for group in dict.fromkeys(groups)}
    assert together == [alone[group][i] for i, group in enumerate(groups)]
    for first, second in combinations(alone, 2):
        assert alone[first] != alone[second], "else a group answered by another would not be seen"
