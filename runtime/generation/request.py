"""Turns a question into a `Request`: the image (opened only if no cache knows it), the
prompt as segments of cache rows, and the limits of the answer.

`RequestBuilder` prepares and `runtime.generation.runner` runs.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.contract.errors import ImageError, UsageError
from runtime.contract.image import open_image, read_image_bytes, to_pixels
from runtime.contract.pooling import pool_matrix
from runtime.contract.prompt import TASKS, Prompt, render
from runtime.contract.spec import ModelSpec
from runtime.contract.task_detection import detect_task
from runtime.contract.tokenizer import Tokenizer
from runtime.engines import Engine
from runtime.engines.logits import check_finite
from runtime.generation.constraints import BoxGrammar, Constraint, JsonSchema
from runtime.generation.decoding import Decoding, checked_decoding
from runtime.generation.image_cache import EmbeddedImage, ImageEmbeddingCache
from runtime.generation.kv_cache import CacheBudget, Segment
from runtime.generation.token_embeddings import embed_prompt, embed_tokens
from runtime.questions import AUTO, ImageSource, Question

__all__ = ["IMAGE_STAGES", "InputImage", "Request", "RequestBuilder"]

T = TypeVar("T")
IMAGE_STAGES = ("decode_image", "preprocess", "vision")


class InputImage:
    """An image and its embeddings at one pool size.

    Nothing is decoded that a cache knows. `timings` are the milliseconds of each stage
    that did run. Raises `ImageError` for an image in another mode than RGB.
    """

    def __init__(
        self,
        source: ImageSource,
        p: int,
        spec: ModelSpec,
        engine: Engine,
        cache: ImageEmbeddingCache,
    ) -> None:
        if isinstance(source, Image.Image) and source.mode != "RGB":
            raise ImageError(
                f"the PIL image has mode {source.mode}, expected RGB; pass the image file, or "
                "image.convert('RGB')"
            )
        in_memory = isinstance(source, Image.Image | bytes)
        self._source = (
            source if isinstance(source, Image.Image | bytes) else read_image_bytes(source)
        )
        self._name = "" if in_memory else os.fspath(source)  # type: ignore[arg-type]
        self._spec, self._engine, self._cache, self.p = spec, engine, cache, p
        self.timings = dict.fromkeys(IMAGE_STAGES, 0.0)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file's bytes, or of the pixels of a `PIL.Image`."""
        if isinstance(self._source, bytes):
            return hashlib.sha256(self._source).hexdigest()
        header = f"{self._source.mode}{self._source.size}".encode()
        return hashlib.sha256(header + self._source.tobytes()).hexdigest()

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as displayed."""
        return self.embedded.size

    @cached_property
    def embedded(self) -> EmbeddedImage:
        """The embeddings [T, H], from the cache or computed now. Raises `ImageError`,
        `EngineError`, `NonFiniteError`.
        """
        found = self._cache.get(self.digest, self.p)
        if found is None:
            image = self._time("decode_image", self._open)
            pixels = self._time("preprocess", lambda: to_pixels(image, self._spec))
            pool = pool_matrix(self._spec.vision.grid, self.p)
            embeds = self._time("vision", lambda: self._engine.embed_image(pixels, pool)[0])
            check_finite(embeds, "the vision graph", "embeddings")
            found = EmbeddedImage(embeds, image.size)
            self._cache.put(self.digest, self.p, found)
        return found

    def _open(self) -> Image.Image:
        if isinstance(self._source, Image.Image):
            return self._source
        return open_image(self._source, self._name)

    def _time(self, stage: str, call: Callable[[], T]) -> T:
        started = time.perf_counter()
        result = call()
        self.timings[stage] = (time.perf_counter() - started) * 1e3
        return result


@dataclass(frozen=True)
class Request:
    """One question, ready to run.

    `text` is the phrase that boxes in the answer belong to. `context` holds the token
    ids of the text, where prompt lookup searches for drafts.
    """

    image: InputImage
    task: str
    text: str
    segments: tuple[Segment, ...]
    budget: CacheBudget
    new_tokens: int
    decoding: Decoding
    constraint: Constraint | None
    context: tuple[int, ...] = field(repr=False)


class RequestBuilder:
    """Builds the requests of one bundle.

    Args:
        spec: The model.
        tokenizer: The bundle's tokenizer.
        table: The token embeddings [V, H].
        engine: Embeds images, and tells how many cache rows there are.
        images: Keeps image embeddings for the next question about the same image.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: Tokenizer,
        table: NDArray[np.floating],
        engine: Engine,
        images: ImageEmbeddingCache,
    ) -> None:
        self.tokenizer = tokenizer
        self._spec, self._table, self._engine, self._images = spec, table, engine, images
        self._boxes: BoxGrammar | None = None
        self._schema: tuple[str, JsonSchema] | None = None

    def build(self, question: Question, decoding: Decoding) -> Request:
        """Builds the request of a question. Raises `InfMLLMError`s for whatever does
        not fit: an unreadable image, a long prompt, unknown options.
        """
        task, text = question.task, question.text
        if task == AUTO:
            task, text = detect_task(text)
        image = self.open_image(question.image, question.visual_tokens)
        return self.build_from_prompt(
            image, render(task, text), task, text, decoding, question.max_new_tokens
        )

    def build_from_prompt(
        self,
        image: InputImage,
        prompt: Prompt,
        task: str,
        text: str,
        decoding: Decoding,
        max_new_tokens: int | None = None,
    ) -> Request:
        """Builds the request of a prompt that is rendered already."""
        before, after = map(tuple, self.tokenizer.encode_prompt(prompt))
        segments = (self.image_segment(before, image), self.text_segment(after))
        return self.build_from_segments(
            image, segments, task, text, decoding, max_new_tokens, context=after
        )

    def build_from_segments(
        self,
        image: InputImage,
        segments: tuple[Segment, ...],
        task: str,
        text: str,
        decoding: Decoding,
        max_new_tokens: int | None,
        context: tuple[int, ...],
    ) -> Request:
        """Builds the request of segments, the image in the first. Raises
        `ContextError`, `UsageError`.
        """
        visual = image.p**2
        text_tokens = sum(segment.rows for segment in segments) - visual
        budget = CacheBudget(self._engine.capacity, text_tokens, visual)
        new_tokens = TASKS[task].max_new_tokens if max_new_tokens is None else max_new_tokens
        if new_tokens < 1:
            raise UsageError(f"max_new_tokens is {new_tokens}, expected at least 1")
        return Request(
            image=image,
            task=task,
            text=text,
            segments=segments,
            budget=budget,
            new_tokens=budget.allow(new_tokens),
            decoding=checked_decoding(decoding),
            constraint=self._constraint(task, decoding),
            context=context,
        )

    def open_image(self, image: ImageSource, visual_tokens: int | None = None) -> InputImage:
        """Prepares an image; its embeddings are computed when they are needed. Raises
        `ImageError`, `SpecError`.
        """
        p = self._spec.pool_size_for(visual_tokens)
        return InputImage(image, p, self._spec, self._engine, self._images)

    def image_segment(self, before: tuple[int, ...], image: InputImage) -> Segment:
        """The cache rows of the text before the image, and of the image."""
        key = ("image", before, image.digest, image.p)

        def embed() -> NDArray[np.float32]:
            return embed_prompt(self._table, before, image.embedded.embeds, ())

        return Segment(key, len(before) + image.p**2, embed)

    def text_segment(self, ids: tuple[int, ...], decoded: bool = False) -> Segment:
        """The cache rows of text tokens. `decoded` ones were generated one by one."""
        key = ("answer" if decoded else "text", ids)
        return Segment(key, len(ids), lambda: embed_tokens(self._table, ids), decoded)

    def _constraint(self, task: str, decoding: Decoding) -> Constraint | None:
        """The form the answer must have: a JSON schema, a box, or none. Both are kept,
        because compiling one takes longer than a decode step.
        """
        vocabulary = self._spec.decoder.vocab_size
        if decoding.schema is not None:
            kept = self._schema  # another thread may replace it at any time
            if kept is None or kept[0] != decoding.schema:
                schema = JsonSchema(self.tokenizer, vocabulary, decoding.schema)
                self._schema = kept = (decoding.schema, schema)
            return kept[1]
        if task != "ground" or not decoding.constrain:
            return None
        if self._boxes is None:
            self._boxes = BoxGrammar(self.tokenizer, vocabulary)
        return self._boxes
