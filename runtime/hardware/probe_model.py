"""Builds an ONNX model of one node in memory, without the onnx package."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["one_node_model"]


_DTYPES: dict[Any, int] = {
    np.dtype(np.float32): 1,
    np.dtype(np.uint8): 2,
    np.dtype(np.int8): 3,
    np.dtype(np.int32): 6,
}  # onnx.TensorProto.DataType


def one_node_model(
    operator: str,
    left: NDArray[Any],
    shape: tuple[int, ...],
    dtype: Any,
    result: Any,
    weights: NDArray[Any] | None = None,
) -> bytes:
    """An ONNX file of `c = operator(a, b)`, with `b` an input of that shape or constant
    `weights`. Field numbers are those of onnx.proto.
    """
    node = _field(1, "a") + _field(1, "b") + _field(2, "c") + _field(4, operator)
    graph = (
        _field(1, node) + _field(2, "probe") + _field(11, _value_info("a", left.dtype, left.shape))
    )
    graph += _field(12, _value_info("c", result, (left.shape[0], shape[1])))
    if weights is None:
        graph += _field(11, _value_info("b", dtype, shape))
    else:
        dims = b"".join(_field(1, size) for size in shape)
        graph += _field(
            5, dims + _field(2, _DTYPES[dtype]) + _field(8, "b") + _field(9, weights.tobytes())
        )
    return (
        _field(1, 8) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 17))
    )  # IR version 8, opset 17


def _value_info(name: str, dtype: Any, shape: tuple[int, ...]) -> bytes:
    dims = b"".join(_field(1, _field(1, size)) for size in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, _DTYPES[dtype]) + _field(2, dims)))


def _field(number: int, value: int | str | bytes) -> bytes:
    """A protocol buffer field: a whole number, or bytes with their length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])
