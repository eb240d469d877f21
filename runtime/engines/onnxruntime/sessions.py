"""Opening a bundle's graph in ONNX Runtime: the settings every session here uses, and
its faults in our words.
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
    """ONNX Runtime settings every session here uses; `threads` None means all cores
    this process may use.

    `spinning` lets idle worker threads wait busily for the next operator, `resting`
    stops that when a run is over: they would take the cores another session needs. x86
    CPUs without VNNI saturate in the unsigned-by-signed 8-bit kernel unless the weights
    were made to fit (as our builds do); `exact` makes ONNX Runtime take its exact,
    slower one there (and only there).
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
    """A session of one of a bundle's graphs, from the engine cache where its weights
    are worth it. Raises `EngineError`.
    """
    exact = not bundle.saturation_safe

    def settings() -> ort.SessionOptions:
        # The tower runs once an answer, a prefill graph before the first token: neither may go
        # on spinning beside what comes next.
        return session_options(options.threads, file != VISION, exact, resting=file == PREFILL)

    path = bundle.file(file)
    if options.engine_cache and (ready := stored(bundle, file, settings, str(exact))):
        try:
            return open_stored(ready, settings())
        except (
            Exception
        ) as error:  # removed or replaced a moment ago; the plain graph is still there
            note(
                f"the packed weights of {file} cannot be opened "
                f"({str(error).splitlines()[0]:.160}); loading takes longer"
            )
    try:
        return ort.InferenceSession(str(path), settings(), providers=_PROVIDERS)
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        raise EngineError(
            f"ONNX Runtime refuses {path}: {str(error).splitlines()[0]:.300}; re-export the "
            f"bundle for this version"
        ) from None


def engine_errors(error: Exception) -> NoReturn:
    """Raises the first line of what ONNX Runtime said while running as an
    `EngineError`.
    """
    raise EngineError(
        f"ONNX Runtime failed: {str(error).splitlines()[0]:.300}; run infmllm-run --self-test, or "
        f"re-export the bundle"
    ) from None
