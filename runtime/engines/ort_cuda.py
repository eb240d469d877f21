"""ONNX Runtime's CUDA provider: both graphs of a `cuda` bundle, caches in the GPU's memory, decoding steps as one CUDA graph.

A greedy step brings a token id and one number back to the host. The attention reads from the device how far a sequence is (`seqlens_k`); the total
length it takes on the host only chooses how the work is split, so a decoding step always says the cache's whole length there and nothing on the
host changes from step to step: that is what lets one captured graph serve them all.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from runtime.contract.bundle import DECODER, VISION, Bundle
from runtime.contract.errors import EngineError
from runtime.contract.spec import (
    IMAGE_EMBEDS,
    INPUTS_EMBEDS,
    LOGITS,
    LOGITS_MASS,
    LOGITS_ROWS,
    NEXT_TOKEN,
    PIXELS,
    POOL,
    SEQLENS_K,
    TOTAL_LENGTH,
    present,
)
from runtime.engines import EngineOptions
from runtime.engines.ort_contract import Shape, cache_names, check_values, check_vision
from runtime.engines.ort_device import Bound, Device
from runtime.engines.ort_device_batch import DeviceBatch
from runtime.engines.ort_session import engine_errors, session_options
from runtime.sampling import check_finite

__all__ = ["CUDA", "OrtCudaEngine"]

CUDA = Device("CUDAExecutionProvider", "cuda", captures=True)
_TARGET = "cuda"
_KEPT_CALLS = 8  # calls up to this many rows keep their buffers: single tokens and drafts
_SETTINGS = {
    "device_id": "0",
    "arena_extend_strategy": "kSameAsRequested",  # the default doubles what it takes
    "cudnn_conv_algo_search": "HEURISTIC",  # one convolution, the patch embedding: not worth an exhaustive search at each start
}


@dataclass(frozen=True)
class _Shape:
    """What a call binds: sequences side by side, rows of each, and how many of the last rows get logits."""

    slots: int
    length: int
    count: int


class OrtCudaEngine:
    """The graphs of a `cuda` bundle. On `HOST` the same graphs and calls run on the CPU, which is how builds and tests prove them."""

    verifies = True

    def __init__(self, bundle: Bundle, options: EngineOptions, device: Device = CUDA) -> None:
        if device.captures:
            _check_available(device)
        spec = bundle.spec.decoder
        self.capacity = min(options.context or spec.context, spec.context)
        self.version = f"onnxruntime {ort.__version__} {device.provider}"
        self.device, self._bundle = device, bundle
        self._vision = _opened(bundle, VISION, options, device)
        self._decoder = _opened(bundle, DECODER, options, device, captures=device.captures)
        check_vision(bundle, VISION, self._vision)
        _check_decoder(bundle, self._decoder)
        zeros = np.zeros((1, spec.kv_heads, self.capacity, spec.head_dim), np.float16)
        self.caches = {name: device.hold(zeros.copy()) for name in cache_names(bundle)}
        self._calls: dict[_Shape, Bound] = {}

    def embed_image(self, pixels: NDArray[np.float32], pool: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `Engine.embed_image`. The graph takes one picture; several go one after the other."""
        try:
            found = [self._vision.run([IMAGE_EMBEDS], {PIXELS: picture[None], POOL: pool})[0] for picture in pixels]
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            engine_errors(error)
        return np.concatenate(found)

    def forward(self, inputs_embeds: NDArray[np.float32], start: int) -> NDArray[np.float32]:
        """See `Engine.forward`."""
        logits: NDArray[np.float32] = self._run(inputs_embeds, start, 1).read(LOGITS)[0]
        return logits

    def greedy(self, inputs_embeds: NDArray[np.float32], start: int) -> int:
        """`forward`, but for the likeliest token, chosen on the device; ties go to the lowest id. Raises `NonFiniteError`."""
        call = self._run(inputs_embeds, start, 1)
        check_finite(call.read(LOGITS_MASS))
        return int(call.read(NEXT_TOKEN)[0])

    def verify(self, inputs_embeds: NDArray[np.float32], start: int) -> NDArray[np.float32]:
        """See `Engine.verify`."""
        logits: NDArray[np.float32] = self._run(inputs_embeds, start, inputs_embeds.shape[1]).read(LOGITS)
        return logits

    def batch(self, slots: int, rows: int) -> DeviceBatch:
        """See `Engine.batch`."""
        spec = self._bundle.spec.decoder
        shape = (slots, spec.kv_heads, min(rows, self.capacity), spec.head_dim)
        return DeviceBatch(self.device, self.caches, shape, lambda slots, caches: self._bound(_Shape(slots, 1, 1), caches))

    def _run(self, inputs_embeds: NDArray[np.float32], start: int, count: int) -> Bound:
        length = inputs_embeds.shape[1]
        end, shape = start + length, _Shape(1, length, count)
        assert end <= self.capacity, f"rows {start} to {end} do not fit the cache of {self.capacity}; the session checks this before prefill"
        call = self._calls.get(shape) or self._bound(shape, self.caches, captured=length == 1)
        if length <= _KEPT_CALLS:
            self._calls[shape] = call
        call.write({INPUTS_EMBEDS: inputs_embeds.astype(np.float16), SEQLENS_K: np.array([end - 1], np.int32)})
        if length > 1:
            call.write({TOTAL_LENGTH: np.array(end, np.int32)})
        call.run()
        return call

    def _bound(self, shape: _Shape, caches: dict[str, ort.OrtValue], captured: bool = False) -> Bound:
        """A call of one shape over some caches [slots,KV,C,D]; a single token's total length stays the whole cache's."""
        spec, logits = self._bundle.spec.decoder, shape.slots * shape.count
        inputs: dict[str, NDArray[Any]] = {
            INPUTS_EMBEDS: np.zeros((shape.slots, shape.length, spec.hidden), np.float16),
            SEQLENS_K: np.zeros(shape.slots, np.int32),
            LOGITS_ROWS: np.arange(shape.length - shape.count, shape.length, dtype=np.int64),
            TOTAL_LENGTH: np.array(int(next(iter(caches.values())).shape()[2]), np.int32),
        }
        outputs: dict[str, NDArray[Any]] = {
            LOGITS: np.zeros((logits, spec.vocab_size), np.float32),
            NEXT_TOKEN: np.zeros(logits, np.int64),
            LOGITS_MASS: np.zeros(logits, np.float32),
        }
        updated = {(name, present(name)): value for name, value in caches.items()}
        return Bound(self._decoder, self.device, inputs, outputs, updated, frozenset({TOTAL_LENGTH}), 0 if captured else None)


