"""Drawing boxes on pictures, for people."""

from __future__ import annotations

from collections.abc import Iterable

from PIL import Image, ImageDraw

from runtime.contract.boxes import Box, to_pixel_box

__all__ = ["FOUND", "TRUE", "draw_boxes"]

TRUE, FOUND = (40, 180, 70), (230, 40, 60)
"""Colours (RGB) of true and predicted boxes."""


def draw_boxes(image: Image.Image, boxes: Iterable[tuple[Box, tuple[int, int, int]]]) -> Image.Image:
    """A copy of an RGB picture with outlines of boxes (in [0, 1]) in their colours, 1/150 of the longer side thick (2 pixels at least)."""
    shown = image.copy()
    draw = ImageDraw.Draw(shown)
    for box, colour in boxes:
        x1, y1, x2, y2 = to_pixel_box(box, *image.size)
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=max(2, max(image.size) // 150))
    return shown
