"""Images padded to a square: where a box lies in them, and that training and every way of asking pad alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lcia.answering import answer_requests
from lcia.backbone import load_backbone
from lcia.backbone.images import image_size, padded_to_square
from lcia.backbone.reader import ImageReader, mean_colour
from lcia.bench import BENCHMARKS, bench_config
from lcia.config import parse_config
from lcia.errors import UserError
from lcia.export import export_run
from lcia.progress import Reporter
from lcia.run import measure_again, resume, train
from lcia.session import open_run
from lcia.stream import Row
from lcia.validate import validate_config
from tiny_vision import square_stream, tiny_llava, tiny_qwen

RED, GREY = (255, 0, 0), (90, 90, 90)
Box = tuple[float, float, float, float]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    makers = {"llava": tiny_llava, "qwen": tiny_qwen}
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in makers.items()}


@pytest.fixture
def see_config(tiny_config: Callable[..., Any], models: dict[str, Path], tmp_path: Path) -> Callable[..., Any]:
    def make(model: str = "llava", **changes: Any) -> Any:
        if not (tmp_path / "squares").exists():
            square_stream(tmp_path / "squares")
        values = {"model": str(models[model]), "stream": str(tmp_path / "squares"), "tasks": ["colours"]}
        return tiny_config(**{**values, "method": "lora", "max_steps": 1, "max_new_tokens": 1, **changes})

    return make


def reader_of(folder: Path, padding: str | None) -> ImageReader:
    reader = load_backbone(str(folder), dtype="float32").reader.with_padding(padding)
    assert isinstance(reader, ImageReader)
    return reader


def drawn(path: Path, size: tuple[int, int], box: tuple[int, int, int, int]) -> Row:
    """A row that shows a red box, its right and lower edge not included, on grey."""
    image = Image.new("RGB", size, GREY)
    image.paste(RED, box)
    image.save(path)
    return Row("1", "x", (("user", "where"),), ("there",), (str(path),), source="file.jsonl:1")


def box_seen(reader: ImageReader, row: Row) -> Box | None:
    """Where the red is, as fractions of what the model is shown."""
    pixels = reader.collate([reader.encode(row)])["pixel_values"][0].numpy()  # (3, H, W)
    processor = reader.chat.image_processor
    mean, std = (np.array(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    red, green, _ = pixels * std + mean
    rows, columns = np.nonzero((red > 0.7) & (green < 0.3))
    if not len(rows):
        return None
    height, width = red.shape
    return columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((224, 112), (8, 16, 56, 96)),  # wide, at the left edge
        ((224, 112), (168, 32, 216, 104)),
        ((112, 224), (16, 8, 96, 56)),  # high, at the upper edge
        ((112, 224), (32, 168, 104, 216)),
        ((112, 112), (16, 32, 96, 104)),
    ],
)
def test_a_box_keeps_its_fractions(
    models: dict[str, Path], tmp_path: Path, size: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    """On a CLIP processor that crops the centre; CoIN's fractions are of the image padded to a square."""
    row = drawn(tmp_path / "a.png", size, box)
    reader = reader_of(models["llava"], "square")
    assert reader.chat.image_processor.do_center_crop
    side = max(size)
    left, top = (side - size[0]) / 2, (side - size[1]) / 2
    expected = tuple((edge + (left, top)[i % 2]) / side for i, edge in enumerate(box))
    seen = box_seen(reader, row)
    assert seen is not None
    assert seen == pytest.approx(expected, abs=1.01 / 28)  # a pixel of the 28
    cropped = box_seen(reader_of(models["llava"], None), row)
    if size[0] == size[1]:
        assert cropped == seen
    else:
        assert cropped is None or max(abs(a - b) for a, b in zip(cropped, expected, strict=True)) > 0.1


def test_what_is_padded_is_nothing_to_the_model(models: dict[str, Path], tmp_path: Path) -> None:
    """The processor's mean colour, which its normalisation makes 0 but for the rounding of a colour."""
    reader = reader_of(models["llava"], "square")
    row = drawn(tmp_path / "a.png", (224, 56), (0, 0, 1, 1))
    pixels = reader.collate([reader.encode(row)])["pixel_values"][0]  # (3, 28, 28)
    assert pixels[:, :9].abs().max() < 1 / 255 / min(reader.chat.image_processor.image_std) + 1e-6
    assert pixels[:, 12:16].abs().max() > 0.1
    assert mean_colour(reader.chat) == (122, 116, 104)  # CLIP's, rounded down as LLaVA does


