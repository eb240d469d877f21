"""One timed round of any contender: an image, a prompt behind it, and greedy steps, the
same numbers for everyone.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.contract.pooling import pool_matrix
from runtime.contract.spec import ModelSpec
from runtime.engines import Engine

__all__ = ["TEXT_TOKENS", "once", "prompt_rows"]

TEXT_TOKENS = 11  # of a usual question


def prompt_rows(spec: ModelSpec) -> int:
    """Rows of the prompt that is timed: the model's best number of visual tokens, and a
    question.
    """
    return spec.pool_sizes[0] ** 2 + TEXT_TOKENS


def once(
    engine: Engine, table: NDArray[Any] | None, spec: ModelSpec, steps: int
) -> dict[str, float]:
    """Milliseconds of the image (pixels up, embeddings down), of the prefill (logits
    down), and of a greedy step (median).

    Our engines take each token's embedding from the host's `table` [V, H], as answering
    does. Without one, the contender decodes on its device alone.
    """
    rng, size, rows = np.random.default_rng(0), spec.vision.image_size, prompt_rows(spec)
    pixels = rng.normal(size=(1, 3, size, size)).astype(np.float32)
    inputs = rng.normal(size=(1, rows, spec.decoder.hidden)).astype(np.float32) * 0.1
    pool = pool_matrix(spec.vision.grid, spec.pool_sizes[0])
    begun = time.perf_counter()
    engine.embed_image(pixels, pool)
    seen = time.perf_counter()
    token = int(engine.forward(inputs, 0).argmax())
    read = time.perf_counter()
    spent = (
        engine.greedy_steps(token, rows, steps)
        if table is None
        else _steps(engine, table, token, rows, steps)
    )  # type: ignore[attr-defined]
    return {
        "vision": (seen - begun) * 1e3,
        "prefill": (read - seen) * 1e3,
        "step": float(np.median(spent)),
    }


def _steps(engine: Engine, table: NDArray[Any], token: int, start: int, count: int) -> list[float]:
    times = []
    for place in range(start, start + count):
        begun = time.perf_counter()
        token = engine.greedy(np.asarray(table[None, token : token + 1], np.float32), place)
        times.append((time.perf_counter() - begun) * 1e3)
    return times
