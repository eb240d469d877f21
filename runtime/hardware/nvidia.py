"""Reads an NVIDIA GPU through NVML: memory of this process, energy, and reasons for
lowered clocks. NVIDIA's own bindings come with the `gpu` extra.

Without bindings, driver or GPU, `Nvidia.open` returns the reason as text. NVML numbers
GPUs in bus order. The first entry of CUDA_VISIBLE_DEVICES selects the GPU if it is a
UUID or a number; otherwise GPU 0 is used.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator
from typing import Any

from runtime.hardware.power import Integrator
from runtime.hardware.readings import Gpu

__all__ = ["Nvidia"]

_PERIOD = 0.05
# The bits of nvmlClocksThrottleReasons / nvmlClocksEventReasons that mean clocks lower than the
# user requested.
_REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


class Nvidia:
    """One GPU. As a `Source` it measures the energy of the whole card."""

    name = "NVML"

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._integrator: Integrator | None = None
        self._start = self._counter()
        if self._start is None and self._watts() is not None:
            self._integrator = Integrator(self.name, self._readings())

    @classmethod
    def open(cls) -> Nvidia | str:
        """Opens the GPU, or returns the reason why it cannot be used."""
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return "NVML bindings are not installed (the gpu extra has them: nvidia-ml-py)"
        try:
            nvml.nvmlInit()
            chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
            by_name = chosen.startswith(("GPU-", "MIG-"))
            handle = (
                nvml.nvmlDeviceGetHandleByUUID(chosen)
                if by_name
                else nvml.nvmlDeviceGetHandleByIndex(int(chosen) if chosen.isdigit() else 0)
            )
            return cls(nvml, handle)
        except nvml.NVMLError as error:
            return f"NVML finds no GPU ({error})"

    def _ask(self, function: str) -> Any:
        """Returns the value of an NVML function, or None if this GPU or driver lacks
        it.
        """
        try:
            return getattr(self._nvml, function)(self._handle)
        except (AttributeError, self._nvml.NVMLError):
            return None

    def _counter(self) -> float | None:
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1e3

    def _watts(self) -> float | None:
        milliwatts = self._ask("nvmlDeviceGetPowerUsage")
        return None if milliwatts is None else milliwatts / 1e3

    def _readings(self) -> Iterator[dict[str, float]]:
        while True:
            yield {"gpu": self._watts() or 0.0}
            time.sleep(_PERIOD)

    @property
    def counts_energy(self) -> bool:
        """Whether this GPU reports energy or power; a Jetson's GPU does not."""
        return self._start is not None or self._integrator is not None

    def joules(self) -> dict[str, float]:
        """See `Source.joules`."""
        if self._integrator is not None:
            return self._integrator.joules()
        now = self._counter()
        return {} if now is None or self._start is None else {"gpu": now - self._start}

    def close(self) -> None:
        """See `Source.close`."""
        if self._integrator is not None:
            self._integrator.close()
        self._nvml.nvmlShutdown()

    def reasons(self) -> set[str]:
        """Returns the reasons why clocks are lowered at this moment."""
        mask = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        mask = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons") if mask is None else mask
        return {text for bit, text in _REASONS.items() if (mask or 0) & bit}

    def facts(self) -> Gpu:
        """Returns the GPU's name, its driver and the memory of this process. Inside a
        container the driver often cannot report that memory.
        """
        used = [
            process.usedGpuMemory
            for process in self._ask("nvmlDeviceGetComputeRunningProcesses") or ()
            if process.pid == os.getpid()
        ]
        return Gpu(
            _text(self._ask("nvmlDeviceGetName")),
            self._driver(),
            used[0] / 1e6 if used and used[0] is not None else None,
        )

    def _driver(self) -> str:
        try:
            return _text(self._nvml.nvmlSystemGetDriverVersion())
        except self._nvml.NVMLError:
            return "unknown"


def _text(value: Any) -> str:
    """Returns text as str, because old bindings return bytes."""
    return value.decode() if isinstance(value, bytes) else str(value or "unknown")
