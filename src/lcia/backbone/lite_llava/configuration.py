"""EfficientNet-Lite's configuration, and LLaVA's with it as the vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import LlavaConfig, PreTrainedConfig

# (kernel, stride, expansion, channels, blocks) of each stage: EfficientNet-B0, arXiv 1905.11946, table 1.
LITE0_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


class EfficientNetLiteConfig(PreTrainedConfig):
    """EfficientNet-Lite: EfficientNet without squeeze-and-excitation and with ReLU6; the defaults are Lite0.

    Args:
        stages: (kernel, stride, expansion, channels, blocks) of each stage.
        stem_channels: of the first convolution, which has stride 2.
        hidden_size: channels of the feature map that comes out.
        image_size: height and width in pixels of the images it is made for.
    """

    model_type = "efficientnet_lite"
    base_config_key = "vision_config"

    def __init__(
        self,
        stages: Sequence[Sequence[int]] = LITE0_STAGES,
        stem_channels: int = 32,
        hidden_size: int = 1280,
        num_channels: int = 3,
        image_size: int = 224,
        batch_norm_eps: float = 1e-3,
        **kwargs: Any,
    ) -> None:
        self.stages = [list(stage) for stage in stages]
        self.stem_channels = stem_channels
        self.hidden_size = hidden_size
        self.num_channels = num_channels
        self.image_size = image_size
        self.batch_norm_eps = batch_norm_eps
        super().__init__(**kwargs)

    @property
    def patch_size(self) -> int:
        """Pixels of the image per position of the feature map, in each direction: the product of all strides."""
        size = 2
        for _, stride, *_ in self.stages:
            size *= stride
        return size


def llava_config(
    text_config: PreTrainedConfig, vision_config: EfficientNetLiteConfig, image_token_id: int
) -> LlavaConfig:
    """LLaVA-1.5 (arXiv 2310.03744) with this tower: every position of its last feature map is a token."""
    return LlavaConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_index=image_token_id,
        image_seq_length=(vision_config.image_size // vision_config.patch_size) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=text_config.tie_word_embeddings,
    )
