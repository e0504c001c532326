"""Features kept on disk: the numbers of the tower, and nothing kept that could be other numbers the next time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from lcia.backbone.vision_memo import VisionMemo
from lcia.errors import UserError
from tiny_llava import picture, tiny_llava, tiny_tower

AS_LLAVA = {"return_dict": True, "output_hidden_states": -1}


def pixels(*seeds: int) -> torch.Tensor:
    """(B, 3, 64, 64)"""
    return torch.stack([torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def inputs(processor: Any, *rows: tuple[str, list[int]]) -> dict[str, torch.Tensor]:
    texts = ["<image>\n" * len(images) + text for text, images in rows]
    shown = [[picture(seed) for seed in images] for _, images in rows]
    return dict(processor(text=texts, images=shown, padding=True, padding_side="left", return_tensors="pt"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_the_same_with_and_without(tiny_model: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model, processor = tiny_llava(tiny_model)
    model.to(dtype)
    batch = inputs(processor, ("a longer text", [0]))
    with torch.no_grad():
        without = model(**batch).logits
        memo = VisionMemo(model.model.vision_tower, tmp_path).set()
        first, second = model(**batch).logits, model(**batch).logits
        memo.unset()
        after = model(**batch).logits
    assert torch.equal(without, first)
    assert torch.equal(without, second)
    assert torch.equal(without, after)
    assert (memo.computed, memo.found, memo.passed_on) == (1, 1, 0)
    (file,) = tmp_path.rglob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {dtype}


def test_in_a_batch_the_numbers_are_those_of_each_image_alone(tiny_model: Path, tmp_path: Path) -> None:
    """Without a memo they depend on the number of images in their last bits."""
    model, processor = tiny_llava(tiny_model)
    batch = inputs(processor, ("a", [0, 1]), ("longer text", [1]))
    tower = model.model.vision_tower
    with torch.no_grad():
        without = model(**batch).logits
        alone = [tower(image[None]).last_hidden_state for image in batch["pixel_values"]]
        memo = VisionMemo(tower, tmp_path).set()
        first, second = model(**batch).logits, model(**batch).logits
        assert torch.equal(tower(batch["pixel_values"], **AS_LLAVA).last_hidden_state, torch.cat(alone))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, without)
    assert (memo.computed, memo.found) == (2, 7)


def test_a_tower_of_transformers_with_a_chosen_layer(tmp_path: Path) -> None:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=7, image_seq_length=4)
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    assert isinstance(model.model.vision_tower, CLIPVisionModel)
    assert config.vision_feature_layer == -2
    batch = {"input_ids": torch.tensor([[7, 7, 7, 7, 9]]), "pixel_values": torch.randn(1, 3, 28, 28)}
    without = model(**batch).logits
    memo = VisionMemo(model.model.vision_tower, tmp_path).set()
    assert torch.equal(model(**batch).logits, without)
    assert torch.equal(model(**batch).logits, without)
    assert (memo.computed, memo.found) == (1, 1)
    (file,) = tmp_path.rglob("*.safetensors")
    assert file.stat().st_size < 3 * (5 * 32 * 4) + 2000  # the chosen layer and the last, not all five


def test_what_is_kept_serves_another_process_and_another_batch(tmp_path: Path) -> None:
    VisionMemo(tower := tiny_tower(), tmp_path).set()
    alone = tower(pixels(1), **AS_LLAVA)
    other = VisionMemo(again := tiny_tower(), tmp_path).set()
    together = again(pixels(0, 1, 2), **AS_LLAVA)
    assert (other.found, other.computed) == (1, 2)
    assert torch.equal(together.last_hidden_state[1:2], alone.last_hidden_state)
    assert torch.equal(together.hidden_states[-1], together.last_hidden_state)
    assert torch.equal(together.pooler_output[1:2], alone.pooler_output)


def changed_weight(tower: Any) -> None:
    tower.head.convolution.weight.data[0] += 1


def changed_statistics(tower: Any) -> None:
    tower.head.normalization.running_mean[0] += 1


def changed_dtype(tower: Any) -> None:
    tower.to(torch.bfloat16)


def changed_setting(tower: Any) -> None:
    tower.config.batch_norm_eps = 0.5


def changed_attention(tower: Any) -> None:
    tower.set_attn_implementation("eager")


CHANGES = [changed_weight, changed_statistics, changed_dtype, changed_setting, changed_attention]


@pytest.mark.parametrize("change", CHANGES)
def test_another_tower_finds_nothing(tmp_path: Path, change: Any) -> None:
    VisionMemo(tower := tiny_tower(), tmp_path).set()
    tower(pixels(0), **AS_LLAVA)
    other = tiny_tower()
    change(other)
    memo = VisionMemo(other, tmp_path).set()
    other(pixels(0), **AS_LLAVA)
    assert (memo.found, memo.computed) == (0, 1)


def test_other_pixels_sizes_and_arguments_find_nothing(tmp_path: Path) -> None:
    memo = VisionMemo(tower := tiny_tower(), tmp_path).set()
    one = pixels(0)
    nearly = one.clone()
    nearly[0, 0, 0, 0] += 1e-3
    for image in (one, nearly, one.double(), one.reshape(1, 3, 32, 128)):
        tower(image, **AS_LLAVA)
    tower(one)
    assert (memo.found, memo.computed) == (0, 5)


def test_a_tower_that_learns_is_not_kept(tmp_path: Path) -> None:
    memo = VisionMemo(tower := tiny_tower(), tmp_path).set()
    tower.requires_grad_(True)
    tower(pixels(0), **AS_LLAVA).last_hidden_state.sum().backward()
    assert tower.stem.convolution.weight.grad is not None
    tower.requires_grad_(False)
    wanted = pixels(0).requires_grad_(True)
    tower(wanted, **AS_LLAVA).last_hidden_state.sum().backward()
    assert wanted.grad is not None
    assert (memo.computed, memo.found, memo.passed_on) == (0, 0, 2)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("module", [torch.nn.Dropout(0.5), torch.nn.BatchNorm2d(24)])
def test_what_is_random_in_training_is_not_kept(tmp_path: Path, module: Any) -> None:
    tower = tiny_tower()
    tower.add_module("random", module.requires_grad_(False))
    memo = VisionMemo(tower, tmp_path).set()
    tower.train()
    tower(pixels(0), **AS_LLAVA)
    assert memo.passed_on == 1
    tower.eval()
    tower(pixels(0), **AS_LLAVA)
    assert (memo.passed_on, memo.computed) == (1, 1)


def test_arguments_that_are_tensors_are_passed_on(tmp_path: Path) -> None:
    memo = VisionMemo(tower := tiny_tower(), tmp_path).set()
    tower(pixels(0), mask=torch.ones(1), **AS_LLAVA)
    assert isinstance(tower(pixels(0), return_dict=False), tuple)
    assert (memo.passed_on, memo.computed) == (2, 0)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    VisionMemo(tower := tiny_tower(), tmp_path).set()
    tower(pixels(0), **AS_LLAVA)
    (file,) = tmp_path.rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match=rf"{file.name}: .* remove the file"):
        tower(pixels(0), **AS_LLAVA)


def test_where_features_cannot_be_kept_they_are_computed_each_time(tmp_path: Path) -> None:
    folder = tmp_path / "vision"
    folder.write_text("")  # a file in the place of the folder
    expected = tiny_tower()(pixels(0), **AS_LLAVA).last_hidden_state
    memo = VisionMemo(tower := tiny_tower(), folder).set()
    with pytest.warns(UserWarning, match="features cannot be kept here") as told:
        found = [tower(pixels(0), **AS_LLAVA).last_hidden_state for _ in range(2)]
    assert all(torch.equal(one, expected) for one in found)
    assert (memo.computed, memo.found) == (2, 0)
    assert len(told) == 1


def test_the_cache_is_the_default_place() -> None:
    from lcia.backbone.cache import cache_dir

    assert VisionMemo(tiny_tower()).folder == cache_dir() / "vision"
