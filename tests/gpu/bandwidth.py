"""Measures the copy rate within GPU memory through cuda-python. It is the upper bound
for decoding if PyTorch is not installed.
"""

from __future__ import annotations

import time

from runtime.engines.tensorrt.cuda import Device

__all__ = ["copy_gbs"]

_SHARE, _MOST, _ROWS, _TRIES = 8, 1 << 30, 1024, 10


def copy_gbs() -> float:
    """Returns the best copy rate in GB/s, where a byte read and written counts as two.
    Copies at most 1 GiB, or an eighth of the free memory.
    """
    device = Device()
    width = min(_MOST, device.free_memory()[0] // _SHARE) // _ROWS // 256 * 256
    source, target = (device.allocate(width * _ROWS, "the bandwidth's probe") for _ in range(2))
    device.zero(source)
    best = float("inf")
    for _ in range(_TRIES + 1):
        device.wait()
        begun = time.perf_counter()
        device.rows((target.address, width), (source.address, width), width, _ROWS)
        device.wait()
        best = min(best, time.perf_counter() - begun)
    return 2 * width * _ROWS / best / 1e9
