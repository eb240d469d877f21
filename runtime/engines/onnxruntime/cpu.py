"""ONNX Runtime on the CPU: the sessions, and a decode loop that reuses its bindings.

Key/value cache buffers are allocated once. Each is bound as both input and output of
the same graph, which updates it in place. A decode step costs two integer writes, one
row copy and one `run`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from runtime.contract.bundle import DECODER, PREFILL, VISION, Bundle
from runtime.contract.errors import ContextError
from runtime.contract.graphs import (
    IMAGE_EMBEDS,
    INPUTS_EMBEDS,
    LOGITS,
    LOGITS_TO_KEEP,
    PIXELS,
    POOL,
    SEQLENS_K,
    TOTAL_LENGTH,
    present,
)
from runtime.engines import EngineOptions, Validation
from runtime.engines.logits import greedy
from runtime.engines.onnxruntime.check_io import Shape, check_values, check_vision
from runtime.engines.onnxruntime.sessions import engine_errors, open_graph

__all__ = ["OrtEngine"]

# Inputs of up to this many rows keep their binding. Longer ones are bound for each call: 30 µs
# of many milliseconds.
_KEPT_BINDINGS = 32


def _check_contract(
    bundle: Bundle, vision: ort.InferenceSession, decoders: Mapping[str, ort.InferenceSession]
) -> None:
    """Raises `BundleError` unless all graphs have the inputs and outputs that the spec
    requires, with its static dimensions.
    """
    spec = bundle.spec.decoder
    caches: dict[str, Shape] = dict.fromkeys(
        spec.cache_names, (None, spec.kv_heads, None, spec.head_dim)
    )
    check_vision(bundle, VISION, vision)
    for file, decoder in decoders.items():
        # Bundles of version 0.1 return logits of the last position only.
        keep: dict[str, Shape] = {LOGITS_TO_KEEP: (1,)} if _keeps(decoder) else {}
        inputs: dict[str, Shape] = {
            INPUTS_EMBEDS: (None, None, spec.hidden),
            SEQLENS_K: (None,),
            TOTAL_LENGTH: (),
            **keep,
            **caches,
        }
        check_values(bundle, file, decoder.get_inputs(), inputs)
        check_values(
            bundle,
            file,
            decoder.get_outputs(),
            {LOGITS: (None, spec.vocab_size), **{present(name): caches[name] for name in caches}},
        )


def _keeps(session: ort.InferenceSession) -> bool:
    return any(value.name == LOGITS_TO_KEEP for value in session.get_inputs())


class _Buffers:
    """Key/value caches for `slots` sequences. Calls of every session and length bind
    these same buffers.
    """

    def __init__(
        self, bundle: Bundle, decoder: ort.InferenceSession, slots: int, rows: int
    ) -> None:
        spec = bundle.spec.decoder
        kinds = {value.name: value.type for value in decoder.get_inputs()}
        shape = (slots, spec.kv_heads, rows, spec.head_dim)
        names = spec.cache_names
        try:
            self.caches = {
                name: np.zeros(shape, np.int8 if kinds[name] == "tensor(int8)" else np.float32)
                for name in names
            }
        except MemoryError:
            raise ContextError(
                f"no memory for {slots} caches of {rows} tokens; choose a smaller --context, or "
                f"fewer beams or questions"
            ) from None
        self.rows, self._hidden, self._vocabulary = rows, spec.hidden, spec.vocab_size
        self._bindings: dict[tuple[int, int, int, int], _Call] = {}

    def call(self, session: ort.InferenceSession, slots: int, length: int, keep: int) -> _Call:
        """Returns a call of one shape. Short calls keep their binding for reuse."""
        key = (id(session), slots, length, keep)
        call = self._bindings.get(key)
        if call is None:
            logits = np.zeros((slots * keep, self._vocabulary), np.float32)
            caches = {name: cache[:slots] for name, cache in self.caches.items()}
            call = _Call(
                session, np.zeros((slots, length, self._hidden), np.float32), logits, keep, caches
            )
            if length <= _KEPT_BINDINGS:
                self._bindings[key] = call
        return call


class _Call:
    """One graph bound to buffers of one shape."""

    def __init__(
        self,
        session: ort.InferenceSession,
        embeds: NDArray[np.float32],
        logits: NDArray[np.float32],
        keep: int,
        caches: Mapping[str, NDArray[Any]],
    ) -> None:
        self.embeds, self.logits = embeds, logits
        self.seqlens, self.total = np.zeros(embeds.shape[0], np.int32), np.zeros((), np.int32)
        self._session, self._binding = session, session.io_binding()
        inputs = {INPUTS_EMBEDS: embeds, SEQLENS_K: self.seqlens, TOTAL_LENGTH: self.total}
        if _keeps(session):
            inputs[LOGITS_TO_KEEP] = np.array([keep], np.int64)
        self._held = inputs  # keeps the arrays alive: the binding does not own them
        for name, array in inputs.items():
            self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        self._binding.bind_ortvalue_output(LOGITS, ort.OrtValue.ortvalue_from_numpy(logits))
        for name, cache in caches.items():
            value = ort.OrtValue.ortvalue_from_numpy(cache)
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(present(name), value)

    def run(self) -> NDArray[np.float32]:
        """Runs the graph on `embeds`, `seqlens` and `total`. Returns the logits
        [slots * keep, V].
        """
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            engine_errors(error)
        return self.logits


class OrtEngine:
    """Runs the graphs of a `cpu` bundle in ONNX Runtime. `forward` uses the prefill
    graph for more than one token if the bundle has one.
    """

    validation: Validation | None = None

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        spec = bundle.spec.decoder
        self._bundle, self.version = bundle, f"onnxruntime {ort.__version__}"
        self.capacity = min(options.context or spec.context, spec.context)
        self._vision = open_graph(bundle, VISION, options)
        self._decoder = open_graph(bundle, DECODER, options)
        self._prefill = (
            open_graph(bundle, PREFILL, options) if PREFILL in bundle.files else self._decoder
        )
        _check_contract(
            bundle,
            self._vision,
            {
                DECODER: self._decoder,
                **({PREFILL: self._prefill} if PREFILL in bundle.files else {}),
            },
        )
        self.verifies = _keeps(self._decoder)
        self._own = _Buffers(bundle, self._decoder, 1, self.capacity)
        self._step = self._own.call(self._decoder, 1, 1, 1)

    def embed_image(
        self, pixels: NDArray[np.float32], pool: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """See `Engine.embed_image`."""
        try:
            (embeds,) = self._vision.run([IMAGE_EMBEDS], {PIXELS: pixels, POOL: pool})
        except Exception as error:  # see `_Call.run`
            engine_errors(error)
        return np.asarray(embeds, np.float32)

    def forward(self, inputs_embeds: NDArray[np.float32], start: int) -> NDArray[np.float32]:
        """See `Engine.forward`."""
        length = inputs_embeds.shape[1]
        call = self._step if length == 1 else self._own.call(self._prefill, 1, length, 1)
        logits: NDArray[np.float32] = self._feed(call, inputs_embeds, start)[0]
        return logits

    def greedy(self, inputs_embeds: NDArray[np.float32], start: int) -> int:
        """See `Engine.greedy`."""
        return greedy(self.forward(inputs_embeds, start))

    def verify(self, inputs_embeds: NDArray[np.float32], start: int) -> NDArray[np.float32]:
        """See `Engine.verify`."""
        length = inputs_embeds.shape[1]
        assert self.verifies or length == 1, "the caller asks `verifies` first"
        return self._feed(self._own.call(self._decoder, 1, length, length), inputs_embeds, start)

    def _feed(
        self, call: _Call, inputs_embeds: NDArray[np.float32], start: int
    ) -> NDArray[np.float32]:
        end = start + inputs_embeds.shape[1]
        assert end <= self.capacity, (
            f"rows {start} to {end} do not fit the cache of {self.capacity}; the session checks "
            f"this before prefill"
        )
        call.embeds[...] = inputs_embeds
        call.seqlens[0] = end - 1
        call.total[...] = end
        return call.run()

    def batch(self, slots: int, rows: int) -> OrtBatch:
        """See `Engine.batch`."""
        return OrtBatch(
            self._own,
            _Buffers(self._bundle, self._decoder, slots, min(rows, self.capacity)),
            self._decoder,
        )


class OrtBatch:
    """See `runtime.engines.Batch`."""

    def __init__(self, own: _Buffers, buffers: _Buffers, decoder: ort.InferenceSession) -> None:
        self._own, self._buffers, self._decoder = own, buffers, decoder

    def fill(self, slot: int, rows: int) -> None:
        """See `Batch.fill`."""
        for name, cache in self._buffers.caches.items():
            cache[slot, :, :rows] = self._own.caches[name][0, :, :rows]

    def step(
        self, inputs_embeds: NDArray[np.float32], starts: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """See `Batch.step`."""
        assert starts.max() < self._buffers.rows, (
            f"row {starts.max()} does not fit {self._buffers.rows}; the caller asks for enough rows"
        )
        call = self._buffers.call(self._decoder, len(starts), 1, 1)
        call.embeds[...] = inputs_embeds
        call.seqlens[...] = starts
        call.total[...] = starts.max() + 1
        return call.run()

    def copy(self, sources: Sequence[int], start: int, end: int) -> None:
        """See `Batch.copy`."""
        if list(sources) == list(range(len(sources))) or start >= end:
            return
        for cache in self._buffers.caches.values():
            cache[: len(sources), :, start:end] = cache[list(sources), :, start:end]
