"""Finds where a compiled graph departs from PyTorch: the first block whose output
drifts, by bisecting truncated graphs.

A graph is truncated at the residual stream in front of a norm, and the first part is
run by itself. Every block has such a norm, and every pass keeps it. Marking inner
tensors as outputs of the whole graph would switch off the fusions under suspicion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from calibration.blocks import Block, StreamedModel
from calibration.samples import Case
from export.parity.subgraphs import cut_points, opened_part, run_part
from runtime.contract.bundle import DECODER, PREFILL, VISION
from runtime.contract.graphs import (
    IMAGE_EMBEDS,
    INPUTS_EMBEDS,
    LOGITS,
    PIXELS,
    POOL,
    SEQLENS_K,
    TOTAL_LENGTH,
)
from runtime.contract.pooling import pool_matrix
from runtime.parity import relative_error
from trainer.checkpoint import StoredCheckpoint
from trainer.model import InfMLLM

__all__ = ["Drift", "find_drift", "first_drift"]

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Drift:
    """The two cuts between which a graph departs from PyTorch, with the relative RMS
    error before and after.
    """

    after: str
    until: str
    before_error: float
    error: float

    def __str__(self) -> str:
        return (
            f"The error first exceeds its tolerance between {self.after} (error "
            f"{self.before_error:.2g}) and {self.until} (error {self.error:.2g})"
        )


def first_drift(
    cuts: Sequence[str], error_at: Callable[[int], float], tolerance: float
) -> tuple[int, float, float]:
    """Returns (index, error there, error at the cut before) of the first cut beyond
    `tolerance`, found by bisection. Returns the last cut if none exceeds it.
    """
    low, high = -1, len(cuts) - 1
    errors = {-1: 0.0, high: error_at(high)}
    while high - low > 1:
        middle = (low + high) // 2
        errors[middle] = error_at(middle)
        low, high = (low, middle) if errors[middle] > tolerance else (middle, high)
    return high, errors[high], errors[low]


def find_drift(
    folder: Path, checkpoint: StoredCheckpoint, case: Case, tolerance: Mapping[str, float]
) -> Drift | None:
    """Bisects a bundle's vision graph on one golden case, and the decoder's prefill if
    the vision graph is within tolerance. Returns None if both are.
    """
    streams: dict[str, Array] = {}
    (trace,) = StreamedModel(checkpoint.spec, checkpoint.read).run_blockwise(
        [case], partial(_watch, streams)
    )
    assert trace.image_embeds is not None and trace.logits is not None
    spec = checkpoint.spec
    table = checkpoint.read("decoder.embed_tokens.weight").numpy()
    prompt = np.concatenate(
        [table[list(case.before)], trace.image_embeds, table[list(case.after)]]
    )[None]
    length = prompt.shape[1]
    cache = (1, spec.decoder.kv_heads, length, spec.decoder.head_dim)
    inputs = {
        PIXELS: case.pixels,
        POOL: pool_matrix(spec.vision.grid, case.pool_size),
        INPUTS_EMBEDS: prompt,
    }
    inputs |= {
        SEQLENS_K: np.array([length - 1], np.int32),
        TOTAL_LENGTH: np.array(length, np.int32),
    }
    results: dict[str, Array] = {IMAGE_EMBEDS: trace.image_embeds[None], LOGITS: trace.logits[:1]}
    decoder = PREFILL if (folder / PREFILL).exists() else DECODER
    for file, end, bound in (
        (VISION, IMAGE_EMBEDS, tolerance["vision"]),
        (decoder, LOGITS, tolerance["prefill"]),
    ):
        points = [*cut_points(ir.load(folder / file)), (end, end)]

        def error_at(index: int, file: str = file, points: list[tuple[str, str]] = points) -> float:
            name, tensor = points[index]
            expected = results.get(name)
            with opened_part(folder / file, (), [tensor]) as session:
                found = np.asarray(run_part(session, inputs, cache)[tensor], np.float32)
            if (
                name == "decoder.norm"
            ):  # PyTorch keeps only the rows the head needs; the first is the prompt's last
                expected, found = streams[name][:, :1], found[:, -1:]
            elif expected is None:
                expected = (
                    streams[name][:, :length] if file != VISION else streams[name]
                )  # the prompt without the answer
            return relative_error(found, expected)

        index, error, before = first_drift([name for name, _ in points], error_at, bound)
        if error > bound:
            return Drift(
                points[index - 1][0] if index else f"the start of {file}",
                points[index][0],
                before,
                error,
            )
    return None


@contextmanager
def _watch(streams: dict[str, Array], block: Block, model: InfMLLM) -> Iterator[None]:
    def keep(norm: str, module: torch.nn.Module, arguments: tuple[torch.Tensor]) -> None:
        streams[norm] = arguments[0].numpy().copy()

    handles = [
        model.get_submodule(norm).register_forward_pre_hook(partial(keep, norm))
        for norm in block.norms
    ]
    yield
    for handle in handles:
        handle.remove()
