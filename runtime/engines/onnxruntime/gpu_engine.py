"""What the engines of ONNX Runtime on a GPU share: caches and calls that stay on the
device, and a step of which only a token comes back.
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

_KEPT_CALLS = 8  # calls up to this many rows keep their buffers: single tokens and drafts


@dataclass(frozen=True)
class CallShape:
    """What a call binds: sequences side by side, rows of each, and how many of the last
    rows get logits.
    """

    slots: int
    length: int
    count: int


class DeviceEngine(ABC):
    """An `Engine` but for `batch`; subclasses say how a graph is told which rows a call
    fills.
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
        """`rows` is the length of the caches where it is not `capacity`."""
        spec = bundle.spec.decoder
        self.bundle, self.device, self.capacity = bundle, device, capacity
        self.version = f"onnxruntime {ort.__version__} {device.provider}"
        self._vision, self._decoder = vision, decoder
        # Zeros, because a masked row of garbage may still be multiplied by nothing.
        self.cache_shape = (1, spec.kv_heads, rows or capacity, spec.head_dim)
        self.caches = self.new_caches()
        self._calls: dict[CallShape, Bound] = {}
        self._proved = device.memory == "cpu"

    def new_caches(self) -> dict[str, ort.OrtValue]:
        """Empty caches of one sequence. Raises `ContextError`."""
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
                f"{self.bundle.path} computes something else on this GPU ({self.version}): "
                f"{found}; use --target cpu, and report it"
            )
        self._proved = True

    def embed_image(
        self, pixels: NDArray[np.float32], pool: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """See `Engine.embed_image`. The graph takes one picture; several go one after
        the other.
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
            self.conclude({"decode": "the token chosen is not the likeliest"})
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
        """Empties the cache after a call that was not finite: rows that are masked now
        must be zeros, since nothing times NaN is NaN.
        """
        if not np.isfinite(call.read(LOGITS_MASS)).all():
            for cache in self.caches.values():
                write(cache, np.zeros(self.cache_shape, np.float16))

    def _token(self, call: Bound) -> int:
        """The token the GPU chose. Raises `EngineError` if it is none."""
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
        """Inputs that say which rows a call of one sequence fills."""

    @abstractmethod
    def bound(self, shape: CallShape, caches: Mapping[str, ort.OrtValue]) -> Bound:
        """A call of one shape over some caches [slots,KV,C,D]."""

    def call(
        self,
        shape: CallShape,
        caches: Mapping[str, ort.OrtValue],
        places: Mapping[str, NDArray[Any]],
        host: Collection[str] = (),
        graph: int | None = None,
    ) -> Bound:
        """`bound`, given the inputs that `places` replaces; `host` and `graph` as
        `Bound` takes them.
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
