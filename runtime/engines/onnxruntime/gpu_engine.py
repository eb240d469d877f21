"""Base class of the ONNX Runtime engines on a GPU. Caches and calls stay on the device,
and a greedy decode step copies only a token id and one number back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from runtime.contract.bundle import Bundle
from runtime.contract.errors import EngineError
from runtime.contract.graphs import (
    IMAGE_EMBEDS,
    INPUTS_EMBEDS,
    LOGITS,
    LOGITS_MASS,
    LOGITS_ROWS,
    NEXT_TOKEN,
    PIXELS,
    POOL,
    present,
)
from runtime.engines import Validation
from runtime.engines.logits import check_finite
from runtime.engines.onnxruntime.io_binding import Bound, Device, write
from runtime.engines.onnxruntime.sessions import engine_errors

__all__ = ["CallShape", "DeviceEngine"]

_KEPT_CALLS = 8  # calls of up to this many rows (single tokens and drafts) keep their buffers


@dataclass(frozen=True)
class CallShape:
    """Shape of a call: the number of sequences, the rows of each, and how many of the
    last rows get logits.
    """

    slots: int
    length: int
    count: int


class DeviceEngine(ABC):
    """An `Engine` without `batch`. Subclasses define how the graph is told which cache
    rows a call fills.
    """

    verifies = True

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        vision: ort.InferenceSession,
        decoder: ort.InferenceSession,
        capacity: int,
        rows: int = 0,
    ) -> None:
        """Sets up the engine; `rows` is the cache length if it differs from `capacity`."""
        spec = bundle.spec.decoder
        self.bundle, self.device, self.capacity = bundle, device, capacity
        self.version = f"onnxruntime {ort.__version__} {device.provider}"
        self._vision, self._decoder = vision, decoder
        # Zeros, because a masked row may still be multiplied by zero, and zero times NaN is NaN.
        self.cache_shape = (1, spec.kv_heads, rows or capacity, spec.head_dim)
        self.caches = self.new_caches()
        self._calls: dict[CallShape, Bound] = {}
        self._proved = device.memory == "cpu"

    def new_caches(self) -> dict[str, ort.OrtValue]:
        """Allocates empty caches for one sequence. Raises `ContextError`."""
        return {
            name: self.device.hold(np.zeros(self.cache_shape, np.float16))
            for name in self.bundle.spec.decoder.cache_names
        }

    @property
    def validation(self) -> Validation | None:
        """See `Engine.validation`: the build proved the graphs on the CPU, not this
        GPU's kernels; the goldens do that at every load.
        """
        return None if self._proved else self

    def conclude(self, failed: Mapping[str, str]) -> None:
        """See `Validation.conclude`."""
        if failed:
            found = "; ".join(failed.values())
            raise EngineError(
                f"{self.bundle.path} gives wrong results on this GPU ({self.version}): {found}; "
                f"build with --target cpu, and report this"
            )
        self._proved = True

    def embed_image(
        self, pixels: NDArray[np.float32], pool: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """See `Engine.embed_image`. The graph takes one image, so several are processed
        one after the other.
        """
        try:
            found = [
                self._vision.run([IMAGE_EMBEDS], {PIXELS: picture[None], POOL: pool})[0]
                for picture in pixels
            ]
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            engine_errors(error)
        return np.concatenate(found)

    def forward(self, inputs_embeds: NDArray[np.float32], start: int) -> NDArray[np.float32]:
        """See `Engine.forward`."""
        call = self._run(inputs_embeds, start, 1)
        logits: NDArray[np.float32] = call.logits()[0]
        if (
            not self._proved
            and np.isfinite(logits).all()
            and logits[self._token(call)] != logits.max()
        ):
            self.conclude({"decode": "the token chosen is not the most likely"})
        return logits

    def greedy(self, inputs_embeds: NDArray[np.float32], start: int) -> int:
        """See `Engine.greedy`."""
        call = self._run(inputs_embeds, start, 1)
        check_finite(call.read(LOGITS_MASS))
        return self._token(call)

    def verify(self, inputs_embeds: NDArray[np.float32], start: int) -> NDArray[np.float32]:
        """See `Engine.verify`."""
        return self._run(inputs_embeds, start, inputs_embeds.shape[1]).logits()

    def _heal(self, call: Bound) -> None:
        """Zeroes the caches after a call with non-finite results. Masked rows must be
        zero, because zero times NaN is NaN.
        """
        if not np.isfinite(call.read(LOGITS_MASS)).all():
            for cache in self.caches.values():
                write(cache, np.zeros(self.cache_shape, np.float16))

    def _token(self, call: Bound) -> int:
        """Returns the token that the GPU chose. Raises `EngineError` if it is not in
        the vocabulary.
        """
        token, count = int(call.read(NEXT_TOKEN)[0]), self.bundle.spec.decoder.vocab_size
        if not 0 <= token < count:
            raise EngineError(
                f"the GPU chose token {token}, expected 0 to {count - 1}; run infmllm-run "
                f"--self-test, or re-export the bundle"
            )
        return token

    def _run(self, inputs_embeds: NDArray[np.float32], start: int, count: int) -> Bound:
        length = inputs_embeds.shape[1]
        end, shape = start + length, CallShape(1, length, count)
        assert end <= self.capacity, (
            f"rows {start} to {end} do not fit the cache of {self.capacity}; the session checks "
            f"this before prefill"
        )
        call = self._calls.get(shape) or self.bound(shape, self.caches)
        if length <= _KEPT_CALLS:
            self._calls[shape] = call
        call.write({INPUTS_EMBEDS: inputs_embeds.astype(np.float16), **self.places(length, start)})
        call.run()
        self._heal(call)
        return call

    @abstractmethod
    def places(self, length: int, start: int) -> dict[str, NDArray[Any]]:
        """Returns the inputs that tell the graph which cache rows a call of one
        sequence fills.
        """

    @abstractmethod
    def bound(self, shape: CallShape, caches: Mapping[str, ort.OrtValue]) -> Bound:
        """Binds a call of one shape to the given caches [slots,KV,C,D]."""

    def call(
        self,
        shape: CallShape,
        caches: Mapping[str, ort.OrtValue],
        places: Mapping[str, NDArray[Any]],
        host: Collection[str] = (),
        graph: int | None = None,
    ) -> Bound:
        """Implements `bound`, given the inputs that `places` replaces. `host` and
        `graph` are passed to `Bound`.
        """
        spec, logits = self.bundle.spec.decoder, shape.slots * shape.count
        inputs: dict[str, NDArray[Any]] = {
            INPUTS_EMBEDS: np.zeros((shape.slots, shape.length, spec.hidden), np.float16),
            LOGITS_ROWS: np.arange(shape.length - shape.count, shape.length, dtype=np.int64),
        }
        outputs: dict[str, NDArray[Any]] = {
            LOGITS: np.zeros((logits, spec.vocab_size), np.float32),
            NEXT_TOKEN: np.zeros(logits, np.int64),
            LOGITS_MASS: np.zeros(logits, np.float32),
        }
        updated = {(name, present(name)): value for name, value in caches.items()}
        return Bound(
            self._decoder, self.device, {**inputs, **places}, outputs, updated, host, graph
        )
