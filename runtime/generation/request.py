"""A question made ready: the picture (looked at only as far as needed), the prompt as
segments of rows, and the limits it runs under.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from PIL import Image

from runtime.contract.errors import ImageError
from runtime.contract.image import open_image, read_image_bytes, to_pixels
from runtime.contract.pooling import pool_matrix
from runtime.contract.spec import ModelSpec
from runtime.engines import Engine
from runtime.generation.constraints import Constraint
from runtime.generation.decoding import Decoding
from runtime.generation.image_cache import FeatureCache, Features
from runtime.generation.kv_cache import CacheBudget, Segment
from runtime.generation.sampling import check_finite

__all__ = ["IMAGE_STAGES", "Job", "Picture", "PictureSource"]

T = TypeVar("T")
PictureSource = str | os.PathLike[str] | bytes | Image.Image
IMAGE_STAGES = ("decode_image", "preprocess", "vision")


class Picture:
    """A picture and its embeddings at one pool size. Nothing is decoded that a cache
    knows; `timings` are milliseconds of what was done.
    """

    def __init__(
        self, source: PictureSource, p: int, spec: ModelSpec, engine: Engine, cache: FeatureCache
    ) -> None:
        if isinstance(source, Image.Image) and source.mode != "RGB":
            raise ImageError(
                f"the picture is in mode {source.mode}, expected RGB; give its file, or "
                f"picture.convert('RGB')"
            )
        self._source = (
            source if isinstance(source, Image.Image | bytes) else read_image_bytes(source)
        )
        self._name = "" if isinstance(source, Image.Image | bytes) else os.fspath(source)
        self._spec, self._engine, self._cache, self.p = spec, engine, cache, p
        self.timings = dict.fromkeys(IMAGE_STAGES, 0.0)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file's bytes, or of a given picture's pixels."""
        if isinstance(self._source, bytes):
            return hashlib.sha256(self._source).hexdigest()
        return hashlib.sha256(
            f"{self._source.mode}{self._source.size}".encode() + self._source.tobytes()
        ).hexdigest()

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as displayed."""
        return self.features.size

    @cached_property
    def features(self) -> Features:
        """Embeddings [T, H], from a cache or computed. Raises `ImageError`,
        `EngineError`.
        """
        found = self._cache.get(self.digest, self.p)
        if found is None:
            picture = self._timed(
                "decode_image",
                lambda: (
                    self._source
                    if isinstance(self._source, Image.Image)
                    else open_image(self._source, self._name)
                ),
            )
            pixels = self._timed("preprocess", lambda: to_pixels(picture, self._spec))
            pool = pool_matrix(self._spec.vision.grid, self.p)
            embeds = self._timed("vision", lambda: self._engine.embed_image(pixels, pool)[0])
            check_finite(embeds, "the vision graph", "embeddings")
            found = Features(embeds, picture.size)
            self._cache.put(self.digest, self.p, found)
        return found

    def _timed(self, stage: str, call: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = call()
        self.timings[stage] = (time.perf_counter() - started) * 1e3
        return result


@dataclass(frozen=True)
class Job:
    """One question ready to run; `text` is the phrase that boxes stand for, `context`
    the tokens drafts are looked up in.
    """

    picture: Picture
    task: str
    text: str
    segments: tuple[Segment, ...]
    budget: CacheBudget
    limit: int
    decoding: Decoding
    constraint: Constraint | None
    context: tuple[int, ...] = field(repr=False)
