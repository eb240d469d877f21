"""Draws the calibration set: images with questions and answers of the kind the model
was trained on. The set is drawn by seed, listed and hashed.

The parity cases come from the same source. Random data is never used, because the
ranges and second moments of noise say nothing about real inputs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from calibration.parts import MIN_DISJOINT, Part, cut_part, is_disjoint
from runtime.contract.errors import DataError, InfMLLMError, UsageError
from runtime.contract.image import to_pixels
from runtime.contract.spec import ModelSpec
from runtime.contract.tokenizer import Tokenizer
from runtime.data.sample import Example, Sample
from runtime.evaluation.evaluate import open_examples
from trainer.batch import answer_ids
from trainer.datasets.scene_text import caption_sample, ground_sample, vqa_sample
from trainer.datasets.scenes import draw_scene

__all__ = [
    "MIN_IMAGES",
    "Case",
    "default_source",
    "draw_cases",
    "draw_examples",
    "overlap",
    "set_card",
]

SCENES = "synthetic"
MIN_IMAGES = 4
MAX_ANSWER = 16  # number of tokens kept of an answer
_FLAT = 4.0  # an image is flat if every channel spans less than this (of 255)


@dataclass(frozen=True)
class Case:
    """One question with its answer, ready to run: pixels [1,3,S,S], pool size, and the
    token ids before the image, after it and of the answer. `name` is for listings.
    """

    name: str
    pixels: NDArray[np.float32]
    pool_size: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    answer: tuple[int, ...]


def default_source(card: Mapping[str, Any], calib: str) -> str:
    """Returns the data argument to draw from: `calib`, or the training mix if it can be
    generated again. Raises `UsageError` otherwise.
    """
    if calib:
        return calib
    names = [str(row.get("name")) for row in card.get("data", []) if isinstance(row, Mapping)]
    if SCENES in names:
        return SCENES
    said = f"was trained on {', '.join(names)}" if names else "does not say what it was trained on"
    raise UsageError(
        f"calibration needs images like the training data, but the checkpoint's card {said}; "
        f"give such images with --calib DATA"
    )


def draw_examples(source: str, count: int, part: Part, least: int = 1) -> list[Example]:
    """Returns up to `count` examples of one part of a data argument, in random order.
    Synthetic scenes are generated. Raises `DataError` if there are fewer than `least`.
    """
    if source == SCENES:
        return list(_scenes(count, np.random.default_rng(part.seed)))
    found = _open(source)
    if len(found) < least:
        raise DataError(
            f"data {source!r} has {len(found)} images, calibration needs at least {least}; add more"
        )
    return cut_part(found, part)[:count]


def overlap(source: str) -> str:
    """Says that a data argument has too few images to be cut into disjoint parts; empty if
    it has enough.
    """
    if source == SCENES or is_disjoint(_open(source)):
        return ""
    return (
        f"data {source!r} has fewer than {MIN_DISJOINT} images, so the build is judged by images "
        f"that it was calibrated on; add more"
    )


@lru_cache(maxsize=2)
def _open(source: str) -> list[Example]:
    """Opens the examples of a data argument once. Unusable rows are counted and
    skipped. An image that is drawn later must be readable.
    """
    return open_examples(source, skip_bad=True)


def _scenes(count: int, rng: np.random.Generator) -> Iterator[Example]:
    for index in range(count):
        scene = draw_scene(rng)
        phrase = ground_sample(scene, rng)
        samples = [
            caption_sample(scene, rng, "describe"),
            vqa_sample(scene, rng),
            *([phrase] if phrase else []),
        ]
        yield Example(scene.image, tuple(samples), name=f"scene {index}")


def draw_cases(
    examples: Sequence[Example], spec: ModelSpec, tokenizer: Tokenizer, seed: int, least: int = 1
) -> list[Case]:
    """Makes one case of every example that fits the context, and takes tasks and pool
    sizes in turn.

    Raises `DataError` if an image is unreadable or constant (the error names it), or if
    fewer than `least` cases remain.
    """
    rng, cases = np.random.default_rng(seed), []
    for index, example in enumerate(examples):
        try:
            image, samples = example.load()
        except InfMLLMError as error:
            raise DataError(
                f"calibration image {example.name or example.picture} cannot be used: {error}"
            ) from None
        _check_picture(image.convert("RGB"), example.name)
        sample = _pick(samples, index, rng)
        p = spec.pool_sizes[index % len(spec.pool_sizes)]
        before, after = tokenizer.encode_prompt(sample.prompt())
        answer = answer_ids(tokenizer, sample)[:-1][
            :MAX_ANSWER
        ]  # without the end-of-sequence id, after which a model computes noise
        if len(before) + len(after) + len(answer) + p * p <= spec.decoder.context and answer:
            cases.append(
                Case(
                    example.name,
                    to_pixels(image, spec),
                    p,
                    tuple(before),
                    tuple(after),
                    tuple(answer),
                )
            )
    if len(cases) < least:
        raise DataError(
            f"only {len(cases)} of {len(examples)} questions fit the model's context, calibration "
            f"needs {least}; use shorter questions"
        )
    return cases


def _pick(samples: Sequence[Sample], index: int, rng: np.random.Generator) -> Sample:
    by_task = {samples[int(i)].task: samples[int(i)] for i in rng.permutation(len(samples))}
    return by_task[sorted(by_task)[index % len(by_task)]]


def _check_picture(image: Image.Image, name: str) -> None:
    values = np.asarray(image, np.float32)
    if float((values.max((0, 1)) - values.min((0, 1))).max()) < _FLAT:
        raise DataError(
            f"calibration image {name or 'without a name'} is one flat colour and would give wrong "
            f"ranges; remove it"
        )


def set_card(source: str, cases: Sequence[Case]) -> dict[str, Any]:
    """Returns the manifest's entry for a set: its source, its images, and a hash of
    everything that was run.
    """
    digest = hashlib.sha256()
    for case in cases:
        digest.update(case.pixels.tobytes())
        digest.update(repr((case.pool_size, case.before, case.after, case.answer)).encode())
    return {
        "source": source.split("/")[-1],
        "count": len(cases),
        "names": [case.name for case in cases],
        "sha256": digest.hexdigest(),
    }
