"""Opens a bundle's graphs in ONNX Runtime with the session settings used here, and
converts its errors to `EngineError`.
"""

from __future__ import annotations

from typing import NoReturn

import onnxruntime as ort

from runtime.contract.bundle import PREFILL, VISION, Bundle
from runtime.contract.errors import EngineError
from runtime.engines import EngineOptions, available_cores
from runtime.engines.onnxruntime.prepacked_weights import open_stored, stored
from runtime.output.console import note

__all__ = ["engine_errors", "open_graph", "session_options"]

_ERRORS = 3  # ONNX Runtime log level
_PROVIDERS = ["CPUExecutionProvider"]


def session_options(
    threads: int | None, spinning: bool = True, exact: bool = True, resting: bool = False
) -> ort.SessionOptions:
    """Returns the ONNX Runtime settings that every session here uses; `threads` None
    means all cores this process may use.

    `spinning` lets idle worker threads busy-wait for the next operator. `resting` stops
    busy-waiting when a run is over, because it would take cores that another session
    needs. On x86 CPUs without VNNI, the unsigned-by-signed 8-bit kernel saturates
    unless the weights are kept small enough (as this project's builds do). `exact`
    makes ONNX Runtime use its exact, slower kernel on those CPUs, and only there.
    """
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads or available_cores()
    settings.inter_op_num_threads = 1
    settings.log_severity_level = _ERRORS
    settings.add_session_config_entry("session.x64quantprecision", "1" if exact else "0")
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    settings.add_session_config_entry("session.force_spinning_stop", "1" if resting else "0")
    return settings


def open_graph(bundle: Bundle, file: str, options: EngineOptions) -> ort.InferenceSession:
    """Opens a session for one of a bundle's graphs, from the engine cache if its
    weights are large enough. Raises `EngineError`.
    """
    exact = not bundle.saturation_safe

    def settings() -> ort.SessionOptions:
        # The vision tower runs once per answer, a prefill graph before the first token. Neither
        # may keep busy-waiting while the next graph runs.
        return session_options(options.threads, file != VISION, exact, resting=file == PREFILL)

    path = bundle.file(file)
    if options.engine_cache and (ready := stored(bundle, file, settings, str(exact))):
        try:
            return open_stored(ready, settings())
        except (
            Exception
        ) as error:  # just removed or replaced by another process: use the plain graph
            note(
                f"the packed weights of {file} cannot be opened "
                f"({str(error).splitlines()[0]:.160}); loading takes longer"
            )
    try:
        return ort.InferenceSession(str(path), settings(), providers=_PROVIDERS)
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        raise EngineError(
            f"ONNX Runtime cannot load {path}: {str(error).splitlines()[0]:.300}; re-export the "
            f"bundle for this version"
        ) from None


def engine_errors(error: Exception) -> NoReturn:
    """Raises an `EngineError` with the first line of an error from a running ONNX
    Runtime session.
    """
    raise EngineError(
        f"ONNX Runtime failed: {str(error).splitlines()[0]:.300}; run infmllm-run --self-test, or "
        f"re-export the bundle"
    ) from None
