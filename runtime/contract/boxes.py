"""Boxes as text: `x1,y1 x2,y2`, four numbers in [0, 1] of the displayed image's width
and height.

The parser is strict: exactly four numbers, each 0, 1 or a decimal fraction. It orders
the corners but never clamps, so text with numbers above 1 is not a box. Unreadable text
gives None and callers keep the raw text (the original code turned failures into a zero
box).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from runtime.contract.errors import DataError

__all__ = [
    "Box",
    "box_continues",
    "box_ends",
    "check_inside",
    "find_boxes",
    "format_box",
    "iou",
    "parse_box",
    "to_pixel_box",
    "to_unit_box",
]

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2 with x1 <= x2 and y1 <= y2."""

BOX_DECIMALS = 2
_NUMBER = r"(?:0(?:\.\d{1,6})?|1(?:\.0{1,6})?|\.\d{1,6})"
_WRITTEN = r"(?:[01](?:\.\d{1,4})?)"
_WHOLE = re.compile(rf"{_WRITTEN},{_WRITTEN} {_WRITTEN},{_WRITTEN}")
_BOX = re.compile(
    rf"(?<![\d.])({_NUMBER})\s?,\s?({_NUMBER})\s({_NUMBER})\s?,\s?({_NUMBER})(?![\d]|\.\d)"
)


def _order(values: Sequence[float]) -> Box:
    x1, y1, x2, y2 = values
    return (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))


def format_box(box: Sequence[float], width: float = 1.0, height: float = 1.0) -> str:
    """Formats a pixel box of a width x height image (or a box in [0, 1]) as text, with
    the corners ordered and clamped to the image.
    """
    x1, y1, x2, y2 = _order(to_unit_box(box, width, height))
    return (
        f"{x1:.{BOX_DECIMALS}f},{y1:.{BOX_DECIMALS}f} {x2:.{BOX_DECIMALS}f},{y2:.{BOX_DECIMALS}f}"
    )


def find_boxes(text: str) -> list[Box]:
    """Returns every box in `text`, in order, in [0, 1]."""
    return [_order([float(v) for v in match.groups()]) for match in _BOX.finditer(text)]


def parse_box(text: str) -> Box | None:
    """Parses text that is exactly one box (white space and a final full stop are
    allowed). Returns None for anything else.
    """
    match = _BOX.fullmatch(text.strip().removesuffix("."))
    return _order([float(v) for v in match.groups()]) if match else None


def box_ends(text: str) -> bool:
    """Checks whether `text` is one complete box in the form models are trained to
    write: `x1,y1 x2,y2` with at most four decimals.
    """
    match = _WHOLE.fullmatch(text)
    return match is not None and parse_box(text) is not None


def box_continues(text: str) -> bool:
    """Checks whether `text` is a prefix of such a box, or already a complete one."""
    return any(box_ends(text + rest) for rest in _completions(text))


def _completions(text: str) -> list[str]:
    """Returns candidate endings that would turn `text` into a complete box: one that
    keeps the current number as it is, one that first adds a digit to it.
    """
    wanted = ",0 0,0"  # a separator, a number, and so on
    done = sum(text.count(mark) for mark in ", ")
    rest = wanted[2 * done :]
    return [rest, f"0{rest}"]


def to_pixel_box(box: Box, width: int, height: int) -> Box:
    """Scales a box in [0, 1] to pixels of a width x height image."""
    return (box[0] * width, box[1] * height, box[2] * width, box[3] * height)


def to_unit_box(box: Sequence[float], width: float, height: float) -> Box:
    """Scales a box in pixels of a width x height image to [0, 1], clamped to the image."""
    x1, y1, x2, y2 = (
        min(1.0, max(0.0, value / side))
        for value, side in zip(box, (width, height, width, height), strict=True)
    )
    return (x1, y1, x2, y2)


def check_inside(box: Sequence[float], width: int, height: int, what: str) -> None:
    """Raises `DataError` unless a pixel box has a positive area and lies inside a width
    x height image. `what` names the box in the message.
    """
    x1, y1, x2, y2 = box
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise DataError(
            f"{what} does not lie inside the {width}x{height} image with x1 < x2 and y1 < y2"
        )


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Returns the intersection over union of two boxes in the same unit; 0 when both
    are empty.
    """
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inside = max(0.0, width) * max(0.0, height)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside
    return inside / union if union > 0 else 0.0
