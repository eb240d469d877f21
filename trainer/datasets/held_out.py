"""Held-out scenes for evaluation: a fixed sequence of scenes whose seeds no training
run uses. Needs numpy and Pillow only.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from runtime.contract.errors import DataError
from runtime.data.bad_rows import Faults
from runtime.data.data_argument import DataSource
from runtime.data.sample import Example
from trainer.datasets.scene_text import caption_sample, ground_sample, vqa_sample
from trainer.datasets.scenes import draw_scene

__all__ = ["HELD_OUT_SEED", "held_out_scenes", "read"]

DEFAULT_COUNT = 200

HELD_OUT_SEED = 0x48454C44
"""First word of the generator seeds. Training seeds are (1000 * seed + stage, step) and
stay far below it.
"""


def held_out_scenes(count: int) -> Iterator[Example]:
    """Yields scenes until there are `count` captions, questions and grounding phrases
    each. Every call yields the same scenes.
    """
    grounded = index = 0
    while index < count or grounded < count:
        rng = np.random.default_rng((HELD_OUT_SEED, index))
        scene = draw_scene(rng)
        samples = (
            [caption_sample(scene, rng, "describe"), vqa_sample(scene, rng)]
            if index < count
            else []
        )
        phrase = ground_sample(scene, rng)
        if phrase and grounded < count:
            samples.append(phrase)
            grounded += 1
        yield Example(scene.image, tuple(samples), name=f"scene {index}")
        index += 1


def read(source: DataSource, faults: Faults) -> list[Example]:
    """Returns the held-out scenes of `synthetic[:COUNT]`, with COUNT samples of each
    task. Raises `DataError`.
    """
    count = source.argument or str(DEFAULT_COUNT)
    if not count.isascii() or not count.isdigit() or int(count) < 1:
        raise DataError(
            f"{source.text!r}: the count is {count!r}, expected a positive number such as "
            f"synthetic:500"
        )
    return list(held_out_scenes(int(count)))
