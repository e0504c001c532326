"""Tiny random vision-language models and a stream of coloured squares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLProcessor,
)

from conftest import byte_tokenizer

IMAGE = "<image>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% for part in message['content'] %}{{ IMAGE if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
QWEN = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}


def _image_only(self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
    """What Qwen-VL's processors set up, less their part for videos, which does not exist without torchvision."""
    for name, token in QWEN.items():
        setattr(self, name, token)
        setattr(self, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class ImageOnlyQwenProcessor(Qwen2VLProcessor):  # type: ignore[misc]
    __init__ = _image_only


class ImageOnlyQwen25Processor(Qwen2_5_VLProcessor):  # type: ignore[misc]
    __init__ = _image_only


class ImageOnlyQwen3Processor(Qwen3VLProcessor):  # type: ignore[misc]
    __init__ = _image_only


AutoProcessor.register(Qwen2VLConfig, ImageOnlyQwenProcessor, exist_ok=True)
AutoProcessor.register(Qwen2_5_VLConfig, ImageOnlyQwen25Processor, exist_ok=True)
AutoProcessor.register(Qwen3VLConfig, ImageOnlyQwen3Processor, exist_ok=True)


def _tokenizer(special: dict[str, str]) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(special.values())}, replace_extra_special_tokens=False
    )
    tokenizer.chat_template = None
    return tokenizer


def tiny_llava(folder: Path) -> Path:
    """28 x 28 pixels, four tokens an image."""
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    tokenizer = _tokenizer({"image_token": IMAGE})
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        **TEXT, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=0
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image_id, image_seq_length=4)
    config.pad_token_id = 0
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # else the random tower says nearly the same of all images
        for weights in model.model.multi_modal_projector.parameters():
            weights.mul_(20)
    model.save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_center_crop=True
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE.replace("IMAGE", f"'{IMAGE}'"),
    ).save_pretrained(folder)
    return folder


def tiny_qwen(folder: Path) -> Path:
    """Qwen2-VL. Images of any size; every 8 x 8 pixels are a token."""
    from transformers import Qwen2VLForConditionalGeneration

    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2}
    return _save_qwen(folder, Qwen2VLConfig, Qwen2VLForConditionalGeneration, ImageOnlyQwenProcessor, vision)


def tiny_qwen25(folder: Path) -> Path:
    """Qwen2.5-VL: attention in windows of 8 x 8 pixels in the first layer of its tower."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
    vision |= {"window_size": 8, "fullatt_block_indexes": [1]}
    return _save_qwen(folder, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, ImageOnlyQwen25Processor, vision)


def tiny_qwen3(folder: Path) -> Path:
    """Qwen3-VL: what the first layer of its tower sees reaches the language model beside the projector's tokens."""
    from transformers import Qwen3VLForConditionalGeneration

    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32}
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    text = {"head_dim": 8}
    return _save_qwen(folder, Qwen3VLConfig, Qwen3VLForConditionalGeneration, ImageOnlyQwen3Processor, vision, text)


def _save_qwen(
    folder: Path,
    config_class: Any,
    model_class: Any,
    processor_class: Any,
    vision: dict[str, Any],
    text: dict[str, Any] | None = None,
) -> Path:
    from transformers import Qwen2VLImageProcessorPil

    tokenizer = _tokenizer(QWEN)
    ids = {f"{key}_id": tokenizer.convert_tokens_to_ids(value) for key, value in QWEN.items()}
    torch.manual_seed(0)
    patches = {"patch_size": 4, "temporal_patch_size": 2}
    config = config_class(
        vision_config={**vision, **patches, "spatial_merge_size": 2},
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
            "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
            **(text or {}),
        },
        **ids,
    )
    config.pad_token_id = 0
    model_class(config).save_pretrained(folder)
    processor_class(
        image_processor=Qwen2VLImageProcessorPil(**patches, merge_size=2, min_pixels=64, max_pixels=1024),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE.replace("IMAGE", "'<|vision_start|><|image_pad|><|vision_end|>'"),
    ).save_pretrained(folder)
    return folder


COLOURS = {"red": (220, 20, 20), "blue": (20, 20, 220)}


def square_stream(folder: Path) -> Path:
    """Three tasks about one-coloured images: the first and the last share an instruction; the second has text rows."""
    tasks = {"colours": "Name the colour", "tints": "What tint is shown here", "paints": "Name the colour"}
    for name, instruction in tasks.items():
        (folder / "images" / name).mkdir(parents=True)
        rows = []
        for i in range(18):
            colour = list(COLOURS)[i % 2]
            path = f"images/{name}/{i}.png"
            size = (28 + 4 * (i % 3), 28)
            Image.new("RGB", size, tuple(max(0, c - i) for c in COLOURS[colour])).save(folder / path)
            row = {
                "id": f"{name}-{i}",
                "instruction": instruction,
                "input": f"square {i}",
                "output": colour,
                "split": ("train", "train", "train", "train", "dev", "test")[i % 6],
            }
            rows.append(row if name == "tints" and i % 3 == 0 else {**row, "image": path})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks.json").write_text(json.dumps(list(tasks)))
    return folder
