"""One timed round of any contender: an image, a prompt after it, and greedy steps. All
contenders get the same inputs.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from runtime.contract.pooling import pool_matrix
from runtime.contract.spec import ModelSpec
from runtime.engines import Engine

if TYPE_CHECKING:
    from tests.gpu.pytorch import PyTorchEngine

__all__ = ["TEXT_TOKENS", "once", "prompt_rows"]

TEXT_TOKENS = 11  # tokens of a typical question


def prompt_rows(spec: ModelSpec) -> int:
    """Returns the number of cache rows of the timed prompt: the model's default number
    of visual tokens and a question.
    """
    return spec.pool_sizes[0] ** 2 + TEXT_TOKENS


def once(
    engine: Engine, table: NDArray[Any] | None, spec: ModelSpec, steps: int
) -> dict[str, float]:
    """Returns the milliseconds of the image, of the prefill and of a greedy step
    (median). Image and prefill times include the copies to and from the device.

    This project's engines read each token's embedding from the host's `table` [V, H],
    as in real use. Without a table, the contender decodes on its device only.
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
        cast("PyTorchEngine", engine).greedy_steps(token, rows, steps)
        if table is None
        else _steps(engine, table, token, rows, steps)
    )
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
