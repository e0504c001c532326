"""Opening the images of rows: whatever is in the file, RGB as a viewer shows it, or an error that names the file.

Of several frames or pages (GIF, WebP, APNG, TIFF) the first is taken. Colour profiles are not applied.

Shapes: H × W pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from lcia.errors import UserError

# No more than this is decoded: 64 megapixels are 200 MB as RGB, and more than any camera's usual picture. A file of a
# few kB can claim any size. Pillow's own limit, 179 megapixels, holds beside a higher one given to `open_image`.
MAX_PIXELS = 64_000_000

# Pixel formats only: other plugins of Pillow start programs (EPS) or guess (raw data).
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")

Colour = tuple[int, int, int]  # red, green, blue, from 0 to 255

_TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height

# What Pillow's decoders raise on files that are broken or cut off.
_BROKEN = (
    EOFError,
    IndexError,
    KeyError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


def open_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image at `path`, mode RGB, in the size in which it is displayed (EXIF rotation applied).

    What is transparent is shown on white. 16 bits are scaled to 8, not clipped.

    Raises:
        UserError: no such file, not an image, broken, cut off, larger than `max_pixels`, or pixels of unknown range.
    """
    with _head(path) as image:
        if image.width * image.height > max_pixels:
            raise UserError(
                f"image {path}: {image.width} x {image.height} pixels, more than the {max_pixels:,} "
                "that are opened; scale it down"
            )
        return _as_rgb(ImageOps.exif_transpose(image), path)


@contextlib.contextmanager
def _head(path: str | Path) -> Iterator[Image.Image]:
    """The image at `path`, of which only the file's head has been read; errors inside name the file."""
    Image.init()  # the plugins that this installation of Pillow has
    try:
        with Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            yield image
    except FileNotFoundError:
        raise UserError(f"image {path}: no such file") from None
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"image {path}: cannot be read: {error.strerror}") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"image {path}: not an image that is understood; save it as PNG or JPEG") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"image {path}: too large to be opened ({error}); scale it down") from None
    except _BROKEN as error:
        raise UserError(f"image {path}: broken or cut off ({error}); get it again or save it anew") from None


def square_size(width: int, height: int) -> tuple[int, int]:
    """Width and height, in pixels, of the square that holds an image.

    Raises:
        UserError: it has more than MAX_PIXELS.
    """
    side = max(width, height)
    if side * side > MAX_PIXELS:
        raise UserError(
            f"{width} x {height} pixels, as a square more than the {MAX_PIXELS:,} that are opened; scale it down"
        )
    return side, side


def padded_to_square(image: Image.Image, colour: Colour) -> Image.Image:
    """The image in the middle of a square: nothing of it is cut off or stretched.

    Raises:
        UserError: the square is too large.
    """
    size = square_size(*image.size)
    square = Image.new("RGB", size, colour)
    square.paste(image, ((size[0] - image.width) // 2, (size[1] - image.height) // 2))
    return square


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of what `open_image` gives, in pixels; only the file's head is read.

    Raises:
        UserError: as `open_image`, as far as the head tells.
    """
    with _head(path) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation) in _TURNED
        return image.size[::-1] if turned else image.size


def image_sha256(image: Image.Image) -> str:
    """sha256 of what `open_image` returns: equal for files that show the same, whatever their format."""
    digest = hashlib.sha256(f"{image.mode} {image.width}x{image.height}".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def _as_rgb(image: Image.Image, path: str | Path) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        image = _scaled_to_8_bits(image, path)
    if image.mode == "F":
        raise UserError(f"image {path}: floating-point pixels, whose range is unknown; save it with 8 or 16 bits")
    if not image.has_transparency_data:
        return image.convert("RGB")
    shown = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")


def _scaled_to_8_bits(image: Image.Image, path: str | Path) -> Image.Image:
    """Greyscale of 16 bits as greyscale of 8, or as greyscale and alpha where one grey counts as transparent."""
    values = np.asarray(image).astype(np.int64)  # (H, W)
    if values.size and not (values.min() >= 0 and values.max() <= 65535):
        raise UserError(f"image {path}: 32-bit pixels, whose range is unknown; save it with 8 or 16 bits")
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 = 255 · 257, rounded to the nearest
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey
    alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    return Image.merge("LA", (grey, alpha))
