"""Inputs and outputs of a `tensorrt` bundle's graphs: names, types, shapes, and the
size ranges that engines are built for.

Each graph comes in one or two variants. The plain variant returns the caches' new rows
and works with every TensorRT from 10.3. The fused variant updates the caches itself,
has attention as one operator, and works with TensorRT from 10.15.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from runtime.contract.bundle import DECODER, DECODER_FUSED, VISION, VISION_FUSED
from runtime.contract.errors import BundleError
from runtime.contract.graphs import (
    IMAGE_EMBEDS,
    INPUTS_EMBEDS,
    LOGITS,
    LOGITS_MASS,
    LOGITS_ROWS,
    NEXT_TOKEN,
    PIXELS,
    POOL,
    POSITION_IDS,
    present,
)
from runtime.contract.spec import ModelSpec

__all__ = [
    "DECODE",
    "MOST_ROWS",
    "MOST_TOKENS",
    "PREFILL",
    "GraphVariant",
    "Ranges",
    "TensorSpec",
    "check_tensors",
    "decoder_variant",
    "vision_variant",
]

MOST_ROWS = 8
"""Largest number of positions with logits in one call."""

MOST_TOKENS = 512
"""Largest number of positions in one call. The attention scores take memory
proportional to the length of the call times that of the cache: 2048 positions at once
would need 5 GB for a 7 B model.
"""

DECODE, PREFILL = 0, 1
"""Indices of the decoder's optimization profiles: for one token, and for several."""

# Text tokens of a typical prompt. The prefill profile is tuned for these plus the default number
# of visual tokens.
_PROMPT = 64
_ATTENTION, _CACHE = ("Attention", "add_attention"), ("TensorScatter", "add_kv_cache_update")

Shape = tuple[int, ...]
Ranges = Mapping[str, tuple[Shape, Shape, Shape]]
"""Smallest, typical and largest shape of each input."""


@dataclass(frozen=True)
class TensorSpec:
    """Type and shape of an input or output; None is a variable dimension."""

    dtype: type
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class GraphVariant:
    """One variant of a graph. `rows` is the number of cache rows to build for, or None
    if the graph fixes it.

    `profiles` returns the ranges for a number of rows. `operators` maps operators that
    a TensorRT may lack to the network methods that add them.
    """

    file: str
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    rows: int | None
    profiles: Callable[[int], tuple[Ranges, ...]]
    operators: Mapping[str, str] = field(default_factory=dict)

    @property
    def fused(self) -> bool:
        """True if attention is one operator."""
        return bool(self.operators)

    @property
    def updates_caches(self) -> bool:
        """True if the graph updates its input caches in place."""
        return _CACHE[0] in self.operators


def vision_variant(spec: ModelSpec, fused: bool) -> GraphVariant:
    """Returns a variant of the vision graph, for one image and every pool size."""
    size, grid, hidden = spec.vision.image_size, spec.vision.grid, spec.decoder.hidden
    most, usual = max(spec.pool_sizes) ** 2, spec.pool_sizes[0] ** 2
    pixels = (1, 3, size, size)
    ranges: Ranges = {
        PIXELS: (pixels, pixels, pixels),
        POOL: ((1, grid**2), (usual, grid**2), (most, grid**2)),
    }
    return GraphVariant(
        VISION_FUSED if fused else VISION,
        {
            PIXELS: TensorSpec(np.float32, (None, 3, size, size)),
            POOL: TensorSpec(np.float32, (None, grid**2)),
        },
        {IMAGE_EMBEDS: TensorSpec(np.float32, (None, None, hidden))},
        None,
        lambda rows: (ranges,),
        dict([_ATTENTION]) if fused else {},
    )


def decoder_variant(spec: ModelSpec, fused: bool, rows: int) -> GraphVariant:
    """Returns a variant of the decoder graph. The plain variant is built for caches of
    `rows` rows.
    """
    decoder = spec.decoder
    cache = TensorSpec(np.float16, (None, decoder.kv_heads, None, decoder.head_dim))
    held = dict.fromkeys(decoder.cache_names, cache)
    inputs = {
        INPUTS_EMBEDS: TensorSpec(np.float16, (None, None, decoder.hidden)),
        POSITION_IDS: TensorSpec(np.int64, (None, None)),
        LOGITS_ROWS: TensorSpec(np.int64, (None,)),
    }
    outputs = {
        LOGITS: TensorSpec(np.float32, (None, decoder.vocab_size)),
        NEXT_TOKEN: TensorSpec(np.int64, (None,)),
        LOGITS_MASS: TensorSpec(np.float32, (None,)),
    }
    return GraphVariant(
        DECODER_FUSED if fused else DECODER,
        inputs | held,
        outputs | {present(name): cache for name in held},
        None if fused else rows,
        lambda rows: _decoder_profiles(spec, rows),
        dict([_ATTENTION, _CACHE]) if fused else {},
    )


def _decoder_profiles(spec: ModelSpec, rows: int) -> tuple[Ranges, Ranges]:
    most, decoder = min(rows, MOST_TOKENS), spec.decoder
    usual = min(most, spec.pool_sizes[0] ** 2 + _PROMPT)
    cache = (1, decoder.kv_heads, rows, decoder.head_dim)

    def ranges(lengths: Shape, wanted: Shape) -> Ranges:
        embeds = tuple((1, length, decoder.hidden) for length in lengths)
        positions = tuple((1, length) for length in lengths)
        kept = tuple((count,) for count in wanted)
        return {INPUTS_EMBEDS: embeds, POSITION_IDS: positions, LOGITS_ROWS: kept} | dict.fromkeys(
            decoder.cache_names, (cache,) * 3
        )  # type: ignore[return-value]

    return ranges((1, 1, 1), (1, 1, 1)), ranges((1, usual, most), (1, 1, MOST_ROWS))


def check_tensors(
    found: Mapping[str, tuple[Any, Shape]], expected: Mapping[str, TensorSpec], where: Path
) -> None:
    """Raises `BundleError` unless a network's inputs or outputs are the expected ones.
    `found` gives their types and shapes, with -1 for a variable dimension.
    """
    for name in sorted(set(found) ^ set(expected)):
        raise BundleError(
            f"{where}: {name} is {'unexpected' if name in found else 'missing'}; graph and "
            f"manifest do not belong together, re-export the bundle"
        )
    for name, port in expected.items():
        dtype, shape = found[name]
        fits = len(shape) == len(port.shape) and all(
            w is None or d in (-1, w) for d, w in zip(shape, port.shape, strict=True)
        )
        if not fits or np.dtype(dtype) != port.dtype:
            wanted = f"{np.dtype(port.dtype)} {['any' if d is None else d for d in port.shape]}"
            raise BundleError(
                f"{where}: {name} is {np.dtype(dtype)} {list(shape)}, the manifest's spec expects "
                f"{wanted}; re-export the bundle"
            )
