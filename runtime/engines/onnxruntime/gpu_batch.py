"""Decodes several sequences together on a device, each in a slot of shared caches.

Rows are moved between slots on the host, because ONNX Runtime copies only whole
buffers: the caches are copied to the host, rearranged and copied back. This happens
when a question is added or leaves, and after each beam search step that reorders the
beams. It never happens in a plain decode step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from runtime.contract.errors import ContextError
from runtime.contract.graphs import INPUTS_EMBEDS, SEQLENS_K, TOTAL_LENGTH
from runtime.engines.onnxruntime.io_binding import Bound, Device, read, write

__all__ = ["DeviceBatch"]

Caches = dict[str, ort.OrtValue]


class DeviceBatch:
    """See `runtime.engines.Batch`. `shape` is the shape of its caches
    [slots,KV,rows,D]. `bind(n, caches)` returns a call that runs one step of n
    sequences.
    """

    def __init__(
        self,
        device: Device,
        own: Mapping[str, ort.OrtValue],
        shape: tuple[int, ...],
        bind: Callable[[int, Caches], Bound],
    ) -> None:
        self._device, self._own, self._bind, self._rows = device, own, bind, shape[2]
        try:
            self._host = {name: np.zeros(shape, np.float16) for name in own}
        except MemoryError:
            raise ContextError(
                f"no memory for {shape[0]} key/value caches of {shape[2]} tokens; choose a smaller "
                f"--context, or fewer beams or questions"
            ) from None
        self._caches: Caches = {}
        self._call: Bound | None = None
        self._slots, self._newer = 0, "host"

    def fill(self, slot: int, rows: int) -> None:
        """See `Batch.fill`."""
        self._down()
        for name, cache in self._host.items():
            cache[slot, :, :rows] = read(self._own[name])[0, :, :rows]

    def step(
        self, inputs_embeds: NDArray[np.float32], starts: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """See `Batch.step`."""
        assert starts.max() < self._rows, (
            f"row {starts.max()} does not fit {self._rows}; the caller asks for enough rows"
        )
        call = self._up(len(starts))
        total = np.array(int(starts.max()) + 1, np.int32)
        call.write(
            {
                INPUTS_EMBEDS: inputs_embeds.astype(np.float16),
                SEQLENS_K: starts.astype(np.int32),
                TOTAL_LENGTH: total,
            }
        )
        call.run()
        self._newer = "device"
        return call.logits()

    def copy(self, sources: Sequence[int], start: int, end: int) -> None:
        """See `Batch.copy`."""
        if list(sources) == list(range(len(sources))) or start >= end:
            return
        self._down()
        for cache in self._host.values():
            cache[: len(sources), :, start:end] = cache[list(sources), :, start:end]

    def _down(self) -> None:
        """Copies the caches to the host if the device has newer ones. From then on the
        host's copy is the current one.
        """
        if self._newer == "device":
            for name, value in self._caches.items():
                self._host[name][: self._slots] = read(value)
        self._newer = "host"

    def _up(self, slots: int) -> Bound:
        """Brings the first `slots` slots up to date on the device and returns the call
        bound to them.
        """
        if self._call is None or slots != self._slots:
            self._down()
            self._caches = {}  # freed first: there may not be memory for old and new caches
            self._call = None
            self._caches = {
                name: self._device.hold(cache[:slots].copy()) for name, cache in self._host.items()
            }
            self._call, self._slots = self._bind(slots, self._caches), slots
        elif self._newer == "host":
            for name, value in self._caches.items():
                write(value, self._host[name][:slots])
        return self._call
