"""ONNX Runtime on the CPU: the two sessions, and a decode loop that rebinds nothing.

Key/value buffers are allocated once and bound as input and output of the same graph, which updates them in place. One token costs two integer writes,
one row copy and one `run`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from runtime.contract.bundle import DECODER, PREFILL, VISION, Bundle
from runtime.contract.errors import BundleError, ContextError, EngineError
from runtime.contract.spec import IMAGE_EMBEDS, INPUTS_EMBEDS, LOGITS, PIXELS, POOL, SEQLENS_K, TOTAL_LENGTH, key_cache, present, value_cache
from runtime.engines import EngineOptions

__all__ = ["OrtEngine", "session_options"]

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


def _session(path: Path, options: EngineOptions, spinning: bool = True) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(str(path), session_options(options.threads, spinning), providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        raise EngineError(f"ONNX Runtime refuses {path}: {str(error).splitlines()[0]:.300}; re-export the bundle for this version") from None


@contextlib.contextmanager
def _engine_errors() -> Iterator[None]:
    """ONNX Runtime's exceptions share no public base class; the first line of any becomes an `EngineError`."""
    try:
        yield
    except Exception as error:
        raise EngineError(f"ONNX Runtime failed: {str(error).splitlines()[0]:.300}; run infmllm-run --self-test, or re-export the bundle") from None


def _check_contract(bundle: Bundle, vision: ort.InferenceSession, decoders: Mapping[str, ort.InferenceSession]) -> None:
    """Raises `BundleError` unless all graphs have the inputs and outputs the spec calls for, with its static dimensions."""
    tower, spec = bundle.spec.vision, bundle.spec.decoder
    cache = (None, spec.kv_heads, None, spec.head_dim)
    caches = {name: cache for layer in range(spec.layers) for name in (key_cache(layer), value_cache(layer))}
    pixels = (None, 3, tower.image_size, tower.image_size)
    lengths: dict[str, tuple[int | None, ...]] = {SEQLENS_K: (None,), TOTAL_LENGTH: ()}
    wanted: list[tuple[str, Any, dict[str, tuple[int | None, ...]]]] = [
        (VISION, vision.get_inputs(), {PIXELS: pixels, POOL: (None, tower.grid**2)}),
        (VISION, vision.get_outputs(), {IMAGE_EMBEDS: (None, None, spec.hidden)}),
    ]
    for file, decoder in decoders.items():
        wanted.append((file, decoder.get_inputs(), {INPUTS_EMBEDS: (None, None, spec.hidden), **lengths, **caches}))
        wanted.append((file, decoder.get_outputs(), {LOGITS: (None, spec.vocab_size), **{present(name): cache for name in caches}}))
    for file, values, expected in wanted:
        found = {value.name: value for value in values}
        for name in sorted(set(found) ^ set(expected)):
            raise BundleError(
                f"{bundle.path / file}: {name} is {'unexpected' if name in found else 'missing'}; graph and manifest do not belong together"
            )
        for name, shape in expected.items():
            dims = found[name].shape
            if len(dims) != len(shape) or any(isinstance(d, int) and w is not None and d != w for d, w in zip(dims, shape, strict=True)):
                raise BundleError(f"{bundle.path / file}: {name} is {dims}, the manifest's spec makes it {list(shape)}; re-export the bundle")


class OrtEngine:
    """The graphs of a `cpu` bundle in ONNX Runtime. Calls of more than one token go to the prefill graph where the bundle has one."""

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        spec = bundle.spec.decoder
        self.capacity = min(options.context or spec.context, spec.context)
        # The tower's threads would otherwise go on spinning on the cores that prefill and decode need.
        self._vision = _session(bundle.file(VISION), options, spinning=False)
        self._decoder = _session(bundle.file(DECODER), options)
        self._prefill = _session(bundle.file(PREFILL), options) if PREFILL in bundle.files else self._decoder
        _check_contract(bundle, self._vision, {DECODER: self._decoder, **({PREFILL: self._prefill} if PREFILL in bundle.files else {})})
        kinds = {value.name: value.type for value in self._decoder.get_inputs()}
        self._caches: dict[str, ort.OrtValue] = {}
        try:
            for layer in range(spec.layers):
                for name in (key_cache(layer), value_cache(layer)):
                    dtype = np.int8 if kinds[name] == "tensor(int8)" else np.float32
                    rows = np.zeros((1, spec.kv_heads, self.capacity, spec.head_dim), dtype)
                    self._caches[name] = ort.OrtValue.ortvalue_from_numpy(rows)
        except MemoryError:
            raise ContextError(f"no memory for a cache of {self.capacity} rows; choose a smaller --context") from None
        self._seqlens, self._total = np.zeros(1, np.int32), np.zeros((), np.int32)
        self._logits = np.zeros((1, spec.vocab_size), np.float32)
        self._row = np.zeros((1, 1, spec.hidden), np.float32)
        self._row_binding = self._bind(self._decoder, self._row)

    def _bind(self, session: ort.InferenceSession, inputs_embeds: NDArray[np.float32]) -> ort.IOBinding:
        """Binds inputs of one length; caches, lengths and logits are always the same buffers, whichever graph runs."""
        binding = session.io_binding()
        for name, array in ((INPUTS_EMBEDS, inputs_embeds), (SEQLENS_K, self._seqlens), (TOTAL_LENGTH, self._total)):
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        binding.bind_ortvalue_output(LOGITS, ort.OrtValue.ortvalue_from_numpy(self._logits))
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(present(name), cache)
        return binding

    def embed_image(self, pixels: NDArray[np.float32], pool: NDArray[np.float32]) -> NDArray[np.float32]:
        """See `Engine.embed_image`."""
        with _engine_errors():
            (embeds,) = self._vision.run([IMAGE_EMBEDS], {PIXELS: pixels, POOL: pool})
        return np.asarray(embeds, np.float32)

    def forward(self, inputs_embeds: NDArray[np.float32], start: int) -> NDArray[np.float32]:
        """See `Engine.forward`."""
        length = inputs_embeds.shape[1]
        end = start + length
        assert end <= self.capacity, f"rows {start} to {end} do not fit the cache of {self.capacity}; the session checks this before prefill"
        self._seqlens[0] = end - 1
        self._total[...] = end
        if length == 1:
            self._row[...] = inputs_embeds
            session, binding = self._decoder, self._row_binding
        else:
            session, binding = self._prefill, self._bind(self._prefill, np.ascontiguousarray(inputs_embeds, np.float32))
        with _engine_errors():
            session.run_with_iobinding(binding)
        logits: NDArray[np.float32] = self._logits[0]
        return logits
