"""Opening a bundle's graph in ONNX Runtime: the settings every session here uses, and its faults in our words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import onnxruntime as ort

from runtime.contract.bundle import Bundle
from runtime.contract.errors import EngineError
from runtime.engines import EngineOptions

__all__ = ["engine_errors", "open_graph", "session_options"]

_ERRORS = 3  # ONNX Runtime log level


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def session_options(threads: int | None, spinning: bool = True) -> ort.SessionOptions:
    """ONNX Runtime settings every session here uses; `threads` None means all cores this process may use.

    `spinning` lets idle worker threads wait busily for the next operator.
    """
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads or _cores()
    settings.inter_op_num_threads = 1
    settings.log_severity_level = _ERRORS
    # x86 CPUs without VNNI saturate in the unsigned-by-signed 8-bit kernel; this makes ONNX Runtime take the exact one there (and only there).
    settings.add_session_config_entry("session.x64quantprecision", "1")
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    return settings


def open_graph(bundle: Bundle, file: str, options: EngineOptions, spinning: bool = True) -> ort.InferenceSession:
    """A session of one of a bundle's graphs. Raises `EngineError`."""
    return _session(bundle.file(file), options, spinning)


def _session(path: Path, options: EngineOptions, spinning: bool) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(str(path), session_options(options.threads, spinning), providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        raise EngineError(f"ONNX Runtime refuses {path}: {str(error).splitlines()[0]:.300}; re-export the bundle for this version") from None


def engine_errors(error: Exception) -> NoReturn:
    """Raises the first line of what ONNX Runtime said while running as an `EngineError`."""
    raise EngineError(f"ONNX Runtime failed: {str(error).splitlines()[0]:.300}; run infmllm-run --self-test, or re-export the bundle") from None
