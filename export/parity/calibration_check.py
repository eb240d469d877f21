"""Compares what a build stores with its own calibration: rounded weights, ranges and scales
that cannot be recomputed from the checkpoint alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from calibration.calibrate import Calibrated
from calibration.linear import SIGNED, activation_grid, signed_scale
from export.parity.float_view import FloatView
from export.parity.stored_weights import StoredWeight
from export.parity.tensor_check import TensorFault, weight_part
from export.passes.int8_cache import cache_scale
from export.passes.pack_projections import parts_of
from export.schemes import Scheme

__all__ = ["Origin", "check_calibrated"]


@dataclass(frozen=True)
class Origin:
    """What a build knows of its own bundle: the calibration, and the scheme."""

    calibrated: Calibrated
    scheme: Scheme


def check_calibrated(view: FloatView, origin: Origin, prefill: bool) -> Iterator[TensorFault]:
    """Yields the tensors that are not those of the calibration. `prefill` tells whether the
    graph is the second decoder.
    """
    for weight in view.weights.values():
        yield from _check_range(weight, origin)
        for name in parts_of(weight.name):
            linear = origin.scheme.linear(name, prefill)
            if linear.rounding == "gptq" and weight.kind == "int4":
                expected = origin.calibrated.quantised(name, linear).levels.numpy()
                levels = weight_part(weight, name, weight.read()[0], origin.calibrated.read)
                if not np.array_equal(levels.numpy().astype(np.int16), expected):
                    yield TensorFault(name, "does not have the levels of the calibration")
    for name, scale in view.cache_scales.items():
        layer, _, kind = name.removesuffix("_scale").rpartition(".")
        if not np.array_equal(scale, cache_scale(origin.calibrated, layer, kind)):
            yield TensorFault(name, "is not the calibration's")


def _check_range(weight: StoredWeight, origin: Origin) -> Iterator[TensorFault]:
    if weight.static is None:
        return
    module = parts_of(weight.name)[0].removesuffix(".weight")
    found = origin.calibrated.get(f"{module}|range")
    if found is None:
        return  # the layer shares its input with one whose range was stored
    low, high = float(found[0]), float(found[1])
    signed = weight.activation == SIGNED
    scale, zero = (signed_scale(low, high), 0) if signed else activation_grid(low, high)
    stored = (np.float32(scale), np.float32(np.float16(scale)))
    if np.float32(weight.static[0]) not in stored or weight.static[1] != zero:
        yield TensorFault(
            module, f"rounds its input to {weight.static}, calibrated: {scale:.4g}, {zero}"
        )
