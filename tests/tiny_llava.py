"""A tiny random lite-llava: EfficientNet-Lite of 64 x 64 pixels and four positions, a language model of two layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lcia.backbone.lite_llava import EfficientNetLiteConfig, EfficientNetLiteModel
from lcia.backbone.lite_llava.build import put_together

STAGES = ((3, 1, 1, 8, 1), (3, 2, 3, 8, 2), (5, 2, 3, 12, 1), (3, 2, 3, 12, 1), (5, 2, 3, 16, 2))


def tiny_tower(seed: int = 0) -> EfficientNetLiteModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = EfficientNetLiteConfig(stages=STAGES, stem_channels=8, hidden_size=24, image_size=64)
        tower = EfficientNetLiteModel(config).eval().requires_grad_(False)
        for module in tower.modules():  # statistics that do something
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
    return tower


def tiny_llava(language_model: Path, tower: EfficientNetLiteModel | None = None) -> tuple[Any, Any]:
    """Model and processor."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = AutoModelForCausalLM.from_pretrained(language_model)
    return put_together(text, AutoTokenizer.from_pretrained(language_model), tower or tiny_tower())


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))
