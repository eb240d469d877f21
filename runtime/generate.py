"""Prefill and decode: from input embeddings to a stream of token ids, with the time each step took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.engines import Engine
from runtime.sampling import greedy

__all__ = ["Generation", "generate"]


@dataclass
class Generation:
    """Progress of one answer. `finish_reason` is "stop" (the model ended it) or "length" (token limit or full cache); times are seconds."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    prefill_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)


def generate(
    engine: Engine, table: NDArray[np.floating], inputs_embeds: NDArray[np.float32], max_new_tokens: int, eos_id: int, progress: Generation
) -> Iterator[int]:
    """Yields token ids greedily; `progress` is updated before each yield and holds the outcome at the end.

    `inputs_embeds` is [1, L, H], `table` the token embeddings [V, H]. The caller has checked that everything fits (`CacheBudget`).
    """
    started = time.perf_counter()
    logits = engine.forward(inputs_embeds, 0)
    progress.prefill_seconds = time.perf_counter() - started
    rows = inputs_embeds.shape[1]
    while True:
        token = greedy(logits)
        if token == eos_id:
            progress.finish_reason = "stop"
            return
        progress.tokens.append(token)
        yield token
        if len(progress.tokens) >= max_new_tokens:
            progress.finish_reason = "length"
            return
        started = time.perf_counter()
        logits = engine.forward(np.asarray(table[token], np.float32)[None, None], rows)
        progress.step_seconds.append(time.perf_counter() - started)
        rows += 1
