"""Builds quantised linear layers from ONNX Runtime's fastest kernels: products of 8-bit
integers, and products that unpack weights inside the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

from calibration.linear import Quantised, activation_grid, fits
from export.passes.quantise import Kernels, Layer

__all__ = ["BLOCK_KERNELS", "INTEGER_KERNELS"]

_LEVELS = 127.0
_BYTES, _UNROUNDED = 4, 0  # accuracy levels of MatMulNBits
_FP32, _U8, _I8 = ir.DataType.FLOAT, ir.DataType.UINT8, ir.DataType.INT8


@dataclass(frozen=True)
class _Levels:
    """Quantised activations [..., K]: uint8 levels, their zero point (scalar), and a
    scale. There is one scale per row [..., 1] or one for the whole tensor.
    """

    levels: ir.Value
    zero_point: ir.Value
    scale: ir.Value


def _weight(layer: Layer) -> tuple[ir.Value, ir.Value]:
    """Returns 8-bit levels [K,N] and a scale per output channel [N]."""
    levels = layer.stored("int8", _fit, _I8, (layer.k, layer.n))
    return levels, layer.stored("scale", lambda q: q.grid.scale.numpy()[:, 0], _FP32, (layer.n,))


def _fit(quantised: Quantised) -> NDArray[np.int8]:
    """Returns the levels in the kernel's layout. The manifest says that their products
    fit 16 bits, so this is checked (`calibration.linear.round_in_pairs`).
    """
    assert fits(quantised), "8-bit weights for 8-bit activations are rounded in pairs"
    return np.ascontiguousarray(quantised.levels.numpy().T.astype(np.int8))


def _per_row(layer: Layer) -> None:
    """Quantises activations with one symmetric scale per row, around the zero point
    128. The floor keeps an all-zero row from dividing by zero.

    Casting truncates, so adding 128.5 rounds to the nearest level.
    """
    key = (layer.x, "int8-row")
    if key not in layer.shared:
        axes, floor = (
            layer.constant("last_axis", np.array([-1], np.int64)),
            layer.constant("scale.floor", np.array(1e-12, np.float32)),
        )
        inverse = layer.constant("levels.inverse", np.array(1 / _LEVELS, np.float32))
        offset = layer.constant("levels.offset", np.array(128.5, np.float32))
        (magnitude,) = layer.insert("Abs", [layer.x], _FP32)
        (peak,) = layer.insert("ReduceMax", [magnitude, axes], _FP32, keepdims=1)
        (peak,) = layer.insert("Max", [peak, floor], _FP32)
        (scale,) = layer.insert("Mul", [peak, inverse], _FP32)
        (ratio,) = layer.insert("Div", [layer.x, scale], _FP32)
        (shifted,) = layer.insert("Add", [ratio, offset], _FP32)
        (levels,) = layer.insert("Cast", [shifted], _U8, to=_U8)
        layer.shared[key] = _Levels(
            levels, layer.constant("zero_point.128", np.array(128, np.uint8)), scale
        )
    x = layer.shared[key]
    assert isinstance(x, _Levels)
    weight, column_scale = _weight(layer)
    (product,) = layer.insert("MatMulInteger", [x.levels, weight, x.zero_point], ir.DataType.INT32)
    (product,) = layer.insert("Cast", [product], _FP32, to=_FP32)
    (product,) = layer.insert("Mul", [product, x.scale], _FP32)
    layer.finish(layer.insert("Mul", [product, column_scale], _FP32)[0])


def _per_tensor(layer: Layer) -> None:
    """Quantises activations with one scale and zero point for the whole tensor, from
    its range. Both scales are multiplied first, because ONNX Runtime fuses that form.
    """
    key = (layer.x, "int8-tensor")
    if key not in layer.shared:
        levels, scale, zero_point = layer.insert(
            "DynamicQuantizeLinear", [layer.x], _U8, _FP32, _U8
        )
        layer.shared[key] = _Levels(levels, zero_point, scale)
    x = layer.shared[key]
    assert isinstance(x, _Levels)
    weight, column_scale = _weight(layer)
    (product,) = layer.insert("MatMulInteger", [x.levels, weight, x.zero_point], ir.DataType.INT32)
    (product,) = layer.insert("Cast", [product], _FP32, to=_FP32)
    (both,) = layer.insert("Mul", [x.scale, column_scale], _FP32)
    layer.finish(layer.insert("Mul", [product, both], _FP32)[0])


def _static(layer: Layer) -> None:
    """Quantises activations with a calibrated range: QuantizeLinear and
    DequantizeLinear around the product, which engines fuse into one integer kernel.
    """
    key = (layer.x, "int8-static")
    if key not in layer.shared:
        module, low, high = layer.bounds()
        scale, zero = activation_grid(low, high)
        grid = (
            layer.constant(f"{module}.input_scale", np.array(scale, np.float32)),
            layer.constant(f"{module}.input_zero", np.array(zero, np.uint8)),
        )
        (levels,) = layer.insert("QuantizeLinear", [layer.x, *grid], _U8)
        (layer.shared[key],) = layer.insert("DequantizeLinear", [levels, *grid], _FP32)
    x = layer.shared[key]
    assert isinstance(x, ir.Value)
    (restored,) = layer.insert("DequantizeLinear", list(_weight(layer)), _FP32, axis=1)
    layer.finish(layer.insert("MatMul", [x, restored], _FP32)[0])


def _weight_only(layer: Layer, accuracy: int = _BYTES) -> None:
    """Multiplies by weights in blocks, which the kernel unpacks. In the graph,
    activations stay float.

    With `accuracy` `_BYTES`, the kernel may round them to 8 bits per block of a row.
    """
    bits, block = layer.scheme.bits, layer.scheme.kernel_block(layer.k)
    count = -(-layer.k // block)
    pairs = -(-count // 2) if bits == 4 else count
    offset = 128 if bits == 8 else 0
    levels = layer.stored(
        f"int{bits}",
        lambda q: _pack(q.levels.numpy() + offset, block, bits),
        _U8,
        (layer.n, count, block * bits // 8),
    )
    scale = layer.stored(
        "scale", lambda q: _per_block(q.grid.scale, count), _FP32, (layer.n, count)
    )
    zero = None
    if (
        bits == 4 and not layer.scheme.symmetric
    ):  # without zero points, the kernel uses the middle of the range, which is faster
        zero = layer.stored(
            "zero",
            lambda q: _pack(_per_block(q.grid.zero, count), count, 4)[:, 0],
            _U8,
            (layer.n, pairs),
        )
    layer.model.opset_imports["com.microsoft"] = 1
    attributes = {
        "K": layer.k,
        "N": layer.n,
        "bits": bits,
        "block_size": block,
        "accuracy_level": accuracy,
    }
    inputs = [layer.x, levels, scale, *([zero] if zero is not None else [])]
    layer.finish(
        layer.insert("MatMulNBits", inputs, _FP32, domain="com.microsoft", **attributes)[0]
    )


def _per_block(values: Tensor, count: int) -> NDArray[Any]:
    """Returns the values of a grid as [N, blocks] in the kernel's layout. A value per
    channel is repeated for all its blocks.
    """
    return np.ascontiguousarray(np.broadcast_to(values.numpy(), (values.shape[0], count)))


def _pack(levels: NDArray[np.integer], block: int, bits: int) -> NDArray[np.uint8]:
    """Packs levels [N, K] into bytes [N, blocks, bytes], with zeros after the end. The
    earlier of two 4-bit levels is the low half of a byte.
    """
    n, k = levels.shape
    padded = np.zeros((n, -(-k // block), block + (block % 2 if bits == 4 else 0)), np.uint8)
    for index in range(padded.shape[1]):
        part = levels[:, index * block : (index + 1) * block]
        padded[:, index, : part.shape[1]] = part
    return padded if bits == 8 else padded[..., ::2] | (padded[..., 1::2] << 4)


INTEGER_KERNELS: Kernels = {
    "int8-row": _per_row,
    "int8-tensor": _per_tensor,
    "int8-static": _static,
    "float": _weight_only,
}
BLOCK_KERNELS: Kernels = {"float": partial(_weight_only, accuracy=_UNROUNDED)}
"""Kernels for GPUs, which quantise only weights. GPU kernels never round activations,
so the CPU must not round them when it replaces a GPU.
"""
