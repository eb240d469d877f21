"""Draws boxes on images for people to look at."""

from __future__ import annotations

from collections.abc import Iterable

from PIL import Image, ImageDraw

from runtime.contract.boxes import Box, to_pixel_box

__all__ = ["FOUND", "TRUE", "draw_boxes", "truth_and_found"]

Colour = tuple[int, int, int]
TRUE: Colour = (40, 180, 70)
FOUND: Colour = (255, 0, 90)
"""RGB colours: `TRUE` for reference boxes, `FOUND` for predicted boxes."""


def truth_and_found(
    size: tuple[int, int], truth: Box | None, found: Box | None
) -> list[tuple[Box, Colour, str]]:
    """Prepares the reference box and the predicted box (in [0, 1]) for `draw_boxes` on
    an image of `size`. A box that is None is left out.
    """
    return [
        (to_pixel_box(box, *size), colour, "")
        for box, colour in ((truth, TRUE), (found, FOUND))
        if box
    ]


def draw_boxes(image: Image.Image, boxes: Iterable[tuple[Box, Colour, str]]) -> Image.Image:
    """Returns a copy of an RGB image with box outlines drawn. Each box is in pixels and
    has a colour and a label; an empty label is not drawn.
    """
    shown = image.copy()
    brush = ImageDraw.Draw(shown)
    width = max(2, round(min(image.size) / 150))
    for (x1, y1, x2, y2), colour, label in boxes:
        brush.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=width)
        if label:
            brush.text((x1 + width + 1, y1 + width), label, fill=colour)
    return shown
