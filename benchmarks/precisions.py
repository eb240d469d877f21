"""Compares stage latencies of several bundles of one model, and optionally of PyTorch.
They are interleaved in one run, so that ratios are meaningful on a noisy machine.

python benchmarks/precisions.py fp32.bundle int8.bundle int4.bundle [--checkpoint
trainer/demo] [--repetitions 40] [--threads 2]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from runtime import load
from runtime.contract.pooling import pool_matrix
from runtime.contract.spec import ModelSpec
from trainer.checkpoint import load_checkpoint
from trainer.model import InfMLLM

_TEXT_TOKENS = 11  # tokens of a typical question
_STEPS = 20
Array = NDArray[np.float32]


class Stages(Protocol):
    """The stages that are timed; see `runtime.engines.Engine`."""

    def embed_image(self, pixels: Array, pool: Array) -> Array: ...
    def forward(self, inputs_embeds: Array, start: int) -> Array: ...


class TorchStages:
    """The checkpoint in eager PyTorch, in float32, with a cache as long as the model's
    context.
    """

    def __init__(self, model: InfMLLM) -> None:
        self._model, spec = model, model.spec.decoder
        shape = (1, spec.kv_heads, spec.context, spec.head_dim)
        self._caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(spec.layers)]

    @torch.inference_mode()
    def embed_image(self, pixels: Array, pool: Array) -> Array:
        """See `Engine.embed_image`."""
        return self._model.pool_adapter(
            self._model.vision_tower(torch.from_numpy(pixels)), torch.from_numpy(pool)
        ).numpy()

    @torch.inference_mode()
    def forward(self, inputs_embeds: Array, start: int) -> Array:
        """See `Engine.forward`."""
        positions = torch.arange(start, start + inputs_embeds.shape[1])[None]
        logits, self._caches = self._model.decoder.step(
            torch.from_numpy(inputs_embeds), positions, self._caches
        )
        return logits[0].numpy()


def once(stages: Stages, spec: ModelSpec) -> dict[str, float]:
    """Returns the milliseconds of one image, of one prefill with image and question,
    and of one decode step (mean of 20).
    """
    rng = np.random.default_rng(0)
    size, p = spec.vision.image_size, spec.pool_sizes[0]
    pixels = rng.normal(size=(1, 3, size, size)).astype(np.float32)
    inputs = rng.normal(size=(1, p * p + _TEXT_TOKENS, spec.decoder.hidden)).astype(np.float32)
    pool, row = pool_matrix(spec.vision.grid, p), np.ascontiguousarray(inputs[:, :1])
    marks = [time.perf_counter()]
    stages.embed_image(pixels, pool)
    marks.append(time.perf_counter())
    stages.forward(inputs, 0)
    marks.append(time.perf_counter())
    for step in range(_STEPS):
        stages.forward(row, inputs.shape[1] + step)
    marks.append(time.perf_counter())
    vision, prefill, decode = (1e3 * (b - a) for a, b in itertools.pairwise(marks))
    return {"vision": vision, "prefill": prefill, "decode step": decode / _STEPS}


def main() -> None:
    """Prints the median and the best time of each contender and stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", type=Path, nargs="+")
    parser.add_argument("--checkpoint", type=Path, help="also time this checkpoint in PyTorch")
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    sessions = {path.name: load(path, threads=given.threads) for path in given.bundles}
    spec = next(iter(sessions.values())).spec
    contenders: dict[str, Stages] = {name: session.engine for name, session in sessions.items()}
    if given.checkpoint:
        contenders["PyTorch"] = TorchStages(load_checkpoint(given.checkpoint).model)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for repetition in range(given.repetitions + 2):
        for name, stages in contenders.items():
            times = once(stages, spec)
            if repetition >= 2:
                rows[name].append(times)
    for name, values in rows.items():
        cells = (
            f"{stage} {statistics.median(v[stage] for v in values):.2f} "
            f"({min(v[stage] for v in values):.2f})"
            for stage in values[0]
        )
        print(f"{name:24} {'   '.join(cells)}   ms, median (best)")


if __name__ == "__main__":
    main()
