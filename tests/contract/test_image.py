"""Images in: every pixel mode has a defined conversion, every hostile file one typed
error, and pixels are bit-exact.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.contract.errors import ImageError
from runtime.contract.image import MEAN_COLOUR, open_image, to_pixels
from tests.conftest import TINY


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP", "JPEG"])
def test_allowed_formats_open(format: str) -> None:
    opened = open_image(encoded(Image.new("RGB", (20, 10), (10, 200, 30)), format))
    assert opened.mode == "RGB" and opened.size == (20, 10)
    assert np.abs(np.asarray(opened, int)[5, 5] - (10, 200, 30)).max() <= 4


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (20, 10), "black")
    image.paste((255, 0, 0), (0, 0, 5, 10))
    exif = Image.Exif()
    exif[274] = 6  # rotate 90 degrees clockwise to display
    opened = open_image(encoded(image, "PNG", exif=exif))
    assert opened.size == (10, 20)
    assert opened.getpixel((5, 1)) == (255, 0, 0) and opened.getpixel((5, 18)) == (0, 0, 0)


def test_transparency_shows_the_mean_colour() -> None:
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((0, 255, 0, 255), (0, 0, 4, 8))
    opened = open_image(encoded(image))
    assert opened.getpixel((1, 1)) == (0, 255, 0) and opened.getpixel((6, 1)) == MEAN_COLOUR


def test_palette_with_transparency_and_grey_alpha() -> None:
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert open_image(encoded(palette)).getpixel((0, 0)) == (255, 0, 0)
    assert open_image(encoded(palette, transparency=0)).getpixel((0, 0)) == MEAN_COLOUR
    assert open_image(encoded(Image.new("LA", (8, 8), (9, 0)))).getpixel((0, 0)) == MEAN_COLOUR


def test_cmyk_is_converted() -> None:
    opened = open_image(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    pixel = opened.getpixel((4, 4))
    assert isinstance(pixel, tuple)
    red, green, blue = pixel
    assert red > 200 and green < 60 and blue < 60


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (257 * 100, 100), (65535, 255)])
def test_sixteen_bit_is_scaled_not_clipped(value: int, expected: int) -> None:
    image = Image.fromarray(np.full((8, 8), value, np.uint16))
    assert open_image(encoded(image)).getpixel((0, 0)) == (expected,) * 3


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert open_image(data).getpixel((0, 0)) == (255, 0, 0)


def test_every_truncation_of_a_jpeg_is_an_image_error_or_opens() -> None:
    data = encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")
    refused = 0
    for end in range(0, len(data) - 2, 37):
        with pytest.raises(ImageError):
            open_image(data[:end])
        refused += 1
    assert refused > 20


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"this is a text file, whatever its name says", "not a JPEG"),
        (encoded(Image.new("RGB", (8, 8)), "GIF"), "not a JPEG"),
        (png_header(30000, 30000), "pixels"),
        (png_header(9000, 9000), "pixels"),
        (png_header(1, 1), "at least"),
        (png_header(1, 10000), "at least"),
        (png_header(64, 64), "truncated or damaged"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "image"),
    ],
)
def test_bad_bytes_give_one_clear_line(data: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=words) as caught:
        open_image(data)
    assert "\n" not in str(caught.value)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "absent.png", tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(ImageError):
            open_image(path)


def test_stretch_fills_and_pad_keeps_the_aspect() -> None:
    image = Image.new("RGB", (40, 20), (255, 255, 255))
    white = (1 - np.array([0.48145466, 0.4578275, 0.40821073])) / np.array(
        [0.26862954, 0.26130258, 0.27577711]
    )
    stretched = to_pixels(image, TINY)
    assert stretched.shape == (1, 3, 32, 32) and stretched.dtype == np.float32
    assert np.allclose(stretched[0], white[:, None, None], atol=1e-6)
    padded = to_pixels(image, replace(TINY, image_mode="pad"))
    assert np.allclose(padded[0, :, 16, 16], white, atol=1e-6)
    assert np.abs(padded[0, :, 1, 16]).max() < 0.02  # the mean colour is next to zero


def test_padding_an_extremely_long_picture_takes_bounded_memory() -> None:
    pixels = to_pixels(
        Image.new("RGB", (60000, 4), (255, 255, 255)), replace(TINY, image_mode="pad")
    )
    assert pixels.shape == (1, 3, 32, 32) and np.isfinite(pixels).all()


def test_pixels_equal_the_formula_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mean, std = (
        np.array([0.48145466, 0.4578275, 0.40821073]),
        np.array([0.26862954, 0.26130258, 0.27577711]),
    )
    expected = ((values / 255.0 - mean) / std).astype(np.float32).transpose(2, 0, 1)
    assert np.array_equal(to_pixels(Image.fromarray(values), TINY)[0], expected)
