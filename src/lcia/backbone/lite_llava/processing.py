"""What turns conversations with images into LLaVA's inputs."""

from __future__ import annotations

from transformers import LlavaImageProcessorPil, LlavaProcessor, PreTrainedTokenizerBase
from transformers.image_utils import PILImageResampling

from lcia.backbone.lite_llava.configuration import EfficientNetLiteConfig
from lcia.errors import UserError

IMAGE_TOKEN = "<image>"

# Content is a text, or a list of parts of which each is a text or an image.
_SHOWN = (
    "{% macro shown(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' %}{{ '" + IMAGE_TOKEN + "\\n' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}"
)


def build_processor(tokenizer: PreTrainedTokenizerBase, vision: EfficientNetLiteConfig) -> LlavaProcessor:
    """The processor of a model with this tokenizer, which gets the token `<image>`, and this tower.

    An image is scaled to a square, its sides each on their own: everything in it is seen, and a box given in fractions
    of the image has the same fractions in what the model sees. Padding would keep proportions, but move every box by
    an amount that depends on the image.
    """
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    side = {"height": vision.image_size, "width": vision.image_size}
    pixels = LlavaImageProcessorPil(
        size=side,
        do_center_crop=False,
        resample=PILImageResampling.BICUBIC,
        image_mean=[127 / 255] * 3,  # as EfficientNet-Lite was trained: (x - 127) / 128 of 0 to 255
        image_std=[128 / 255] * 3,
    )
    return LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        chat_template=with_images(str(tokenizer.chat_template)),
    )


def with_images(template: str) -> str:
    """A chat template for texts, made to take images as well: each a line `<image>`."""
    content = "message['content']"
    if content not in template:
        raise UserError(f"the language model's chat template does not write {content}, so images have no place in it")
    return _SHOWN + template.replace(content, f"shown({content})")
