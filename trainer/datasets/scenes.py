"""Synthetic scenes: coloured shapes on plain or textured backgrounds, with varying
aspect ratios, drawn from a seeded generator.

The geometry of a scene is known exactly, so captions, questions, grounding boxes and
per-patch labels are exact and need no annotation. Needs numpy and Pillow only.
`scene_text` writes the sentences about a scene.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from runtime.contract.boxes import Box
from trainer.datasets.detection import DENSE_SUB

__all__ = ["COLOURS", "SHAPES", "SIZES", "Scene", "Thing", "dense_labels", "draw_scene", "pick"]

COLOURS = {
    "red": (215, 30, 35),
    "orange": (245, 130, 20),
    "yellow": (240, 220, 30),
    "green": (35, 150, 50),
    "cyan": (40, 200, 215),
    "blue": (30, 60, 210),
    "purple": (150, 40, 190),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": (0.085, 0.105), "large": (0.16, 0.20)}  # radius in units of sqrt(width * height)
MAX_THINGS = 4
_CANVAS = (128, 208)
_MAX_ASPECT = 1.6
_MAX_TILT = math.radians(12)
_DENSE_COVER = 8  # cells out of 64 that a thing must cover to own the patch


@dataclass(frozen=True)
class Thing:
    """One object: attributes, outline in pixels, and its tight box in [0, 1]."""

    colour: str
    shape: str
    size: str
    outline: tuple[tuple[float, float], ...]
    box: Box

    @property
    def centre(self) -> tuple[float, float]:
        """Returns the centre of the box in [0, 1]."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass(frozen=True)
class Scene:
    """An RGB image and its things, ordered from left to right."""

    image: Image.Image
    things: tuple[Thing, ...]


def draw_scene(rng: np.random.Generator, things: int | None = None) -> Scene:
    """Draws a scene of 1 to 4 things. With `things`, draws that many, or as many of
    them as fit without touching.
    """
    width, height = _canvas(rng)
    wanted = things if things is not None else int(rng.integers(1, MAX_THINGS + 1))
    placed = _place(rng, width, height, wanted)
    image = _ground(rng, width, height)
    draw = ImageDraw.Draw(image)
    for thing in placed:
        colour = np.array(COLOURS[thing.colour]) + rng.integers(-14, 15, 3)
        draw.polygon(list(thing.outline), fill=tuple(int(v) for v in colour.clip(0, 255)))
    return Scene(image, tuple(sorted(placed, key=lambda thing: thing.centre)))


def dense_labels(scene: Scene, grid: int) -> NDArray[np.float32]:
    """Returns labels of every patch, [grid*grid, 7 + 64] float32.

    The columns are colour, shape and size (0 for background, else index + 1), box (4,
    in [0, 1]), then which of the patch's 8 x 8 cells a thing covers.
    """
    side = grid * DENSE_SUB
    canvas = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(canvas)
    scale_x, scale_y = side / scene.image.width, side / scene.image.height
    for index, thing in enumerate(scene.things, 1):
        draw.polygon([(x * scale_x - 0.5, y * scale_y - 0.5) for x, y in thing.outline], fill=index)
    owners = (
        np.asarray(canvas)
        .reshape(grid, DENSE_SUB, grid, DENSE_SUB)
        .transpose(0, 2, 1, 3)
        .reshape(grid * grid, -1)
    )
    cover = np.stack(
        [(owners == index).sum(1) for index in range(1, len(scene.things) + 1)], axis=1
    )
    labels = np.zeros((grid * grid, 7 + DENSE_SUB**2), np.float32)
    labels[:, 7:] = owners > 0
    for patch in np.flatnonzero(cover.max(1) >= _DENSE_COVER):
        thing = scene.things[int(cover[patch].argmax())]
        ids = (
            list(COLOURS).index(thing.colour),
            SHAPES.index(thing.shape),
            list(SIZES).index(thing.size),
        )
        labels[patch, :7] = [*(i + 1 for i in ids), *thing.box]
    return labels


def pick(rng: np.random.Generator, items: Sequence[str]) -> str:
    """Returns one of `items`, drawn uniformly."""
    return items[int(rng.integers(len(items)))]


