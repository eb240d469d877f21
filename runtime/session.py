"""A loaded bundle that answers questions about pictures: image and text in, text and boxes out.

Read top to bottom: open the picture, make pixels, embed the image, render and embed the prompt, prefill, decode, read boxes. Each stage is timed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runtime.contract.boxes import Box, find_boxes, to_pixel_box
from runtime.contract.bundle import EMBEDDINGS, TOKENIZER, Bundle, read_bundle
from runtime.contract.errors import BundleError, UsageError
from runtime.contract.image import open_image, to_pixels
from runtime.contract.pooling import pool_matrix
from runtime.contract.prompt import TASKS, Prompt, detect_task, render
from runtime.contract.tokenizer import TextStream, Tokenizer
from runtime.engines import Engine, EngineOptions, load_engine
from runtime.generate import Generation, generate
from runtime.kv_cache import CacheBudget

__all__ = ["Answer", "FoundBox", "Session", "Stream", "load"]

AUTO = "auto"


@dataclass(frozen=True)
class FoundBox:
    """A box the answer contains: what it stands for, in pixels of the displayed picture and in [0, 1]."""

    phrase: str
    box: Box
    relative: Box


@dataclass(frozen=True)
class Answer:
    """The outcome of one question. `timings` are milliseconds per stage, `step_ms` of every decode step; `tokens` are the generated ids."""

    text: str
    task: str
    boxes: tuple[FoundBox, ...]
    finish_reason: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    visual_tokens: int
    timings: dict[str, float]
    step_ms: tuple[float, ...] = ()


@dataclass
class Stream:
    """Iterate to receive the text in pieces of whole code points; afterwards `answer` holds the result."""

    pieces: Iterator[str]
    answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        return self.pieces


@dataclass
class _Clock:
    """Milliseconds per stage."""

    timings: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.perf_counter)

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.timings[stage] = (now - self._since) * 1e3
        self._since = now


Picture = str | os.PathLike[str] | bytes | Image.Image


class Session:
    """A bundle in memory. Not safe for concurrent use; create one per thread or process (weights are shared read-only by the system)."""

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.bundle, self.spec, self.engine = bundle, bundle.spec, engine
        self.tokenizer = Tokenizer.load(bundle.file(TOKENIZER), bundle.spec)
        self._table = _open_table(bundle)

    def ask(self, image: Picture, text: str, task: str = AUTO, visual_tokens: int | None = None, max_new_tokens: int | None = None) -> Answer:
        """Answers one question. See `stream` for the parameters."""
        return _finish(self.stream(image, text, task, visual_tokens, max_new_tokens))

    def stream(self, image: Picture, text: str, task: str = AUTO, visual_tokens: int | None = None, max_new_tokens: int | None = None) -> Stream:
        """Starts answering; the returned `Stream` yields text as it is generated.

        `image` is a path, an image file's bytes or an RGB `PIL.Image`; `task` one of caption, vqa, ground, chat or auto; `visual_tokens` one of the
        sizes the model serves (default: its best); `max_new_tokens` defaults to the task's published limit. Raises `InfMLLMError`s.
        """
        if task == AUTO:
            task, text = detect_task(text)
        return self._start(image, render(task, text), task, text, visual_tokens, max_new_tokens)

    def answer_prompt(self, image: Picture, prompt: Prompt, task: str, text: str = "", visual_tokens: int | None = None) -> Answer:
        """Answers an already rendered prompt, such as a conversation; `text` is the phrase that boxes stand for."""
        return _finish(self._start(image, prompt, task, text, visual_tokens, None))

    def _start(self, image: Picture, prompt: Prompt, task: str, text: str, visual_tokens: int | None, max_new_tokens: int | None) -> Stream:
        limit = TASKS[task].max_new_tokens if max_new_tokens is None else max_new_tokens
        if limit < 1:
            raise UsageError(f"at most {limit} new tokens were asked for, expected at least 1")
        p = self.spec.pool_size_for(visual_tokens)
        before, after = self.tokenizer.encode_prompt(prompt)
        budget = CacheBudget(self.engine.capacity, len(before) + len(after), p * p)
        limit = budget.allow(limit)
        stream = Stream(iter(()))
        stream.pieces = self._run(stream, image, text, task, p, (before, after), budget, limit)
        return stream

    def _run(
        self, stream: Stream, image: Picture, text: str, task: str, p: int, ids: tuple[list[int], list[int]], budget: CacheBudget, limit: int
    ) -> Iterator[str]:
        clock = _Clock()
        picture = image if isinstance(image, Image.Image) else open_image(image)
        clock.lap("decode_image")
        pixels = to_pixels(picture, self.spec)
        clock.lap("preprocess")
        embeds = self.engine.embed_image(pixels, pool_matrix(self.spec.vision.grid, p))
        clock.lap("vision")
        inputs = self.embed_prompt(ids[0], embeds[0], ids[1])
        progress, words = Generation(), TextStream(self.tokenizer)
        parts: list[str] = []
        for token in generate(self.engine, self._table, inputs, limit, self.spec.eos_id, progress):
            if piece := _first_trimmed(words.push(token), parts):
                parts.append(piece)
                yield piece
        if piece := _first_trimmed(words.finish(), parts):
            parts.append(piece)
            yield piece
        clock.timings["prefill"] = progress.prefill_seconds * 1e3
        clock.timings["per_token"] = float(np.median(progress.step_seconds)) * 1e3 if progress.step_seconds else 0.0
        clock.timings["decode"] = sum(progress.step_seconds) * 1e3
        answer = "".join(parts)
        phrase = text if task == "ground" else ""
        boxes = tuple(FoundBox(phrase, to_pixel_box(box, *picture.size), box) for box in find_boxes(answer))
        counts = (budget.prompt_tokens, budget.visual_tokens)
        steps = tuple(seconds * 1e3 for seconds in progress.step_seconds)
        stream.answer = Answer(answer, task, boxes, progress.finish_reason, tuple(progress.tokens), *counts, clock.timings, steps)

    def embed_prompt(self, before: list[int], image_embeds_TH: NDArray[np.float32], after: list[int]) -> NDArray[np.float32]:
        """Input embeddings [1, L, H]: text before, visual embeddings, text after."""
        return np.concatenate([self._table[before], image_embeds_TH, self._table[after]], dtype=np.float32)[None]


def _finish(stream: Stream) -> Answer:
    for _ in stream:
        pass
    assert stream.answer is not None, "a finished stream has its answer"
    return stream.answer


def _first_trimmed(piece: str, parts: list[str]) -> str:
    """The separator a task's answers begin with is no part of the answer."""
    return piece if parts else piece.lstrip(" ")


def _open_table(bundle: Bundle) -> NDArray[np.floating]:
    """The token embeddings [V, H], mapped into memory."""
    path, spec = bundle.file(EMBEDDINGS), bundle.spec.decoder
    try:
        table: NDArray[np.floating] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BundleError(f"{path} is no readable array ({error}); re-export the bundle") from None
    if table.shape != (spec.vocab_size, spec.hidden) or table.dtype not in (np.float32, np.float16):
        raise BundleError(f"{path} is {table.dtype} {table.shape}, expected ({spec.vocab_size}, {spec.hidden}) of float; re-export the bundle")
    return table


def load(path: str | os.PathLike[str], *, threads: int | None = None, context: int | None = None) -> Session:
    """Opens a bundle, checks it, and loads its engine.

    `threads` defaults to all available cores, `context` (cache rows) to the model's. Raises `BundleError`, `EngineError`.
    """
    bundle = read_bundle(Path(path))
    bundle.verify_once()
    return Session(bundle, load_engine(bundle, EngineOptions(threads, context)))
