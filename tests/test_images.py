"""Opening images: what a viewer would show as RGB, or an error that names the file."""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import ExifTags, Image

from lcia.backbone.images import image_sha256, open_image
from lcia.errors import UserError

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def save(folder: Path, image: Image.Image, suffix: str = ".png", **options: Any) -> Path:
    path = folder / f"image{suffix}"
    image.save(path, **options)
    return path


def colours(path: Path) -> list[list[tuple[int, ...]]]:
    image = open_image(path)
    assert image.mode == "RGB"
    return [[tuple(pixel) for pixel in line] for line in np.asarray(image).tolist()]


# --- what is in the file ---------------------------------------------------------------------------------


MODES_OF = {
    ".png": ["RGB", "RGBA", "P"],
    ".tif": ["RGB", "RGBA", "P", "CMYK", "YCbCr"],
    ".jpg": ["RGB", "CMYK", "YCbCr"],
    ".gif": ["RGB", "P"],
    ".webp": ["RGB", "RGBA"],
    ".bmp": ["RGB", "P"],
}


@pytest.mark.parametrize(("suffix", "mode"), [(suffix, mode) for suffix, modes in MODES_OF.items() for mode in modes])
def test_red_is_red_in_every_mode_and_format(tmp_path: Path, mode: str, suffix: str) -> None:
    image = Image.new("RGB", (16, 8), RED).convert(mode)
    path = save(tmp_path, image, suffix)
    with Image.open(path) as stored:
        assert stored.mode == mode or suffix in (".gif", ".jpg", ".webp")  # these choose the mode themselves
    shown = np.asarray(open_image(path))
    assert shown.shape == (8, 16, 3)
    assert np.abs(shown.astype(int) - RED).max() <= 4  # JPEG


@pytest.mark.parametrize(("mode", "value", "grey"), [("L", 100, 100), ("1", 1, 255), ("1", 0, 0)])
def test_grey_and_black_and_white(tmp_path: Path, mode: str, value: int, grey: int) -> None:
    assert colours(save(tmp_path, Image.new(mode, (1, 1), value))) == [[(grey,) * 3]]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pixels=arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))))
def test_rgb_comes_back_as_it_is(tmp_path: Path, pixels: np.ndarray) -> None:
    assert np.array_equal(np.asarray(open_image(save(tmp_path, Image.fromarray(pixels)))), pixels)


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    clear, half, full = (255, 0, 0, 0), (255, 0, 0, 128), (255, 0, 0, 255)
    image = Image.new("RGBA", (3, 1))
    image.putdata([clear, half, full])
    first, second, third = colours(save(tmp_path, image))[0]
    assert (first, third) == (WHITE, RED)
    assert second[0] == 255
    assert abs(second[1] - 127) <= 1  # 0 · 128/255 + 255 · 127/255


def test_a_palette_entry_may_be_transparent(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putdata([0, 1])
    assert colours(save(tmp_path, image)) == [[RED, GREEN]]
    assert colours(save(tmp_path, image, transparency=0)) == [[WHITE, GREEN]]
    assert colours(save(tmp_path, image, transparency=bytes([255, 0]))) == [[RED, WHITE]]
    assert colours(save(tmp_path, image, ".gif", transparency=1)) == [[RED, WHITE]]


@pytest.mark.parametrize(("mode", "values", "transparent"), [("L", [7, 9], 7), ("RGB", [RED, GREEN], RED)])
def test_a_colour_may_be_transparent(tmp_path: Path, mode: str, values: list[Any], transparent: Any) -> None:
    image = Image.new(mode, (2, 1))
    image.putdata(values)
    shown = colours(save(tmp_path, image, transparency=transparent))[0]
    assert shown == [WHITE, (9, 9, 9) if mode == "L" else GREEN]


def test_grey_with_alpha(tmp_path: Path) -> None:
    image = Image.new("LA", (2, 1))
    image.putdata([(10, 0), (10, 255)])
    assert colours(save(tmp_path, image)) == [[WHITE, (10, 10, 10)]]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 128, 129, 256, 257, 1000, 40000, 65406, 65407, 65535]], dtype=np.uint16)
    shown = np.asarray(open_image(save(tmp_path, Image.fromarray(values), suffix)))
    expected = [round(value * 255 / 65535) for value in values[0].tolist()]
    assert shown[0, :, 0].tolist() == expected
    assert expected[:2] == [0, 0]
    assert 150 < expected[6] < 160
    assert (shown == shown[..., :1]).all()


