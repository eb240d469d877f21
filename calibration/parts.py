"""Cuts a data set into disjoint parts, so that nothing is judged by what it was made from:
golden cases, questions and the pictures of `auto` are never calibrated on.

Images are ordered by a hash of their content, and each part is a fixed share of that
order. The same image always falls into the same part, whatever its name is and however
many rows ask about it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from runtime.data.sample import Example

__all__ = [
    "AUTO",
    "CALIBRATION",
    "FRESH",
    "GOLDENS",
    "MIN_DISJOINT",
    "QUESTIONS",
    "SENSITIVITY",
    "Part",
    "cut_part",
    "is_disjoint",
]

MIN_DISJOINT = 12
"""Fewest images of a data set that is cut into parts."""

_HASHED = 2000  # above that many images, their paths are hashed and not their bytes


@dataclass(frozen=True)
class Part:
    """A part of every data set: its share of the images, from `start` to `end`, and the seed
    of its order, from which synthetic scenes are generated too.
    """

    name: str
    seed: int
    start: float
    end: float


GOLDENS = Part("goldens", 20231, 0.0, 0.1)
FRESH = Part("fresh", 20232, 0.1, 0.2)
QUESTIONS = Part("questions", 20233, 0.2, 0.4)
AUTO = Part("auto", 20236, 0.4, 0.55)
SENSITIVITY = Part("sensitivity", 20235, 0.55, 0.6)
CALIBRATION = Part("calibration", 20230, 0.6, 1.0)


def cut_part(examples: Sequence[Example], part: Part) -> list[Example]:
    """Returns the examples of one part, in random order. A data set of fewer than
    `MIN_DISJOINT` images is not cut: every part is all of it.
    """
    groups = _by_image(examples)
    order = sorted(groups)
    if len(order) >= MIN_DISJOINT:
        count = len(order)
        order = order[round(part.start * count) : max(round(part.end * count), 1)]
    found = [example for key in order for example in groups[key]]
    shuffle = np.random.default_rng(part.seed).permutation(len(found))
    return [found[int(index)] for index in shuffle]


def is_disjoint(examples: Sequence[Example]) -> bool:
    """True if the data set has enough images to be cut into parts."""
    return len(_by_image(examples)) >= MIN_DISJOINT


def _by_image(examples: Sequence[Example]) -> dict[str, list[Example]]:
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(_key(example, len(examples) <= _HASHED), []).append(example)
    return groups


def _key(example: Example, content: bool) -> str:
    picture = example.picture
    if isinstance(picture, Image.Image):
        return hashlib.sha256(picture.tobytes()).hexdigest()
    return _file_key(picture) if content else hashlib.sha256(str(picture).encode()).hexdigest()


def _file_key(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:  # whoever draws the image reports it
        return hashlib.sha256(str(path).encode()).hexdigest()
