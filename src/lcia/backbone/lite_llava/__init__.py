"""A small vision-language model: EfficientNet-Lite0, LLaVA's projector, and SmolLM2-135M.

It is transformers' own LLaVA with another vision tower. Importing this package tells transformers about the tower; from
then on `AutoModelForImageTextToText.from_pretrained(folder)` and `AutoProcessor.from_pretrained(folder)` know it.
"""

from transformers import AutoConfig, AutoModel

from lcia.backbone.lite_llava.build import COMMAND, LANGUAGE_MODEL, NAME, Built, Settings, build_model, folder
from lcia.backbone.lite_llava.configuration import EfficientNetLiteConfig, llava_config
from lcia.backbone.lite_llava.modeling import EfficientNetLiteModel, pretrained_tower
from lcia.backbone.lite_llava.processing import IMAGE_TOKEN, build_processor

AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel)

__all__ = [
    "COMMAND",
    "IMAGE_TOKEN",
    "LANGUAGE_MODEL",
    "NAME",
    "Built",
    "EfficientNetLiteConfig",
    "EfficientNetLiteModel",
    "Settings",
    "build_model",
    "build_processor",
    "folder",
    "llava_config",
    "pretrained_tower",
]
