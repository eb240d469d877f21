"""Scenes are what they say: boxes hold exactly the drawn pixels, sentences are true,
seeds repeat, worlds are wide enough.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from runtime.contract.boxes import iou, parse_box
from runtime.evaluation.metrics import score
from trainer.datasets.held_out import held_out_scenes
from trainer.datasets.scene_text import (
    CAPTION_PROMPTS,
    QUESTIONS,
    caption,
    chat_samples,
    scene_samples,
)
from trainer.datasets.scenes import COLOURS, SHAPES, SIZES, dense_labels, draw_scene

SCENES = [draw_scene(np.random.default_rng((1, index))) for index in range(60)]


def test_the_world_is_wide_enough() -> None:
    assert len(COLOURS) >= 7 and len(SHAPES) >= 4 and len(SIZES) == 2
    assert {len(scene.things) for scene in SCENES} == {1, 2, 3, 4}
    aspects = [scene.image.width / scene.image.height for scene in SCENES]
    assert min(aspects) < 0.75 and max(aspects) > 1.33


def test_the_same_seed_draws_the_same_scene() -> None:
    again = draw_scene(np.random.default_rng((1, 0)))
    assert again.things == SCENES[0].things and again.image.tobytes() == SCENES[0].image.tobytes()


@pytest.mark.parametrize("index", range(20))
def test_boxes_hold_exactly_the_drawn_pixels(index: int) -> None:
    scene = SCENES[index]
    pixels = np.asarray(scene.image, int)
    for thing in scene.things:
        near = np.abs(pixels - COLOURS[thing.colour]).max(2) <= 14
        x1, y1, x2, y2 = (
            round(v * s)
            for v, s in zip(thing.box, (*scene.image.size, *scene.image.size), strict=True)
        )
        inside = near[y1 : y2 + 1, x1 : x2 + 1]
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        found = (x1 + columns[0], y1 + rows[0], x1 + columns[-1] + 1, y1 + rows[-1] + 1)
        assert iou(found, (x1, y1, x2, y2)) > 0.85


def test_things_do_not_touch_and_lie_inside() -> None:
    for scene in SCENES:
        for a, thing in enumerate(scene.things):
            assert 0 <= thing.box[0] < thing.box[2] <= 1 and 0 <= thing.box[1] < thing.box[3] <= 1
            assert all(iou(thing.box, other.box) == 0 for other in scene.things[a + 1 :])


def test_dense_labels_agree_with_the_boxes() -> None:
    for scene in SCENES[:20]:
        labels = dense_labels(scene, 8)
        for row, column in np.argwhere(labels[:, 0].reshape(8, 8) > 0):
            x1, y1, x2, y2 = labels[row * 8 + column, 3:7]
            assert x1 < (column + 1) / 8 and column / 8 < x2 and y1 < (row + 1) / 8 and row / 8 < y2
        assert {tuple(np.round(box, 4)) for box in labels[labels[:, 0] > 0][:, 3:7]} <= {
            tuple(np.round(np.array(t.box, np.float32), 4)) for t in scene.things
        }


PLURALS = {"crosses": "cross", "circles": "circle", "squares": "square", "triangles": "triangle"}
ATTRIBUTES = {*COLOURS, *SHAPES, *SIZES}


def fitting(words: list[str], things: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        thing
        for thing in things
        if all(word in thing.values() for word in words if word in ATTRIBUTES)
    ]


def true_answer(kind: str, text: str, things: list[dict[str, Any]]) -> str:
    """Answers a question from the list of things alone, independently of the
    generator's own logic.
    """
    words = [PLURALS.get(word, word) for word in text.rstrip("?").split()]
    if kind == "size":
        words = words[: words.index("small")]
        return str(fitting(words, things)[0]["size"])
    if kind in ("colour", "shape"):
        return str(fitting(words, things)[0][kind])
    if kind == "count":
        return str(len(fitting(words, things)))
    if kind == "existence":
        return "yes" if fitting(words, things) else "no"
    cut = next(i for i, word in enumerate(words) if word in ("left", "right", "above", "below"))
    (ax, ay), (bx, by) = (fitting(part, things)[0]["centre"] for part in (words[:cut], words[cut:]))
    return (
        "yes"
        if {"left": ax < bx, "right": ax > bx, "above": ay < by, "below": ay > by}[words[cut]]
        else "no"
    )


def test_every_question_has_the_true_answer_and_every_kind_occurs() -> None:
    seen = set()
    for index, scene in enumerate(SCENES):
        things: list[dict[str, Any]] = [
            {"colour": t.colour, "shape": t.shape, "size": t.size, "centre": t.centre}
            for t in scene.things
        ]
        for sample in scene_samples(scene, np.random.default_rng(index), questions=8):
            if sample.task == "vqa":
                seen.add(sample.kind)
                assert sample.answer == true_answer(sample.kind, sample.text, things), sample.text
    assert seen == set(QUESTIONS)


def test_phrases_fit_one_thing_and_carry_its_box() -> None:
    for index, scene in enumerate(SCENES):
        for sample in scene_samples(scene, np.random.default_rng(index), phrases=4):
            if sample.task == "ground":
                fitting = [
                    t
                    for t in scene.things
                    if set(sample.text.split()) <= {t.colour, t.shape, t.size}
                ]
                assert len(fitting) == 1 and sample.box == fitting[0].box
                assert iou(parse_box(sample.answer) or (0, 0, 0, 0), fitting[0].box) > 0.75
                assert score(sample, sample.answer).value == 1


def test_captions_name_everything_and_chats_alternate() -> None:
    for index, scene in enumerate(SCENES):
        assert all(f"{t.size} {t.colour} {t.shape}" in caption(scene) for t in scene.things)
        assert all(
            sample.prompt().has_image
            for sample in chat_samples(scene, np.random.default_rng(index))
        )
    assert "describe" in CAPTION_PROMPTS


def test_held_out_scenes_count_per_task_and_repeat() -> None:
    first, second = list(held_out_scenes(7)), list(held_out_scenes(7))
    tasks = [sample.task for example in first for sample in example.samples]
    assert {task: tasks.count(task) for task in set(tasks)} == {"caption": 7, "vqa": 7, "ground": 7}
    assert [e.samples for e in first] == [e.samples for e in second]
