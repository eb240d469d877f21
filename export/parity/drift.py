"""Where a compiled graph leaves PyTorch: the first block whose output drifts, found by
bisecting truncated graphs.

A graph is cut behind the residual stream in front of a norm, which every block has and
every pass keeps, and run by itself. Marking inner tensors as outputs of the whole graph
instead would switch off the fusions that are under suspicion.
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
    """The stretch between two cuts in which a graph leaves PyTorch, with the relative
    RMS error before and after it.
    """

    after: str
    until: str
    before_error: float
    error: float

    def __str__(self) -> str:
        return (
            f"The first tensor to drift lies between {self.after} (error "
            f"{self.before_error:.2g}) and {self.until} (error {self.error:.2g})"
        )


def first_drift(
    cuts: Sequence[str], error_at: Callable[[int], float], tolerance: float
) -> tuple[int, float, float]:
    """(index, error there, error at the cut before) of the first cut beyond
    `tolerance`, by bisection; the last cut if none is.
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
    """Bisects the vision graph, and if that is sound the decoder's prefill, of a
    bundle's folder on one golden case; None if both are sound.
    """
    streams: dict[str, Array] = {}
    (trace,) = StreamedModel(checkpoint.spec, checkpoint.read).walk(
        [case], partial(_watched, streams)
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
            ):  # PyTorch keeps the rows the head needs, of which the prompt's last is the first
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
def _watched(streams: dict[str, Array], block: Block, model: InfMLLM) -> Iterator[None]:
    def keep(norm: str, module: torch.nn.Module, arguments: tuple[torch.Tensor]) -> None:
        streams[norm] = arguments[0].numpy().copy()

    handles = [
        model.get_submodule(norm).register_forward_pre_hook(partial(keep, norm))
        for norm in block.norms
    ]
    yield
    for handle in handles:
        handle.remove()
