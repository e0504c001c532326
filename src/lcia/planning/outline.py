"""A model from its configuration alone: every shape, no number. No weights are read, downloaded or made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from lcia.backbone import Backbone, find_model, load_layout, load_reader, resolve_paths
from lcia.config import RunConfig
from lcia.errors import UserError


def place(model: str) -> str:
    """Where the model's configuration and tokenizer lie: a folder, which needs no weights here, or a hub id."""
    return model if (Path(model) / "config.json").is_file() else find_model(model)


def outline(config: RunConfig, device: str, depth: int | None = None) -> Backbone:
    """The frozen model of a run, on the `meta` device.

    Args:
        device: cpu | cuda, where the run would be.
        depth: instead: a real model on the CPU with random weights and only so many layers of its language model, all
            else at full size.
    """
    where = place(config.model)
    layout = load_layout(where, config.model)
    reader = load_reader(where, config.model, layout).with_padding(config.image_padding)
    settings = resolve_paths(config.dtype, config.attn_implementation, torch.device(device))
    described = AutoConfig.from_pretrained(where)
    if depth is not None:
        _shorten(described, depth, config.model)
    try:
        with torch.device("meta" if depth is None else "cpu"), _random_state_kept():
            model = layout.auto_model.from_config(
                described,
                dtype=getattr(torch, settings["dtype"]),
                attn_implementation=settings["attn_implementation"],
            )
    except (ValueError, KeyError, ImportError) as error:
        raise UserError(f"model {config.model}: cannot be built: {str(error).splitlines()[0]}") from error
    # Nothing ends an answer: the longest one takes the most memory.
    model.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=None,
        pad_token_id=reader.pad_id,
        decoder_start_token_id=getattr(described, "decoder_start_token_id", None),  # some have no such field
    )
    model.requires_grad_(False)
    model.eval()
    return Backbone(config.model, model, reader, fingerprint="")


@contextmanager
def _random_state_kept() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def depth_of(described: Any) -> int:
    """The layers of the language model."""
    return int(described.get_text_config().num_hidden_layers)


def _shorten(described: Any, depth: int, name: str) -> None:
    """Leave `depth` layers of the language model; an encoder-decoder keeps so many of each."""
    text = described.get_text_config()
    text.num_hidden_layers = depth  # transformers knows by what name a configuration keeps it
    for key in {"num_decoder_layers", "encoder_layers", "decoder_layers"} & set(text.to_dict()):
        setattr(text, key, depth)
    if text.to_dict().get("layer_types"):
        text.layer_types = text.layer_types[:depth]
    if depth_of(described) != depth:
        raise UserError(f"model {name}: the number of its layers cannot be changed in its configuration")
