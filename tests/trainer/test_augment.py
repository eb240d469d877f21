"""Augmentation keeps boxes right, sentences follow what is in view, and labels per
patch say what is in front.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from runtime.contract.boxes import parse_box
from runtime.contract.image import to_square
from runtime.data.sample import Sample
from tests.conftest import TINY
from trainer.datasets.augment import AUGMENTATIONS
from trainer.datasets.detection import ClassName, Thing, dense_labels, detection_samples, visible
from trainer.datasets.draw import move_samples


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(AUGMENTATIONS)),
    st.integers(0, 2**32),
    st.tuples(st.integers(40, 200), st.integers(40, 200)),
    st.tuples(st.floats(0, 0.9), st.floats(0, 0.9), st.floats(0.08, 1), st.floats(0.08, 1)),
)
def test_a_box_drawn_before_equals_the_box_computed_after(
    name: str, seed: int, size: tuple[int, int], place: tuple[float, float, float, float]
) -> None:
    """A rectangle is painted on a black image; after the augmentation its pixels span
    the box the sample then has, to within a pixel.
    """
    width, height = size
    x1, y1 = int(place[0] * width), int(place[1] * height)
    x2, y2 = (
        min(width, x1 + max(3, int(place[2] * width))),
        min(height, y1 + max(3, int(place[3] * height))),
    )
    image = Image.new("RGB", size)
    image.paste((255, 255, 255), (x1, y1, x2, y2))
    sample = Sample("ground", "it", "", box=(x1 / width, y1 / height, x2 / width, y2 / height))
    moved, [after] = move_samples(AUGMENTATIONS[name], image, [sample], np.random.default_rng(seed))
    ys, xs = np.nonzero(np.asarray(moved)[:, :, 0] > 127)
    assert after.box is not None
    found = (
        xs.min() / moved.width,
        ys.min() / moved.height,
        (xs.max() + 1) / moved.width,
        (ys.max() + 1) / moved.height,
    )
    assert found == pytest.approx(after.box, abs=1e-9)
    assert parse_box(after.answer) == pytest.approx(after.box, abs=0.0051)
    square = AUGMENTATIONS[name].finish(to_square(moved, TINY), np.random.default_rng(seed))
    assert square.size == (TINY.vision.image_size,) * 2


def test_sentences_follow_what_is_in_view() -> None:
    names = [ClassName("cell", "cells"), ClassName("egg", "eggs")]
    things = [
        Thing(0, (0, 0, 10, 10)),
        Thing(0, (-4, 0, 6, 10)),
        Thing(1, (-6, 0, 4, 10)),
        Thing(1, (90, 70, 110, 80)),
    ]
    shown = visible(things, 100, 80)
    assert [thing.label for thing in shown] == [0, 0, 1] and shown[2].box == pytest.approx(
        (0.9, 0.875, 1, 1)
    )
    samples = detection_samples(shown, names, "a slide")
    assert samples[0].answer == "a slide with 2 cells and an egg"
    assert [s.text for s in samples if s.task == "ground"] == ["egg"]
    assert detection_samples([], names, "a slide")[0].answer == "a slide"
    many = detection_samples([Thing(0, (0, 0, 1, 1))] * 12, names, "a slide")
    assert many[0].answer == "a slide with many cells" and many[1].answer == "12"


def test_patch_labels_put_small_things_in_front() -> None:
    big, small = Thing(0, (0, 0, 1, 1)), Thing(1, (0.25, 0.25, 0.5, 0.5))
    labels = dense_labels([small, big], 4)
    assert labels[:, 0].reshape(4, 4).tolist() == [
        [1, 1, 1, 1],
        [1, 2, 1, 1],
        [1, 1, 1, 1],
        [1, 1, 1, 1],
    ]
    assert labels[5, 1:5].tolist() == [0.25, 0.25, 0.5, 0.5] and labels[:, 5:].all()
    assert not dense_labels([], 4).any()
