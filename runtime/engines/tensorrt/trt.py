"""Wraps TensorRT's Python module on this machine: collects its error messages and
queries which features it has.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from runtime.contract.errors import EngineError
from runtime.engines.tensorrt.cuda import Device

__all__ = ["Journal", "Machine"]

_KEPT = 20


class Journal:
    """Errors that TensorRT logged since the last read, oldest first. `logger` is the
    `ILogger` that records them.
    """

    def __init__(self, trt: Any) -> None:
        lines: list[str] = []
        errors = (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)  # TensorRT's classes must be initialised by name

            def log(self, severity: Any, message: str) -> None:
                if severity in errors and len(lines) < _KEPT:
                    lines.append(" ".join(message.split()))

        self._lines, self.logger = lines, Logger()

    def clear(self) -> None:
        """Discards unread messages: they belong to an operation that succeeded in the
        end.
        """
        self._lines.clear()

    def read(self) -> str:
        """Returns the first error, which caused the later ones, and discards all of
        them.
        """
        found = self._lines[0] if self._lines else "TensorRT gave no reason"
        self.clear()
        return found[:300]


class Machine:
    """The GPU and the TensorRT of this machine. Raises `ImportError` or `EngineError`."""

    def __init__(self) -> None:
        import tensorrt

        self.trt: Any = tensorrt
        self.device = Device()
        self.journal = Journal(tensorrt)
        self.runtime = tensorrt.Runtime(self.journal.logger)

    @property
    def release(self) -> str:
        """TensorRT's version."""
        return str(self.trt.__version__)

    @property
    def name(self) -> str:
        """GPU name and TensorRT version, as readable text."""
        return f"{self.device.name} with TensorRT {self.release}"

    @property
    def fingerprint(self) -> tuple[str, ...]:
        """Everything on this machine that an engine built here depends on."""
        driver, runtime = self.device.versions
        return (self.device.name, self.device.capability, str(driver), str(runtime), self.release)

    def has(self, layers: Iterable[str]) -> bool:
        """Checks whether networks of this TensorRT support layers, given by the names
        of the methods that add them.
        """
        return all(hasattr(self.trt.INetworkDefinition, name) for name in layers)

    def must(self, ok: bool, doing: str) -> None:
        """Raises `EngineError` and marks the device as lost if a TensorRT call failed
        (`ok` is false).
        """
        if not ok:
            self.device.fail(f"{doing}: {self.journal.read()}")

    def open_serialized(self, serialized: Any) -> Any:
        """Deserialises the engine in a buffer, which copies its weights to the GPU.
        Returns None if TensorRT cannot read it.
        """
        self.device.check()
        self.journal.clear()
        return self.runtime.deserialize_cuda_engine(serialized)

    def refusal(self, what: str) -> EngineError:
        """Returns an error that says why something cannot be loaded. The most common
        reason is a lack of memory.
        """
        free, total = self.device.free_memory()
        return EngineError(
            f"{what} cannot be loaded ({self.journal.read()}; {free >> 20} of the GPU's "
            f"{total >> 20} MiB are free); "
            "close other programs, or choose a smaller --context"
        )
