"""ONNX Runtime's CUDA provider: runs both graphs of a `cuda` bundle, with caches in GPU
memory and decode steps as one CUDA graph.

A greedy step copies a token id and one number back to the host. The attention operator
reads the length of each sequence from the device (`seqlens_k`). It takes the total
length from the host, but only to choose how the work is split. A decode step therefore
always passes the full cache length there. Nothing on the host changes between steps, so
one captured graph serves them all.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from runtime.contract.bundle import DECODER, VISION, Bundle
from runtime.contract.errors import EngineError
from runtime.contract.graphs import (
    INPUTS_EMBEDS,
    LOGITS,
    LOGITS_MASS,
    LOGITS_ROWS,
    NEXT_TOKEN,
    SEQLENS_K,
    TOTAL_LENGTH,
    present,
)
from runtime.engines import PIP_ONNXRUNTIME_GPU, EngineOptions
from runtime.engines.onnxruntime.check_io import Shape, check_values, check_vision
from runtime.engines.onnxruntime.gpu_batch import DeviceBatch
from runtime.engines.onnxruntime.gpu_engine import CallShape, DeviceEngine
from runtime.engines.onnxruntime.io_binding import Bound, Device
from runtime.engines.onnxruntime.sessions import session_options

__all__ = ["CUDA", "OrtCudaEngine"]

CUDA = Device("CUDAExecutionProvider", "cuda", captures=True)
_TARGET = "cuda"
_FATAL = 4  # ONNX Runtime log level
_SETTINGS = {
    "device_id": "0",
    "arena_extend_strategy": "kSameAsRequested",  # the default doubles each extension
    # The only convolution is the patch embedding: an exhaustive search does not pay at each start.
    "cudnn_conv_algo_search": "HEURISTIC",
}


class OrtCudaEngine(DeviceEngine):
    """Runs the graphs of a `cuda` bundle. With device `HOST` the same graphs and calls
    run on the CPU, which builds and tests use for validation.
    """

    def __init__(self, bundle: Bundle, options: EngineOptions, device: Device = CUDA) -> None:
        if device.captures:
            _check_available(device)
        spec = bundle.spec.decoder
        vision = _open(bundle, VISION, options, device)
        decoder = _open(bundle, DECODER, options, device, captures=device.captures)
        _check_decoder(bundle, decoder)
        check_vision(bundle, VISION, vision)
        super().__init__(
            bundle, device, vision, decoder, min(options.context or spec.context, spec.context)
        )

    def batch(self, slots: int, rows: int) -> DeviceBatch:
        """See `Engine.batch`."""
        spec = self.bundle.spec.decoder
        shape = (slots, spec.kv_heads, min(rows, self.capacity), spec.head_dim)
        return DeviceBatch(
            self.device,
            self.caches,
            shape,
            lambda slots, caches: self.bound(CallShape(slots, 1, 1), caches),
        )

    def places(self, length: int, start: int) -> dict[str, NDArray[Any]]:
        """Returns the inputs that say how far the cache is filled. For a single token,
        the total length stays the full cache length (see the module docstring).
        """
        end = start + length
        filled: dict[str, NDArray[Any]] = {SEQLENS_K: np.array([end - 1], np.int32)}
        return filled if length == 1 else {**filled, TOTAL_LENGTH: np.array(end, np.int32)}

    def bound(self, shape: CallShape, caches: Mapping[str, ort.OrtValue]) -> Bound:
        """See `DeviceEngine.bound`. A single-token call on the engine's own cache is
        captured as a CUDA graph.
        """
        rows, own = int(next(iter(caches.values())).shape()[2]), caches is self.caches
        inputs: dict[str, NDArray[Any]] = {
            SEQLENS_K: np.zeros(shape.slots, np.int32),
            TOTAL_LENGTH: np.array(rows, np.int32),
        }
        return self.call(
            shape,
            caches,
            inputs,
            frozenset({TOTAL_LENGTH}),
            0 if own and shape.length == 1 else None,
        )


def _remedy() -> str:

    return (
        f"run: {PIP_ONNXRUNTIME_GPU} (infmllm-export doctor --target {_TARGET} shows what is "
        f"missing)"
    )


def _check_available(device: Device) -> None:
    """Raises `EngineError` if this onnxruntime lacks the device's provider. Loads the
    CUDA libraries that pip installed, if there are any.
    """
    if device.provider not in ort.get_available_providers():
        raise EngineError(
            f"the installed onnxruntime {ort.__version__} has no {device.provider}; {_remedy()}"
        )
    ort.set_default_logger_severity(_FATAL)
    with contextlib.redirect_stdout(
        io.StringIO()
    ):  # preload_dlls prints missing libraries; the session reports them in one line
        ort.preload_dlls()


def _open(
    bundle: Bundle, file: str, options: EngineOptions, device: Device, captures: bool = False
) -> ort.InferenceSession:
    """Opens a session that runs every node on the device. Raises `EngineError` where
    ONNX Runtime would fall back to the CPU.
    """
    settings, path = session_options(options.threads), bundle.file(file)
    chosen: list[Any] = [device.provider]
    if not device.captures:
        settings.graph_optimization_level = (
            ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        )  # runs the graph as written: results are rounded after each operator, as on a GPU
    else:
        settings.log_severity_level = (
            _FATAL  # the error says the same in one line, and the doctor command in full
        )
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        chosen = [(device.provider, {**_SETTINGS, "enable_cuda_graph": "1" if captures else "0"})]
    try:
        # The fused residual + norm sums in half precision; the separate norm sums in fp32.
        session = ort.InferenceSession(
            str(path),
            settings,
            providers=chosen,
            enable_fallback=0,
            disabled_optimizers={"SkipLayerNormFusion"},
        )
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        reason = f"{str(error).splitlines()[0]:.300}"
        if "fallback to CPU EP has been explicitly disabled" in reason:
            reason = (
                f"{device.provider} could not be started, or has no kernel for part of this graph"
            )
        raise EngineError(f"{path} cannot run on the GPU: {reason}; {_remedy()}") from None
    if session.get_providers()[0] != device.provider:
        raise EngineError(
            f"{path} would run on {session.get_providers()[0]}, not {device.provider}; {_remedy()}"
        )
    return session


def _check_decoder(bundle: Bundle, session: ort.InferenceSession) -> None:
    spec = bundle.spec.decoder
    caches: dict[str, Shape] = dict.fromkeys(
        spec.cache_names, (None, spec.kv_heads, None, spec.head_dim)
    )
    inputs: dict[str, Shape] = {
        INPUTS_EMBEDS: (None, None, spec.hidden),
        SEQLENS_K: (None,),
        LOGITS_ROWS: (None,),
        TOTAL_LENGTH: (),
        **caches,
    }
    outputs: dict[str, Shape] = {
        LOGITS: (None, spec.vocab_size),
        NEXT_TOKEN: (None,),
        LOGITS_MASS: (None,),
    }
    check_values(bundle, DECODER, session.get_inputs(), inputs)
    check_values(
        bundle,
        DECODER,
        session.get_outputs(),
        {**outputs, **{present(name): shape for name, shape in caches.items()}},
    )
