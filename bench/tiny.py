"""What several of the measurements need: a tiny model, and no answers kept from before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lcia.backbone import find_model


def tiny_llama(folder: Path) -> Path:
    """`folder`, with a random two-layer Llama and SmolLM2's tokenizer: for what does not depend on weights or size."""
    tokenizer = AutoTokenizer.from_pretrained(find_model("smollm2-135m"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def fresh_answers(folder: Path) -> Iterator[None]:
    """Runs keep their answers in `folder` and find none of earlier runs; converted models are found as ever."""
    with patch("lcia.run.cache_dir", lambda: folder):
        yield
