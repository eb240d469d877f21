"""Training sources: a list of examples, or a mixture of several sources. Each draw
depends only on the random generator.

A draw returns an image that is already augmented and square, so later steps are the
same for every source.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image

from runtime.contract.boxes import Box, format_box, to_pixel_box, to_unit_box
from runtime.contract.errors import DataError, ImageError
from runtime.contract.image import open_image, to_square
from runtime.contract.spec import ModelSpec
from runtime.data.sample import Example, Sample
from runtime.output.console import note
from trainer.datasets.augment import Augmentation

__all__ = ["ExampleSource", "ListedSource", "Mixture", "PictureCache", "Retries", "move_samples"]

T = TypeVar("T")

_MAX_PACKED = 8
_CACHE_BYTES = 256 << 20
_MAX_TRIES = 100


class ExampleSource(Protocol):
    """Draws training examples.

    `dense_classes` has the number of classes of each per-patch label; it is empty if
    there are none. `dense_names` lists the names of all classes.
    """

    dense_classes: tuple[int, ...]
    dense_names: tuple[str, ...]

    def draw(self, rng: np.random.Generator, chat: bool, spec: ModelSpec) -> Example:
        """Draws one example for a model with that spec. `chat` asks for conversations
        instead of short tasks, if the source has any.
        """
        ...

    def texts(self) -> list[str]:
        """Returns texts whose words a tokenizer should know."""
        ...


class PictureCache:
    """Caches opened images up to a number of bytes. The first images stay, so random
    draws keep hitting the cache.
    """

    def __init__(self, limit: int = _CACHE_BYTES) -> None:
        self._limit, self._bytes = limit, 0
        self._kept: dict[Path, Image.Image] = {}

    def open(self, path: Path) -> Image.Image:
        """Returns the image. Raises `ImageError`."""
        if path in self._kept:
            return self._kept[path]
        image = open_image(path)
        size = image.width * image.height * 3
        if self._bytes + size <= self._limit:
            self._bytes += size
            self._kept[path] = image
        return image


class Retries:
    """Draws again when an image cannot be used, if bad rows are skipped. Reports each
    reason once.
    """

    def __init__(self, skip_bad: bool) -> None:
        self._skip, self._noted = skip_bad, set[str]()

    def until_usable(self, attempt: Callable[[], T]) -> T:
        """Returns the result of the first attempt that works. Raises the first
        `DataError` or `ImageError` unless bad rows are skipped; then raises `DataError`
        after 100 failures.
        """
        for _ in range(_MAX_TRIES):
            try:
                return attempt()
            except (DataError, ImageError) as error:
                if not self._skip:
                    raise
                last = str(error)
                if last not in self._noted:
                    self._noted.add(last)
                    note(f"left out: {last}")
        raise DataError(
            f"{_MAX_TRIES} images in a row could not be used; check the data. Last error: {last}"
        )


class ListedSource:
    """Draws images of a list uniformly, each with up to 8 of its samples. With
    `skip_bad`, draws again when an image cannot be used.
    """

    dense_classes: tuple[int, ...] = ()
    dense_names: tuple[str, ...] = ()

    def __init__(
        self,
        examples: Sequence[Example],
        augment: Augmentation,
        name: str = "data",
        skip_bad: bool = False,
    ) -> None:
        grouped: dict[Path, list[Sample]] = defaultdict(list)
        for example in examples:
            assert isinstance(example.picture, Path), "listed examples refer to files"
            grouped[example.picture].extend(example.samples)
        if not grouped:
            raise DataError(f"{name} has no samples; check the file and its format")
        self._short, self._chat = (
            self._groups(grouped, chat=False),
            self._groups(grouped, chat=True),
        )
        self._augment, self._retries, self._pictures = augment, Retries(skip_bad), PictureCache()

    @staticmethod
    def _groups(grouped: dict[Path, list[Sample]], chat: bool) -> list[tuple[Path, list[Sample]]]:
        kept = (
            (path, [s for s in samples if (s.task == "chat") == chat])
            for path, samples in grouped.items()
        )
        return [(path, samples) for path, samples in kept if samples]

    def draw(self, rng: np.random.Generator, chat: bool, spec: ModelSpec) -> Example:
        """See `ExampleSource.draw`. If the list has only conversations or only short
        tasks, `chat` has no effect.
        """
        groups = (self._chat if chat else self._short) or self._short or self._chat

        def attempt() -> Example:
            path, samples = groups[int(rng.integers(len(groups)))]
            chosen = [samples[int(i)] for i in rng.permutation(len(samples))[:_MAX_PACKED]]
            return self._load(path, chosen, rng, spec)

        return self._retries.until_usable(attempt)

    def _load(
        self, path: Path, chosen: list[Sample], rng: np.random.Generator, spec: ModelSpec
    ) -> Example:
        image = self._pictures.open(path)
        placed = [_retold(sample.placed(*image.size, str(path)), rng) for sample in chosen]
        moved, placed = move_samples(self._augment, image, placed, rng)
        square = self._augment.finish(to_square(moved, spec), rng)
        return Example(square, tuple(placed), name=str(path))

    def texts(self) -> list[str]:
        """See `ExampleSource.texts`."""
        return [
            text
            for _, samples in [*self._short, *self._chat]
            for s in samples
            for text in (s.text, s.answer, *s.references)
        ]


def _retold(sample: Sample, rng: np.random.Generator) -> Sample:
    """Returns a caption sample with the words of one of its reference captions."""
    if sample.task != "caption" or len(sample.references) < 2:
        return sample
    return replace(sample, answer=sample.references[int(rng.integers(len(sample.references)))])


def move_samples(
    augmentation: Augmentation,
    image: Image.Image,
    samples: Sequence[Sample],
    rng: np.random.Generator,
) -> tuple[Image.Image, list[Sample]]:
    """Crops the image around the samples' boxes (all in [0, 1]), and updates the boxes
    and the answers that contain them.
    """
    width, height = image.size
    boxes = [to_pixel_box(s.box, width, height) for s in samples if s.box]
    keep = (
        (
            min(b[0] for b in boxes),
            min(b[1] for b in boxes),
            max(b[2] for b in boxes),
            max(b[3] for b in boxes),
        )
        if boxes
        else None
    )
    image, moved = augmentation.move(image, boxes, rng, keep)
    following = iter(moved)
    return image, [
        _rebox(sample, next(following), image.size) if sample.box else sample for sample in samples
    ]


def _rebox(sample: Sample, pixels: Box, size: tuple[int, int]) -> Sample:
    box = to_unit_box(pixels, *size)
    return replace(sample, box=box, answer=format_box(box))


class Mixture:
    """Draws from several sources in proportion to their weights. Per-patch labels are
    kept only if all sources have the same classes.
    """

    def __init__(self, sources: Sequence[ExampleSource], weights: Sequence[float]) -> None:
        self._sources, self._odds = list(sources), np.array(weights) / sum(weights)
        kinds = {(source.dense_classes, source.dense_names) for source in sources}
        self.dense_classes, self.dense_names = kinds.pop() if len(kinds) == 1 else ((), ())

    def draw(self, rng: np.random.Generator, chat: bool, spec: ModelSpec) -> Example:
        """See `ExampleSource.draw`."""
        example = self._sources[int(rng.choice(len(self._sources), p=self._odds))].draw(
            rng, chat, spec
        )
        return example if self.dense_classes else replace(example, dense=None)

    def texts(self) -> list[str]:
        """See `ExampleSource.texts`."""
        return [text for source in self._sources for text in source.texts()]