def _canvas(rng: np.random.Generator) -> tuple[int, int]:
    side = float(rng.uniform(*_CANVAS))
    aspect = math.exp(rng.uniform(-1, 1) * math.log(_MAX_ASPECT)) ** 0.5
    return round(side * aspect), round(side / aspect)


def _outline(shape: str, radius: float, tilt: float) -> NDArray[np.float64]:
    """Returns the corners of a shape around the origin, [n, 2]."""
    if shape == "circle":
        angles = np.arange(28) * (2 * math.pi / 28)
        return radius * np.stack([np.cos(angles), np.sin(angles)], 1)
    if shape == "square":
        points = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.88
    elif shape == "triangle":
        points = np.array([(0, -1.1), (1.05, 0.85), (-1.05, 0.85)])
    else:
        arm = 0.32
        corner = np.array([(-arm, -1), (arm, -1), (arm, -arm)])
        quarter = np.array([(0, 1), (-1, 0)])
        points = np.concatenate(
            [corner @ np.linalg.matrix_power(quarter, turns) for turns in range(4)]
        )
    turn = np.array([(math.cos(tilt), math.sin(tilt)), (-math.sin(tilt), math.cos(tilt))])
    return radius * points @ turn


def _place(rng: np.random.Generator, width: int, height: int, wanted: int) -> list[Thing]:
    placed: list[Thing] = []
    unit = math.sqrt(width * height)
    for _ in range(40 * wanted):
        if len(placed) == wanted:
            break
        size, shape = pick(rng, tuple(SIZES)), pick(rng, SHAPES)
        points = _outline(
            shape, unit * rng.uniform(*SIZES[size]), rng.uniform(-_MAX_TILT, _MAX_TILT)
        )
        low, high = points.min(0), points.max(0)
        room = np.array([width, height]) - (high - low) - 2
        if room.min() <= 0:
            continue
        points = points - low + 1 + rng.uniform(0, 1, 2) * room
        (x1, y1), (x2, y2) = points.min(0), points.max(0)
        box = (x1 / width, y1 / height, x2 / width, y2 / height)
        gap = 0.02
        if all(
            box[2] + gap < o[0] or o[2] + gap < box[0] or box[3] + gap < o[1] or o[3] + gap < box[1]
            for o in (t.box for t in placed)
        ):
            colour = pick(rng, tuple(COLOURS))
            placed.append(
                Thing(
                    colour,
                    shape,
                    size,
                    tuple((float(x), float(y)) for x, y in points),
                    tuple(map(float, box)),  # type: ignore[arg-type]
                )
            )
    return placed


def _ground(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Draws a muted background: plain, or with noise, a gradient, stripes or a checker
    pattern.
    """
    base = rng.uniform(40, 220) + rng.uniform(-18, 18, 3)
    kind = pick(rng, ("plain", "plain", "noise", "gradient", "stripes", "checker"))
    if kind == "plain":
        return Image.new("RGB", (width, height), tuple(int(v) for v in base.clip(0, 255)))
    x, y = np.arange(width, dtype=np.float32)[None, :], np.arange(height, dtype=np.float32)[:, None]
    amplitude = rng.uniform(8, 22)
    pattern: NDArray[np.floating]
    if kind == "noise":
        coarse = rng.normal(0, 1, (height // 4 + 1, width // 4 + 1)).astype(np.float32)
        pattern = np.repeat(np.repeat(coarse, 4, 0), 4, 1)[:height, :width]
    elif kind == "gradient":
        angle = rng.uniform(0, 2 * math.pi)
        pattern = (x / width - 0.5) * math.cos(angle) * 4 + (y / height - 0.5) * math.sin(angle) * 4
    elif kind == "stripes":
        angle, period = rng.uniform(0, math.pi), rng.uniform(6, 24)
        pattern = np.sign(
            np.sin((x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period))
        )
    else:
        cell = int(rng.integers(8, 28))
        pattern = np.where((x // cell + y // cell) % 2 == 0, 1.0, -1.0)
    pixels = base[None, None, :] + amplitude * np.broadcast_to(pattern, (height, width))[:, :, None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
