"""Expresses linear layers in TensorRT's explicit quantisation: QuantizeLinear and
DequantizeLinear around a float product, which TensorRT's builder fuses.

All quantisation is symmetric: signed 8-bit integers with zero at 0. Activations have
one calibrated scale per tensor. 8-bit weights have one scale per output channel, and
4-bit weights have one per block of inputs.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.linear import SIGNED, Quantised, signed_scale
from export.passes.quantise import Kernels, Layer

__all__ = ["EXPLICIT_KERNELS"]

_FP32, _I8, _I4 = ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.INT4
_MIDDLE = 8  # 4-bit level that means zero; the calibration stores levels 0 to 15


def _to_signed(layer: Layer) -> None:
    """Multiplies 8-bit activations by 8-bit weights."""
    key = (layer.x, SIGNED)
    if key not in layer.shared:
        module, low, high = layer.bounds()
        scale = layer.constant(
            f"{module}.input_scale", np.array(signed_scale(low, high), np.float32)
        )
        zero = layer.constant("zero_point.int8", np.array(0, np.int8))
        (levels,) = layer.insert("QuantizeLinear", [layer.x, scale, zero], _I8)
        (layer.shared[key],) = layer.insert("DequantizeLinear", [levels, scale], _FP32)
    layer.finish(layer.insert("MatMul", [layer.shared[key], _restore(layer)], _FP32)[0])


def _weights(layer: Layer) -> None:
    """Multiplies float activations by 8-bit or 4-bit weights."""
    layer.finish(layer.insert("MatMul", [layer.x, _restore(layer)], _FP32)[0])


def _restore(layer: Layer) -> ir.Value:
    """Returns the weight [K,N] in float, computed from levels and scales."""
    if layer.scheme.bits == 8:
        assert layer.scheme.block == 0, "8-bit weights have a scale per channel here"
        levels = layer.stored(
            "int8",
            lambda q: np.ascontiguousarray(q.levels.numpy().T.astype(np.int8)),
            _I8,
            (layer.k, layer.n),
        )
        scale = layer.stored("scale", lambda q: q.grid.scale.numpy()[:, 0], _FP32, (layer.n,))
        return layer.insert("DequantizeLinear", [levels, scale], _FP32, axis=1)[0]
    assert layer.scheme.symmetric, "4-bit weights are symmetric here"
    block = layer.scheme.grid_block(layer.k)
    assert layer.k % block == 0, (
        f"{layer.name}: TensorRT takes a block for inputs over scales, whatever block_size says"
    )
    levels = layer.stored("int4", _four, _I4, (layer.k, layer.n))
    scale = layer.stored(
        "scale",
        lambda q: np.ascontiguousarray(q.grid.scale.numpy().T),
        _FP32,
        (layer.k // block, layer.n),
    )
    return layer.insert("DequantizeLinear", [levels, scale], _FP32, axis=0, block_size=block)[0]


def _four(quantised: Quantised) -> NDArray[np.generic]:
    return np.ascontiguousarray((quantised.levels.numpy().T - _MIDDLE).astype(np.int8)).astype(
        _I4.numpy()
    )


EXPLICIT_KERNELS: Kernels = {SIGNED: _to_signed, "float": _weights}