def _remedy() -> str:
    from runtime.doctor.gpu import PIP_ONNXRUNTIME_GPU

    return f"run: {PIP_ONNXRUNTIME_GPU} (infmllm-export doctor --target {_TARGET} tells what is missing)"


def _check_available(device: Device) -> None:
    """Raises `EngineError` if this onnxruntime has no such provider; loads the CUDA libraries that pip installed, where there are any."""
    if device.provider not in ort.get_available_providers():
        raise EngineError(f"the installed onnxruntime {ort.__version__} has no {device.provider}; {_remedy()}")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find; the session says it in one line
        ort.preload_dlls()


def _opened(bundle: Bundle, file: str, options: EngineOptions, device: Device, captures: bool = False) -> ort.InferenceSession:
    """A session whose every node is the device's. Raises `EngineError` where ONNX Runtime would go on without it, on the CPU."""
    settings, path = session_options(options.threads), bundle.file(file)
    chosen: list[Any] = [device.provider]
    if not device.captures:
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # literally: rounded behind each operator, as a GPU does
    else:
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        chosen = [(device.provider, {**_SETTINGS, "enable_cuda_graph": "1" if captures else "0"})]
    try:
        # Its fused residual + norm adds up in half precision; apart, the norm adds up in fp32.
        session = ort.InferenceSession(str(path), settings, providers=chosen, enable_fallback=0, disabled_optimizers={"SkipLayerNormFusion"})
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        reason = f"{str(error).splitlines()[0]:.300}"
        if "fallback to CPU EP has been explicitly disabled" in reason:
            reason = f"{device.provider} could not be started, or has no kernel for part of this graph"
        raise EngineError(f"{path} cannot run on the GPU: {reason}; {_remedy()}") from None
    if session.get_providers()[0] != device.provider:
        raise EngineError(f"{path} would run on {session.get_providers()[0]}, not {device.provider}; {_remedy()}")
    return session


def _check_decoder(bundle: Bundle, session: ort.InferenceSession) -> None:
    spec = bundle.spec.decoder
    caches: dict[str, Shape] = dict.fromkeys(cache_names(bundle), (None, spec.kv_heads, None, spec.head_dim))
    inputs: dict[str, Shape] = {INPUTS_EMBEDS: (None, None, spec.hidden), SEQLENS_K: (None,), LOGITS_ROWS: (None,), TOTAL_LENGTH: (), **caches}
    outputs: dict[str, Shape] = {LOGITS: (None, spec.vocab_size), NEXT_TOKEN: (None,), LOGITS_MASS: (None,)}
    check_values(bundle, DECODER, session.get_inputs(), inputs)
    check_values(bundle, DECODER, session.get_outputs(), {**outputs, **{present(name): shape for name, shape in caches.items()}})
