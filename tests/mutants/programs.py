"""Wrong programs: faults of the running code, and not of a bundle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from export.parity import calls, constants
from runtime.contract import image, prompt
from runtime.engines.onnxruntime.cpu import OrtBatch, OrtEngine
from runtime.generation import beam_search, generate, request
from runtime.generation.image_cache import ImageEmbeddingCache
from runtime.generation.kv_cache import PrefixCache

__all__ = ["RUNTIME_MUTANTS", "RuntimeMutant"]

Array = NDArray[Any]


@dataclass(frozen=True)
class RuntimeMutant:
    """A wrong program: the change of the running code."""

    name: str
    part: str
    change: Callable[[pytest.MonkeyPatch], None]


def _broken_start(patch: pytest.MonkeyPatch) -> None:
    """Calls of several rows begin at row 0."""
    feed = OrtEngine._feed

    def wrong(self: OrtEngine, call: Any, embeds: Array, start: int) -> Array:
        return feed(self, call, embeds, 0 if embeds.shape[1] > 1 else start)

    patch.setattr(OrtEngine, "_feed", wrong)


def _broken_verify(patch: pytest.MonkeyPatch) -> None:
    verify = OrtEngine.verify
    patch.setattr(
        OrtEngine, "verify", lambda self, embeds, start: verify(self, embeds, start)[::-1]
    )


def _broken_batch_starts(patch: pytest.MonkeyPatch) -> None:
    step = OrtBatch.step
    patch.setattr(
        OrtBatch,
        "step",
        lambda self, embeds, starts: step(self, embeds, np.full_like(starts, starts.max())),
    )


def _broken_copy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OrtBatch, "copy", lambda self, sources, start, end: None)


def _broken_fill(patch: pytest.MonkeyPatch) -> None:
    fill = OrtBatch.fill
    patch.setattr(OrtBatch, "fill", lambda self, slot, rows: fill(self, slot, rows - 1))


def _reused_prefix(patch: pytest.MonkeyPatch) -> None:
    """The image's rows are reused for any image."""
    patch.setattr(
        PrefixCache,
        "_reusable",
        lambda self, segments: min(len(segments) - 1, len(self._held)),
    )


def _shared_embeddings(patch: pytest.MonkeyPatch) -> None:
    """The image cache returns the first image's embeddings for every image."""
    get = ImageEmbeddingCache.get
    held: list[Any] = []

    def wrong(self: ImageEmbeddingCache, digest: str, p: int) -> Any:
        found = get(self, digest, p)
        if found is not None:
            held.append(found)
        return held[0] if held else None

    patch.setattr(ImageEmbeddingCache, "get", wrong)


def _second_best(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("runtime.generation.runner.greedy", lambda logits: int(np.argsort(logits)[-2]))


def _drafts_accepted(patch: pytest.MonkeyPatch) -> None:
    """Every drafted token is accepted."""
    take = generate.Generation.take

    def wrong(self: Any) -> Any:
        rows = [row if isinstance(row, int) else np.array(row) for row in self._pending]
        for row, token in zip(rows, self.drafts, strict=False):
            if not isinstance(row, int):
                row[token] = row.max() + 1
        self._pending = rows
        return take(self)

    patch.setattr(generate.Generation, "take", wrong)


def _beams_last(patch: pytest.MonkeyPatch) -> None:
    """A beam search that keeps the worst of its candidates."""
    search = beam_search.beam_search

    def wrong(engine: Any, table: Any, logits: Array, *rest: Any, **named: Any) -> Any:
        return search(engine, table, -logits, *rest, **named)

    patch.setattr("runtime.generation.runner.beam_search", wrong)


def _other_prompt(patch: pytest.MonkeyPatch) -> None:
    task = replace(prompt.TASKS["vqa"], render=lambda text: prompt.Prompt("<image>", text))
    patch.setitem(prompt.TASKS, "vqa", task)


def _other_system(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(prompt, "CHAT_SYSTEM", prompt.CHAT_SYSTEM.replace("polite ", ""))


def _other_mean(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(image, "_LOOKUP", image._LOOKUP + np.float32(0.05))


def _other_filter(patch: pytest.MonkeyPatch) -> None:
    square = image.to_square

    def wrong(picture: Image.Image, spec: Any) -> Image.Image:
        size = spec.vision.image_size
        if picture.size == (size, size):
            return square(picture, spec)
        return picture.resize((size, size), Image.Resampling.NEAREST)

    patch.setattr(image, "to_square", wrong)


def _turned_pooling(patch: pytest.MonkeyPatch) -> None:
    pool = constants.pool_matrix

    def wrong(s: int, p: int) -> Array:
        return pool(s, p).reshape(p, p, s * s).transpose(1, 0, 2).reshape(p * p, s * s)

    for module in (constants, request, calls):
        patch.setattr(module, "pool_matrix", wrong)


RUNTIME_MUTANTS: tuple[RuntimeMutant, ...] = (
    RuntimeMutant("segments begin at row 0", "KV cache", _broken_start),
    RuntimeMutant("rows of drafts reversed", "speculation", _broken_verify),
    RuntimeMutant("all drafts accepted", "speculation", _drafts_accepted),
    RuntimeMutant("sequences share a position", "batching", _broken_batch_starts),
    RuntimeMutant("beams keep their rows", "beams", _broken_copy),
    RuntimeMutant("beams keep the worst", "beams", _beams_last),
    RuntimeMutant("a slot lacks its last row", "batching", _broken_fill),
    RuntimeMutant("any prefix is reused", "KV cache", _reused_prefix),
    RuntimeMutant("images share embeddings", "KV cache", _shared_embeddings),
    RuntimeMutant("the second best token", "decoding", _second_best),
    RuntimeMutant("the vqa prompt without its words", "prompt", _other_prompt),
    RuntimeMutant("another system text", "prompt", _other_system),
    RuntimeMutant("another mean colour", "preprocessing", _other_mean),
    RuntimeMutant("nearest-pixel resizing", "preprocessing", _other_filter),
    RuntimeMutant("cells of the pooling turned", "preprocessing", _turned_pooling),
)
