"""Measures how fast this machine reads memory and multiplies matrices, with the same
engine and number of threads that compute the answers.

Each probe is an ONNX graph of one node, built in memory. The best of several runs
counts, because a limit is the most that the machine can do.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import onnxruntime as ort

from runtime.bench.report import Limits
from runtime.engines.onnxruntime.sessions import session_options
from runtime.hardware.probe_model import one_node_model

__all__ = ["measure_limits"]

_SECONDS = 0.25  # per probe; three probes before and three after take less than two seconds
_LEAST_RUNS = 3
_SIZE = 1024  # side of the square matrices: fills the kernels but still fits cache blocks
_ROW = 4096
_LEAST_MB, _MOST_MB, _CACHES = 64, 512, 4  # memory read per run: several times the last-level cache


def measure_limits(threads: int, last_cache_mb: float | None) -> Limits:
    """Measures reading in GB/s and float32 and 8-bit products in GFLOP/s and GOP/s,
    with `threads` threads; takes about 0.8 s.
    """
    size = int(min(_MOST_MB, max(_LEAST_MB, _CACHES * (last_cache_mb or 0))) * 1e6)
    return Limits(
        _read_rate(threads, size),
        _product_rate(threads, "MatMul", np.float32),
        _product_rate(threads, "MatMulInteger", np.uint8),
    )


def _read_rate(threads: int, size: int) -> float:
    """Returns the GB/s of one row times a matrix of `size` bytes, as in a decode step."""
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
    """Returns 10^9 operations per second of a square product with constant weights;
    each multiplication counts as 2 operations.
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
    """Returns the shortest of repeated runs in seconds, after one warm-up run."""
    work()
    times: list[float] = []
    until = time.perf_counter() + _SECONDS
    while len(times) < _LEAST_RUNS or time.perf_counter() < until:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