def test_a_grey_of_sixteen_bits_may_be_transparent(tmp_path: Path) -> None:
    path = save(tmp_path, Image.fromarray(np.array([[1000, 1001]], dtype=np.uint16)), transparency=1000)
    assert colours(path) == [[WHITE, (4, 4, 4)]]


@pytest.mark.parametrize(("values", "says"), [([[70000]], "32-bit"), ([[-1]], "32-bit"), ([[0.5]], "floating-point")])
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, values: list[list[float]], says: str) -> None:
    dtype = np.float32 if isinstance(values[0][0], float) else np.int32
    path = save(tmp_path, Image.fromarray(np.array(values, dtype=dtype)), ".tif")
    with pytest.raises(UserError, match=rf"image.tif: {says}.*8 or 16 bits"):
        open_image(path)


# --- how it is displayed ---------------------------------------------------------------------------------


# EXIF 2.3, tag 274: which side of the scene row 0 and column 0 of the stored image show.
STORED = {
    1: lambda shown: shown,  # top, left
    2: lambda shown: shown[:, ::-1],  # top, right
    3: lambda shown: shown[::-1, ::-1],  # bottom, right
    4: lambda shown: shown[::-1],  # bottom, left
    5: lambda shown: shown.transpose(1, 0, 2),  # left, top
    6: lambda shown: shown[:, ::-1].transpose(1, 0, 2),  # right, top
    7: lambda shown: shown[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
    8: lambda shown: shown[::-1].transpose(1, 0, 2),  # left, bottom
}


@pytest.mark.parametrize("orientation", sorted(STORED))
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_the_size_is_the_displayed_one_and_the_top_is_up(tmp_path: Path, orientation: int, suffix: str) -> None:
    shown = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 13
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"lossless": True} if suffix == ".webp" else {}
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](shown)))
    opened = open_image(save(tmp_path, stored, suffix, exif=exif, **options))
    assert opened.size == (3, 2)
    assert np.array_equal(np.asarray(opened), shown)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
def test_of_several_frames_the_first_is_taken(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN)]
    path = save(tmp_path, frames[0], suffix, save_all=True, append_images=frames[1:])
    with Image.open(path) as image:
        assert image.n_frames == 2
    assert np.abs(np.asarray(open_image(path)).astype(int) - RED).max() <= 4


# --- what cannot be opened -------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".webp", ".bmp"])
def test_a_file_that_is_cut_off_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    path = save(tmp_path, Image.fromarray(noise), suffix)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"image{suffix}: "):
        open_image(path)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"<svg></svg>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"]
)
def test_what_is_not_an_image_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"photo\.png: not an image .* PNG or JPEG"):
        open_image(path)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.png: no such file"):
        open_image(str(tmp_path / "none.png"))
    with pytest.raises(UserError, match="cannot be read"):
        open_image(tmp_path)


def claims(path: Path, width: int, height: int) -> Path:
    """A PNG of a hundred bytes that claims to be of this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")))
    return path


@pytest.mark.parametrize("side", [8001, 9000, 10_000, 60_000])
def test_a_huge_image_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    with pytest.raises(UserError, match=r"bomb\.png: .*scale it down"):  # decoding would say that it is cut off
        open_image(claims(tmp_path / "bomb.png", side, side))


def test_the_limit_is_a_number_of_pixels(tmp_path: Path) -> None:
    path = save(tmp_path, Image.new("RGB", (10, 20)))
    assert open_image(path, max_pixels=200).size == (10, 20)
    with pytest.raises(UserError, match=r"image\.png: 10 x 20 pixels, more than the 199"):
        open_image(path, max_pixels=199)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".webp", ".bmp", ".ppm"])
def test_damaged_bytes_give_an_image_or_an_error_of_ours(tmp_path: Path, suffix: str) -> None:
    draw = random.Random(0)
    path = save(tmp_path, Image.effect_noise((24, 18), 90).convert("RGB"), suffix)
    whole = path.read_bytes()
    refused = []
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 1, 4])):
            damaged[draw.randrange(min(len(damaged), 80))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            assert open_image(path).mode == "RGB"
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 5
    assert all(str(path) in message for message in refused)


# --- content ---------------------------------------------------------------------------------------------


def test_the_hash_is_of_what_is_shown(tmp_path: Path) -> None:
    image = Image.new("RGB", (3, 2), RED)
    same = [save(tmp_path, image, ".png"), save(tmp_path, image, ".bmp"), save(tmp_path, image.convert("RGBA"), ".tif")]
    assert len({image_sha256(open_image(path)) for path in same}) == 1
    others = [Image.new("RGB", (2, 3), RED), Image.new("RGB", (3, 2), GREEN)]
    assert len({image_sha256(one) for one in [image, *others]}) == 3
