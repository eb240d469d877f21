"""Describes the devices that a plan can be made for: memory, bandwidth and peak rates,
from their makers' data sheets, a measurement or a file.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from calibration.linear import LinearScheme
from runtime.contract.errors import UsageError
from runtime.engines import available_cores

__all__ = ["DEVICES", "Device", "find_device", "this_machine"]

_REACHED = 0.6  # share of peak arithmetic that good kernels reach; _BANDWIDTH: of peak bandwidth
_BANDWIDTH = 0.85
GPU_KERNEL_US = 3.4
"""A short kernel inside a CUDA graph, measured by NVIDIA ("Getting Started with CUDA Graphs",
2019): 2.9 us of work and 0.5 us until the next one.
"""
_CPU_KERNEL_US = 2.0  # ONNX Runtime: a step of the demo takes 0.146 ms for 67 operators
_PROBE_BYTES, _PROBE_SIZE = 256 << 20, 1536


@dataclass(frozen=True)
class Device:
    """A device: memory for a process in GB, bandwidth in GB/s, dense arithmetic in
    TFLOP/s or TOP/s. All rates are those that kernels can reach, not peak rates.
    `kernel_us` is the least time in microseconds from the start of one kernel to the next.
    """

    name: str
    memory_gb: float
    bandwidth_gbs: float
    float_tflops: float
    int8_tops: float
    source: str = ""
    kernel_us: float = GPU_KERNEL_US

    def rate(self, scheme: LinearScheme) -> float:
        """Returns the rate of a linear layer with many rows in TFLOP/s (or TOP/s)."""
        return (
            self.int8_tops
            if scheme.quantised and scheme.activation != "float"
            else self.float_tflops
        )


def _peak(
    name: str, memory: float, bandwidth: float, half: float, int8: float, source: str
) -> Device:
    return Device(name, memory, bandwidth * _BANDWIDTH, half * _REACHED, int8 * _REACHED, source)


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        # System memory is shared: about 1.5 GB of it belong to JetPack.
        _peak(
            "orin-nano-8gb",
            6.5,
            102,
            17,
            33,
            "NVIDIA Jetson Orin Nano data sheet: Super mode, dense rates",
        ),
        _peak(
            "orin-agx-64gb",
            62,
            204.8,
            42.5,
            85,
            "NVIDIA Jetson AGX Orin data sheet: GPU, dense rates",
        ),
        _peak(
            "rtx4090",
            23.5,
            1008,
            165.2,
            660.6,
            "NVIDIA Ada architecture paper: fp16 with fp32 accumulation, dense int8",
        ),
    )
}


def find_device(text: str | None) -> Device:
    """Returns a device by name, from a JSON file with the fields of `Device`, or this
    machine for None. Raises `UsageError`.
    """
    if text is None:
        return this_machine()
    if text in DEVICES:
        return DEVICES[text]
    path = Path(text)
    if not path.is_file():
        raise UsageError(
            f"unknown device {text!r}; choose one of: {', '.join(DEVICES)}, or name a JSON file"
        )
    names = {field.name for field in fields(Device)}
    try:
        data = json.loads(path.read_bytes())
        device = Device(**{"name": path.stem, **data})
        rates = (device.memory_gb, device.bandwidth_gbs, device.float_tflops, device.int8_tops)
        numbers = (*rates, device.kernel_us)
        if not all(isinstance(value, int | float) and value > 0 for value in numbers):
            raise ValueError("a value is not a positive number")
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{path} describes no device ({error}); expected a JSON object with "
            f"{', '.join(sorted(names))}"
        ) from None
    return device


def this_machine() -> Device:
    """Measures this machine for about a second: its memory, its reading bandwidth and
    its rate of float products. The rate of 8-bit products is a usual multiple of that.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    block = np.ones(_PROBE_BYTES // 4, np.float32)
    reading = min(_time(lambda: float(block.sum())) for _ in range(3))
    matrix = np.ones((_PROBE_SIZE, _PROBE_SIZE), np.float32)
    product = min(_time(lambda: matrix @ matrix) for _ in range(3))
    flops = 2e-12 * _PROBE_SIZE**3 / product
    # Measured: docs/benchmarks.md.
    faster = 4.0 if _has("avx512_vnni", "avx_vnni", "asimddp") else 1.3
    # numpy sums on one core, and two cores read about twice that.
    bandwidth = _PROBE_BYTES / reading / 1e9 * min(2, available_cores())
    rates = (memory, bandwidth, flops, faster * flops)
    return Device("this machine", *rates, "measured", _CPU_KERNEL_US)


def _time(work: object) -> float:
    started = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - started


def _has(*features: str) -> bool:
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return False
    return any(feature in words for feature in features)
