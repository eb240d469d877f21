"""Augmentation that keeps boxes right: crops and mirrors move image and boxes together;
blur and colour changes follow at the model's image size.

`crop` is the published recipe (area 0.5 to 1, optional blur), with a crop window that
contains the boxes of the samples. `photo` also mirrors and varies colour. It is for
data whose sentences are written after the crop, because a mirror or a crop can make an
existing sentence false.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from runtime.contract.boxes import Box
from runtime.contract.errors import UsageError

__all__ = ["AUGMENTATIONS", "Augmentation", "find_augmentation"]


@dataclass(frozen=True)
class Augmentation:
    """Ranges of the random changes. `area` is the smallest share of the image that a
    crop keeps; `colour` is the largest relative change of a channel.
    """

    area: float = 1.0
    stretch: float = 0.0
    mirror: bool = False
    blur: float = 0.0
    blur_radius: tuple[float, float] = (0.1, 2.0)
    colour: float = 0.0

    def move(
        self, image: Image.Image, boxes: Sequence[Box], rng: np.random.Generator, keep: Box | None
    ) -> tuple[Image.Image, list[Box]]:
        """Crops and mirrors. Returns the new image and the boxes in its pixels, not
        clipped. The crop contains all of `keep` (in pixels).
        """
        x, y, width, height = self._window(image.size, rng, keep)
        if (width, height) != image.size:
            image = image.crop((x, y, x + width, y + height))
        moved = [(x1 - x, y1 - y, x2 - x, y2 - y) for x1, y1, x2, y2 in boxes]
        if self.mirror and rng.random() < 0.5:
            image = ImageOps.mirror(image)
            moved = [(width - x2, y1, width - x1, y2) for x1, y1, x2, y2 in moved]
        if self.mirror and rng.random() < 0.5:
            image = ImageOps.flip(image)
            moved = [(x1, height - y2, x2, height - y1) for x1, y1, x2, y2 in moved]
        return image, moved

    def _window(
        self, size: tuple[int, int], rng: np.random.Generator, keep: Box | None
    ) -> tuple[int, int, int, int]:
        """Returns a random window (x, y, width, height) in whole pixels."""
        if self.area >= 1.0:
            return (0, 0, *size)
        share = rng.uniform(self.area, 1.0)
        aspect = math.exp(rng.uniform(-self.stretch, self.stretch))
        window = []
        for axis, factor in ((0, aspect), (1, 1 / aspect)):
            low, high = (
                (math.floor(max(0.0, keep[axis])), math.ceil(min(size[axis], keep[axis + 2])))
                if keep
                else (0, 0)
            )
            length = min(
                size[axis], max(4, high - low, round(size[axis] * math.sqrt(share * factor)))
            )
            first, last = (
                max(0, high - length),
                min(low if keep else size[axis], size[axis] - length),
            )
            window.append((int(rng.integers(first, last + 1)), length))
        (x, width), (y, height) = window
        return x, y, width, height

    def finish(self, square: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Blurs and recolours the image at the model's size."""
        if rng.random() < self.blur:
            # The published radius is for images of at least 224 pixels; it is scaled down in
            # proportion for smaller ones.
            square = square.filter(
                ImageFilter.GaussianBlur(
                    rng.uniform(*self.blur_radius) * min(1.0, square.width / 224)
                )
            )
        if self.colour:
            gain = (
                1
                + rng.uniform(-self.colour, self.colour)
                + rng.uniform(-self.colour / 2, self.colour / 2, 3)
            )
            shift = 255 * rng.uniform(-self.colour / 2, self.colour / 2)
            rows = [
                value
                for c in range(3)
                for value in (*(gain[c] if c == k else 0.0 for k in range(3)), shift)
            ]
            square = square.convert("RGB", tuple(float(v) for v in rows))
        return square


AUGMENTATIONS: dict[str, Augmentation] = {
    "none": Augmentation(),
    "crop": Augmentation(area=0.5, stretch=0.2, blur=0.5),
    "photo": Augmentation(area=0.4, stretch=0.2, mirror=True, blur=0.2, colour=0.16),
}


def find_augmentation(name: str) -> Augmentation:
    """Returns the augmentation with that name. Raises `UsageError` that lists the
    choices.
    """
    if name not in AUGMENTATIONS:
        raise UsageError(
            f"unknown augmentation {name!r}; choose one of: {', '.join(AUGMENTATIONS)}"
        )
    return AUGMENTATIONS[name]
