"""TensorRT's Python module: found when an engine is loaded, its messages collected for ours, its abilities asked for rather than guessed."""

from __future__ import annotations

from typing import Any

__all__ = ["CACHED_ATTENTION", "Journal", "fuses_attention", "journal", "tensorrt"]

CACHED_ATTENTION = ("Attention", "TensorScatter")
"""ONNX operators of the fused graphs that not every TensorRT has."""

_KEPT = 20


def tensorrt() -> Any:
    """The module. Raises `ImportError`."""
    import tensorrt

    return tensorrt


def fuses_attention(trt: Any) -> bool:
    """Whether this TensorRT can have attention and key/value caches as layers of their own (10.15 and later)."""
    return hasattr(trt.INetworkDefinition, "add_kv_cache_update") and hasattr(trt.INetworkDefinition, "add_attention")


class Journal:
    """What TensorRT complained of, oldest first, since it was last read."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.logger: Any = None

    def add(self, text: str) -> None:
        """Notes one complaint."""
        self.lines = [*self.lines, " ".join(text.split())][-_KEPT:]

    def read(self, most: int = 300) -> str:
        """The first complaint, which the others follow from; forgets all."""
        found = self.lines[0] if self.lines else "TensorRT gave no reason"
        self.lines = []
        return found[:most]


def journal(trt: Any) -> Journal:
    """A journal and, in its `logger`, the `ILogger` that writes it."""
    pages = Journal()
    errors = (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # TensorRT's classes want to be initialised by name

        def log(self, severity: Any, message: str) -> None:
            if severity in errors:
                pages.add(message)

    pages.logger = Logger()
    return pages
