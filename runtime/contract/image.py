"""The only image preprocessing: reads a file or bytes as an RGB image and turns an
image into `pixels`.

Reading is defensive: the format is allow-listed by content, the size is checked in the
header before decoding, and truncated files are refused. Every pixel mode has a defined
result: EXIF orientation is applied, alpha and palettes are composed over the mean
colour, CMYK is converted and 16-bit values are scaled to 8 bit. Training and inference
share `to_pixels`, so the device sees bit for bit the pixels that the model saw in
training.
"""

from __future__ import annotations

import io
import math
import os
import stat
import struct
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from runtime.contract.errors import ImageError
from runtime.contract.spec import ModelSpec

__all__ = ["MEAN_COLOUR", "image_size", "open_image", "read_image_bytes", "to_pixels", "to_square"]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MEAN_COLOUR = (122, 116, 104)
"""Background behind transparency and around padded images: the mean above as 8-bit RGB.
"""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MAX_BYTES = 64 << 20
MAX_PIXELS = 64_000_000
MIN_SIDE = 4
_ORIENTATION, _QUARTER_TURNS = 0x0112, 5  # EXIF tag; values of 5 or more swap width and height

# (value / 255 - mean) / std for every byte value and channel: [3, 256] float32.
_NORMALISE = (
    (np.arange(256, dtype=np.float64) / 255.0)[None, :] - np.array(MEAN)[:, None]
) / np.array(STD)[:, None]
_LOOKUP: NDArray[np.float32] = _NORMALISE.astype(np.float32)


def read_image_bytes(path: str | os.PathLike[str]) -> bytes:
    """Reads a regular file of at most 64 MiB. Raises `ImageError` for anything else."""
    where = Path(path)
    try:
        descriptor = os.open(where, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise ImageError(f"image {where} does not exist; check the path") from None
    except (OSError, ValueError) as error:
        raise ImageError(
            f"image {where} cannot be opened: {getattr(error, 'strerror', None) or error}"
        ) from None
    try:
        info = os.fstat(descriptor)
        if not stat.S_ISREG(info.st_mode):
            raise ImageError(
                f"image {where} is not a regular file; give a JPEG, PNG, WebP or BMP file, or - "
                f"for standard input"
            )
        if info.st_size > MAX_BYTES:
            raise ImageError(
                f"image {where} has {info.st_size} bytes, at most {MAX_BYTES} are read; scale it "
                f"down first"
            )
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(MAX_BYTES + 1)
    finally:
        os.close(descriptor)


def open_image(source: str | os.PathLike[str] | bytes, name: str = "") -> Image.Image:
    """Reads an image as displayed: 8-bit RGB with the EXIF orientation applied.
    Animations give their first frame.

    `source` is a path or the file's bytes; `name` is what errors call the bytes. Raises
    `ImageError`.
    """
    data = source if isinstance(source, bytes) else read_image_bytes(source)
    where = f"image {name}".strip() if isinstance(source, bytes) else f"image {os.fspath(source)}"
    if not data:
        raise ImageError(f"{where} is empty (0 bytes); give a JPEG, PNG, WebP or BMP file")
    if len(data) > MAX_BYTES:
        raise ImageError(f"{where} has more than {MAX_BYTES} bytes; scale it down first")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # sizes are checked below; warnings about damaged metadata would not help the user
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_size(image.size, where)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        raise ImageError(
            f"{where} declares more than {MAX_PIXELS} pixels; scale it down first"
        ) from None
    except UnidentifiedImageError:
        raise ImageError(
            f"{where} is not a JPEG, PNG, WebP or BMP image (by its content); convert it first"
        ) from None
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        LookupError,
        TypeError,
        ArithmeticError,
        MemoryError,
        struct.error,
        AttributeError,
    ) as error:
        # Pillow's decoders raise any of these on damaged files.
        raise ImageError(
            f"{where} is truncated or damaged ({error}); copy or convert it again"
        ) from None


def _check_size(size: tuple[int, int], where: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{where} is {width}x{height}, at most {MAX_PIXELS} pixels are decoded; scale it down "
            f"first"
        )
    if min(width, height) < MIN_SIDE:
        raise ImageError(
            f"{where} is {width}x{height}, both sides must be at least {MIN_SIDE} pixels"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N"):
        values = np.asarray(image).astype(np.float64)
        return Image.fromarray((values / 257.0).round().clip(0, 255).astype(np.uint8)).convert(
            "RGB"
        )
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (*MEAN_COLOUR, 255))
        return Image.alpha_composite(ground, layer).convert("RGB")
    return image.convert("RGB")


def _pad(image: Image.Image) -> Image.Image:
    """Pads an image to a square of the mean colour, with the image centred. Extremely
    long images are shrunk first, so that the square stays within the pixel limit.
    """
    longest = math.isqrt(MAX_PIXELS)
    if max(image.size) > longest:
        scale = longest / max(image.size)
        image = image.resize(
            (max(1, round(image.width * scale)), max(1, round(image.height * scale))),
            Image.Resampling.BICUBIC,
        )
    side = max(image.size)
    square = Image.new("RGB", (side, side), MEAN_COLOUR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def image_size(path: Path) -> tuple[int, int]:
    """Returns (width, height) as displayed, from the header only. Raises `ImageError`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                turned = image.getexif().get(_ORIENTATION, 1) >= _QUARTER_TURNS
    except Exception as error:  # Pillow raises many exception types on damaged files
        raise ImageError(
            f"image {path} is damaged or not a JPEG, PNG, WebP or BMP image ({error}); copy or "
            f"convert it again"
        ) from None
    return (height, width) if turned else (width, height)


def to_square(image: Image.Image, spec: ModelSpec) -> Image.Image:
    """Resizes an image to S x S: stretched, or in mode "pad" first centred on a square
    of the mean colour. The filter is bicubic with antialiasing.
    """
    size = spec.vision.image_size
    if spec.image_mode == "pad" and image.width != image.height:
        image = _pad(image)
    return (
        image
        if image.size == (size, size)
        else image.resize((size, size), Image.Resampling.BICUBIC)
    )


def to_pixels(image: Image.Image, spec: ModelSpec) -> NDArray[np.float32]:
    """Converts an RGB image to the vision graph's input `pixels`: [1, 3, S, S] float32,
    made square and normalised with the CLIP mean and standard deviation.
    """
    size = spec.vision.image_size
    bytes_HWC = np.asarray(to_square(image, spec))
    pixels = np.empty((1, 3, size, size), np.float32)
    for channel in range(3):
        np.take(_LOOKUP[channel], bytes_HWC[:, :, channel], out=pixels[0, channel])
    return pixels
