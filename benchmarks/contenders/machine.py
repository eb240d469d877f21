"""Measures the machine's limits at this moment: memory read bandwidth and float32
multiply-adds per second, with the same number of threads.

Decoding reads all weights once per token. The token rate times the bytes of the
weights, divided by the read bandwidth, shows how close an engine is to that bound.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["available_gib", "bandwidth_gbs", "describe", "multiply_gflops"]

_BYTES = 512 << 20  # many times larger than any cache
_SIZE = 1536  # side of the square matrices in the product
_TRIES = 5
_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")


def _shortest(call: Callable[[], object]) -> float:
    times = []
    for _ in range(_TRIES):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def bandwidth_gbs(threads: int) -> float:
    """Returns the best rate in GB/s at which `threads` threads read memory, measured
    with two reductions of one large array.
    """
    parts = np.array_split(np.ones(_BYTES // 8, np.int64), threads)
    with ThreadPoolExecutor(threads) as pool:

        def reading(reduce: Callable[[Any], Any]) -> Callable[[], object]:
            return lambda: list(pool.map(reduce, parts))

        best = min(_shortest(reading(reduce)) for reduce in (np.max, np.bitwise_or.reduce))
    return _BYTES / best / 1e9


def multiply_gflops() -> float:
    """Returns the rate of a float32 matrix product in GFLOP/s; a multiply-add counts as
    two operations. NumPy's library takes its threads from the environment.
    """
    a = np.ones((_SIZE, _SIZE), np.float32)
    return 2 * _SIZE**3 / _shortest(lambda: a @ a) / 1e9


def available_gib() -> float:
    """Returns the memory in GiB that can be used without swapping, or infinity if the
    system does not report it.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) / (
        1 << 20
    )


def describe() -> dict[str, Any]:
    """Returns the CPU, its relevant instruction sets, the number of cores, and the
    Python and system versions.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    fields = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    flags = [flag for flag in _FLAGS if flag in fields.get("flags", "").split()]
    family = (
        f"{fields.get('model name', platform.processor())} (family "
        f"{fields.get('cpu family', '?')} model {fields.get('model', '?')})"
    )
    return {
        "cpu": family,
        "flags": flags,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.platform(),
    }
