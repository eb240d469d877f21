"""How fast this machine reads memory and multiplies matrices, measured by the very
engine and number of threads that answers are computed with.

Each probe is an ONNX graph of one node, made in memory; best of several runs, because a
limit is what the machine can do, not what it usually does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from runtime.bench.report import Limits
from runtime.engines.onnxruntime.sessions import session_options

__all__ = ["measure_limits", "one_node_model"]

_SECONDS = 0.25  # per probe; three probes, before and after, are less than two seconds
_LEAST_RUNS = 3
_SIZE = 1024  # of the square matrices: enough rows for full kernels, and still in cache blocks
_ROW = 4096
_LEAST_MB, _MOST_MB, _CACHES = 64, 512, 4  # memory read per run: several times the last cache
_DTYPES: dict[Any, int] = {
    np.dtype(np.float32): 1,
    np.dtype(np.uint8): 2,
    np.dtype(np.int8): 3,
    np.dtype(np.int32): 6,
}  # onnx.TensorProto.DataType


def measure_limits(threads: int, last_cache_mb: float | None) -> Limits:
    """Reading in GB/s, float32 and 8-bit products in GFLOP/s and GOP/s, with `threads`
    threads; about 0.8 s.
    """
    size = int(min(_MOST_MB, max(_LEAST_MB, _CACHES * (last_cache_mb or 0))) * 1e6)
    return Limits(
        _read_rate(threads, size),
        _product_rate(threads, "MatMul", np.float32),
        _product_rate(threads, "MatMulInteger", np.uint8),
    )


def _read_rate(threads: int, size: int) -> float:
    """GB/s of one row times a matrix of `size` bytes: what a decode step does."""
    matrix = np.ones((_ROW, size // 4 // _ROW), np.float32)
    row = np.ones((1, _ROW), np.float32)
    session = _open(
        one_node_model("MatMul", row, matrix.shape, matrix.dtype, np.dtype(np.float32)), threads
    )
    feeds = {
        "a": ort.OrtValue.ortvalue_from_numpy(row),
        "b": ort.OrtValue.ortvalue_from_numpy(matrix),
    }
    return matrix.nbytes / _best(lambda: session.run_with_ort_values(["c"], feeds)) / 1e9


def _product_rate(threads: int, operator: str, dtype: type[np.generic]) -> float:
    """10^9 operations a second of a square product with constant weights, 2 for each
    multiplication.
    """
    left = np.ones((_SIZE, _SIZE), dtype)
    right = np.ones((_SIZE, _SIZE), np.int8 if dtype is np.uint8 else dtype)
    result = np.dtype(np.int32 if dtype is np.uint8 else np.float32)
    session = _open(
        one_node_model(operator, left, right.shape, right.dtype, result, right), threads
    )
    feeds = {"a": left}
    return 2 * _SIZE**3 / _best(lambda: session.run(None, feeds)) / 1e9


def _open(model: bytes, threads: int) -> ort.InferenceSession:
    return ort.InferenceSession(
        model, session_options(threads, exact=False), providers=["CPUExecutionProvider"]
    )


def _best(work: Callable[[], object]) -> float:
    """The shortest of repeated runs, in seconds, after one to warm up."""
    work()
    times: list[float] = []
    until = time.perf_counter() + _SECONDS
    while len(times) < _LEAST_RUNS or time.perf_counter() < until:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


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
