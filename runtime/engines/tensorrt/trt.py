"""TensorRT's Python module on this machine: its messages collected for ours, its
abilities asked for rather than guessed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from runtime.contract.errors import EngineError
from runtime.engines.tensorrt.cuda import Device

__all__ = ["Journal", "Machine"]

_KEPT = 20


class Journal:
    """What TensorRT complained of, oldest first, since it was last read; `logger` is
    the `ILogger` that writes it.
    """

    def __init__(self, trt: Any) -> None:
        lines: list[str] = []
        errors = (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)

        class Logger(trt.ILogger):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)  # TensorRT's classes want to be initialised by name

            def log(self, severity: Any, message: str) -> None:
                if severity in errors and len(lines) < _KEPT:
                    lines.append(" ".join(message.split()))

        self._lines, self.logger = lines, Logger()

    def clear(self) -> None:
        """Forgets what was not read: it belongs to something that went well in the end."""
        self._lines.clear()

    def read(self) -> str:
        """The first complaint, which the others follow from; forgets all."""
        found = self._lines[0] if self._lines else "TensorRT gave no reason"
        self.clear()
        return found[:300]


class Machine:
    """The GPU and the TensorRT that are here. Raises `ImportError`, `EngineError`."""

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
        """GPU and TensorRT, for a person."""
        return f"{self.device.name} with TensorRT {self.release}"

    @property
    def fingerprint(self) -> tuple[str, ...]:
        """What an engine built here depends on."""
        driver, runtime = self.device.versions
        return (self.device.name, self.device.capability, str(driver), str(runtime), self.release)

    def has(self, layers: Iterable[str]) -> bool:
        """Whether networks of this TensorRT can have layers, by the names of the
        methods that add them.
        """
        return all(hasattr(self.trt.INetworkDefinition, name) for name in layers)

    def must(self, ok: bool, doing: str) -> None:
        """Raises `EngineError`, and gives the device up, unless TensorRT did what it
        was told.
        """
        if not ok:
            self.device.fail(f"{doing}: {self.journal.read()}")

    def opened(self, serialized: Any) -> Any:
        """The engine in a buffer, or None if TensorRT cannot read it. Weights go to the
        GPU now.
        """
        self.device.check()
        self.journal.clear()
        return self.runtime.deserialize_cuda_engine(serialized)

    def refusal(self, what: str) -> EngineError:
        """Why something cannot be loaded; most often there is no memory for it."""
        free, total = self.device.free_memory()
        return EngineError(
            f"{what} cannot be loaded ({self.journal.read()}; {free >> 20} of the GPU's "
            f"{total >> 20} MiB are free); "
            "close other programs, or choose a smaller --context"
        )