@pytest.mark.parametrize(("size", "offset"), [((5, 2), (0, 1)), ((2, 5), (1, 0)), ((4, 4), (0, 0)), ((1, 4), (1, 0))])
def test_padded_pixel_by_pixel(size: tuple[int, int], offset: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    found = np.asarray(padded_to_square(Image.fromarray(pixels), (1, 2, 3)))
    side = max(size)
    for y in range(side):
        for x in range(side):
            inside = 0 <= x - offset[0] < size[0] and 0 <= y - offset[1] < size[1]
            expected = pixels[y - offset[1], x - offset[0]].tolist() if inside else [1, 2, 3]
            assert found[y, x].tolist() == expected


def test_a_square_too_large_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    """A strip of a few kB must not become gigabytes."""
    with pytest.raises(UserError, match=r"1 x 8001 pixels, as a square more than the 64,000,000"):
        padded_to_square(Image.new("RGB", (1, 8001)), (0, 0, 0))
    with pytest.raises(UserError, match="as a square more than"):
        reader_of(models["llava"], "square").check_size(8001, 1)
    reader_of(models["llava"], None).check_size(80, 1)


def test_training_and_every_way_of_asking_pad(
    see_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: set[tuple[int, int]] = set()
    original = ImageReader._shown

    def noted(self: ImageReader, texts: list[str], images: list[list[Image.Image]], *rest: Any, **options: Any) -> Any:
        shown.update(image.size for row in images for image in row)
        return original(self, texts, images, *rest, **options)

    monkeypatch.setattr(ImageReader, "_shown", noted)
    config = see_config(image_padding="square", max_steps=2, per_device_train_batch_size=12)
    folder, image = Path(config.output_dir), tmp_path / "squares/images/colours/1.png"
    assert image_size(image) == (32, 28)

    def squares_only() -> bool:
        found = bool(shown) and all(width == height for width, height in shown)
        shown.clear()
        return found

    with Reporter() as reporter:
        validate_config(config, reporter)
        assert squares_only()
        train(config, reporter)  # the data, twice, and answers
        assert squares_only()
        measure_again(folder, reporter, split="dev", recompute=True)
        assert squares_only()
        resume(folder, reporter)
    answer_requests(folder, [("x", "Name the colour")], images=[image])
    assert squares_only()
    open_run(folder).backbone.reader.collate([open_run(folder).backbone.reader.encode(drawn_like(image))])
    assert squares_only()
    export_run(folder, tmp_path / "out")
    card = (tmp_path / "out/shared/README.md").read_text()
    assert "padded to a square of the processor's mean colour" in card
    code = card.partition("an image is padded")[2].partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {"image": Image.open(image), "processor": open_run(folder).backbone.reader.chat}
    exec(code, names)
    assert names["square"].tobytes() == padded_to_square(Image.open(image), (122, 116, 104)).tobytes()


def drawn_like(image: Path) -> Row:
    return Row("1", "x", (("user", "which"),), ("red",), (str(image),), source="file.jsonl:1")


def test_without_the_option_images_are_as_they_are(see_config: Callable[..., Any], tmp_path: Path) -> None:
    config = see_config()
    with Reporter() as reporter:
        train(config, reporter)
    export_run(Path(config.output_dir), tmp_path / "out")
    assert "padded" not in (tmp_path / "out/shared/README.md").read_text()
    row = drawn_like(tmp_path / "squares/images/colours/1.png")
    plain = open_run(Path(config.output_dir)).backbone.reader
    padded = plain.with_padding("square")
    assert plain.content(plain.encode(row)) != padded.content(padded.encode(row))  # no prediction is reused
    alone = Row("1", "x", (("user", "which"),), ("red",))
    assert plain.content(plain.encode(alone)) == padded.content(padded.encode(alone))


def test_a_padded_image_has_the_tokens_of_a_square(models: dict[str, Path], tmp_path: Path) -> None:
    """Where their number depends on the size: nothing of what was counted without padding is reused."""
    row = drawn(tmp_path / "a.png", (32, 8), (0, 0, 1, 1))
    counts = [
        len([token for token in reader.encode(row).prompt if token == reader.chat.image_token_id])
        for reader in (reader_of(models["qwen"], None), reader_of(models["qwen"], "square"))
    ]
    assert counts == [4, 16]  # 8 x 8 pixels are one


def test_benchmarks_of_llava_pad(see_config: Callable[..., Any]) -> None:
    for name in BENCHMARKS:
        wanted = "square" if name in ("coin", "coast") else None
        assert bench_config(name, "lora").image_padding == wanted
    assert bench_config("coin", "lora", overrides=["image_padding=null"]).image_padding is None
    with pytest.raises(UserError, match="key 'image_padding': Input should be 'square'"):
        see_config(image_padding="circle")
    values = json.loads(see_config().model_dump_json())
    assert parse_config(values, where="x").image_padding is None


def test_a_processor_without_mean_colour_is_named(models: dict[str, Path]) -> None:
    reader = reader_of(models["llava"], None)
    reader.chat.image_processor.image_mean = None
    with pytest.raises(UserError, match="key 'image_padding': the model's processor has no mean colour"):
        reader.with_padding("square")


# --- sizes that a processor refuses


def with_strip(folder: Path, name: str = "tints", number: int = 4) -> Path:
    """The stream of squares, one of which is 201 times as wide as high."""
    square_stream(folder)
    Image.new("RGB", (402, 2)).save(folder / f"images/{name}/{number}.png")
    return folder


def test_a_size_that_the_processor_refuses_stops_before_training(
    see_config: Callable[..., Any], tmp_path: Path
) -> None:
    """Qwen2-VL: one side over 200 times the other. The row is in the last task: hours later it would be found."""
    stream = with_strip(tmp_path / "strip")
    config = see_config("qwen", stream=str(stream), tasks=["colours", "tints"])
    where = r"tints\.jsonl:5: image .*4\.png: the model's processor refuses it: absolute aspect ratio"
    with Reporter() as reporter:
        with pytest.raises(UserError, match=where):
            validate_config(config, reporter)
        with pytest.raises(UserError, match=where):
            train(config, reporter)
    assert not Path(config.output_dir).exists()
    padded = see_config("qwen", stream=str(stream), tasks=["colours", "tints"], image_padding="square")
    with Reporter() as reporter:
        validate_config(padded, reporter)


def test_a_test_row_s_size_is_looked_at_too(see_config: Callable[..., Any], tmp_path: Path) -> None:
    stream = with_strip(tmp_path / "strip", "colours", 5)
    with Reporter() as reporter, pytest.raises(UserError, match=r"colours\.jsonl:6: image .*5\.png"):
        train(see_config("qwen", stream=str(stream)), reporter)


def test_a_refusal_later_names_row_or_image(models: dict[str, Path], tmp_path: Path) -> None:
    row = drawn(tmp_path / "a.png", (20, 20), (0, 0, 1, 1))
    reader = reader_of(models["qwen"], None)
    encoded = reader.encode(row)
    Image.new("RGB", (402, 2)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png: the model's processor refuses it: absolute aspect ratio"):
        reader.collate([encoded])
    with pytest.raises(UserError, match=r"file\.jsonl:1: image .*a\.png: the model's processor refuses it"):
        reader_of(models["qwen"], None).encode(row)


def test_a_size_is_tried_once(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[int, int]] = []
    original = ImageReader._shown

    def noted(self: ImageReader, texts: list[str], images: list[list[Image.Image]], *rest: Any, **options: Any) -> Any:
        tried.append(images[0][0].size)
        return original(self, texts, images, *rest, **options)

    monkeypatch.setattr(ImageReader, "_shown", noted)
    reader = reader_of(models["llava"], "square")
    for size in ((30, 20), (20, 30), (30, 10), (31, 10)):
        reader.check_size(*size)
    assert tried == [(30, 30), (31, 31)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_of_opened_images(tmp_path: Path, orientation: int) -> None:
    from lcia.backbone.images import open_image

    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert image_size(tmp_path / "a.jpg") == open_image(tmp_path / "a.jpg").size
