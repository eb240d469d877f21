"""Turns boxes with class names into samples (captions, counting, presence and
grounding) and per-patch labels.

Sentences are written from the boxes that are visible, so they stay true after a crop or
a mirror.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.contract.boxes import Box, format_box, to_unit_box
from runtime.data.sample import Sample
from trainer.datasets.phrases import article, listed

__all__ = [
    "DENSE_SUB",
    "MANY",
    "ClassName",
    "Thing",
    "dense_labels",
    "detection_samples",
    "visible",
]

DENSE_SUB = 8  # label cells per side of a patch
_DENSE_COVER = 8  # cells out of 64 that a thing must cover to own the patch
MANY = 5  # captions say "many" from this count on
_MIN_VISIBLE = 0.5  # share of a box that must be inside the image


@dataclass(frozen=True)
class ClassName:
    """The singular and plural name of a class."""

    one: str
    several: str


@dataclass(frozen=True)
class Thing:
    """A box and its class (an index into the names). The box is in pixels or in [0, 1]."""

    label: int
    box: Box


def visible(things: Sequence[Thing], width: int, height: int) -> list[Thing]:
    """Returns the things with at least half of their box inside a width x height image.
    Their boxes are clipped and scaled to [0, 1].
    """
    kept = []
    for thing in things:
        x1, y1, x2, y2 = thing.box
        clipped = (max(0.0, x1), max(0.0, y1), min(float(width), x2), min(float(height), y2))
        inside = max(0.0, clipped[2] - clipped[0]) * max(0.0, clipped[3] - clipped[1])
        if inside > 0 and inside >= _MIN_VISIBLE * (x2 - x1) * (y2 - y1):
            kept.append(Thing(thing.label, to_unit_box(clipped, width, height)))
    return kept


def _count(name: ClassName, count: int) -> str:
    if count == 1:
        return f"{article(name.one)} {name.one}"
    return f"{count if count < MANY else 'many'} {name.several}"


def detection_samples(
    things: Sequence[Thing], names: Sequence[ClassName], scene: str
) -> list[Sample]:
    """Returns all samples for the visible things: one caption, a count and a presence
    question per class, and a phrase for each class with exactly one thing.
    """
    counts = [sum(thing.label == label for thing in things) for label in range(len(names))]
    parts = listed(
        [_count(name, count) for name, count in zip(names, counts, strict=True) if count]
    )
    samples = [
        Sample("caption", "describe", f"{scene} with {parts}" if parts else scene, kind="caption")
    ]
    for label, (name, count) in enumerate(zip(names, counts, strict=True)):
        samples.append(
            Sample(
                "vqa",
                f"how many {name.several} are there?",
                str(count),
                kind=f"count of {name.several}",
            )
        )
        samples.append(
            Sample(
                "vqa",
                f"are there any {name.several}?",
                "yes" if count else "no",
                kind=f"presence of {name.several}",
            )
        )
        if count == 1:
            box = next(thing.box for thing in things if thing.label == label)
            samples.append(Sample("ground", name.one, format_box(box), box=box, kind=name.one))
    return samples


def dense_labels(things: Sequence[Thing], grid: int) -> NDArray[np.float32]:
    """Returns labels of every patch, [grid*grid, 1 + 4 + 64] float32: class (0 for
    none, else index + 1), box (in [0, 1]), and which of its 8 x 8 cells are covered.

    Where boxes overlap, the smaller thing is in front.
    """
    side = grid * DENSE_SUB
    owners = np.zeros((side, side), np.int64)
    ordered = sorted(
        things, key=lambda thing: -(thing.box[2] - thing.box[0]) * (thing.box[3] - thing.box[1])
    )
    for index, thing in enumerate(ordered, 1):
        x1, y1, x2, y2 = (round(v * side) for v in thing.box)
        owners[y1:y2, x1:x2] = index
    cells = (
        owners.reshape(grid, DENSE_SUB, grid, DENSE_SUB)
        .transpose(0, 2, 1, 3)
        .reshape(grid * grid, -1)
    )
    labels = np.zeros((grid * grid, 5 + DENSE_SUB**2), np.float32)
    labels[:, 5:] = cells > 0
    if ordered:
        cover = np.stack([(cells == index).sum(1) for index in range(1, len(ordered) + 1)], axis=1)
        # The smallest thing that covers enough of a patch owns it. Small things are the hard
        # ones to see, such as a platelet on a patch full of red cells.
        for patch in np.flatnonzero(cover.max(1) >= _DENSE_COVER):
            thing = ordered[int(np.flatnonzero(cover[patch] >= _DENSE_COVER)[-1])]
            labels[patch, :5] = [thing.label + 1, *thing.box]
    return labels
