"""Held-out scenes for evaluation: a fixed sequence of scenes from seeds no training run uses. Needs numpy and Pillow only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from runtime.contract.sample import Example
from trainer.datasets.scene_text import caption_sample, ground_sample, vqa_sample
from trainer.datasets.scenes import draw_scene

__all__ = ["HELD_OUT_SEED", "held_out_scenes"]

HELD_OUT_SEED = 0x48454C44
"""First word of the generator seeds; training seeds are (1000 * seed + stage, step) and stay far below it."""


def held_out_scenes(count: int) -> Iterator[Example]:
    """Scenes until there are `count` captions, questions and grounding phrases each; the same scenes for every call."""
    grounded = index = 0
    while index < count or grounded < count:
        rng = np.random.default_rng((HELD_OUT_SEED, index))
        scene = draw_scene(rng)
        samples = [caption_sample(scene, rng, "describe"), vqa_sample(scene, rng)] if index < count else []
        phrase = ground_sample(scene, rng)
        if phrase and grounded < count:
            samples.append(phrase)
            grounded += 1
        yield Example(scene.image, tuple(samples), name=f"scene {index}")
        index += 1
