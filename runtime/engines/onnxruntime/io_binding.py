"""Device memory and bound calls for the engines that run in ONNX Runtime on a GPU. The
CPU can stand in for a GPU.

Every buffer is allocated once and keeps its address. A call copies changed inputs to
the device, runs, and copies requested outputs to the host.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from runtime.contract.errors import ContextError
from runtime.contract.graphs import LOGITS, LOGITS_MASS
from runtime.engines.onnxruntime.sessions import engine_errors

__all__ = ["HOST", "Bound", "Device", "read", "write"]

_NOT_CAPTURED = "-1"
_CAPTURE = "gpu_graph_id"  # run option of the CUDA provider; others ignore it


@dataclass(frozen=True)
class Device:
    """An execution provider and the memory it computes in. `memory` is the name that
    `OrtValue` uses for it; `vendor` is the PCI vendor id, if `OrtValue` needs one.

    If `captures` is true, the provider can replay a call with fixed shapes and
    addresses as one CUDA graph.
    """

    provider: str
    memory: str
    vendor: int = -1
    captures: bool = False

    def hold(self, array: NDArray[Any]) -> ort.OrtValue:
        """Returns a device buffer with the array's contents. Raises `ContextError` if
        there is not enough memory.
        """
        vendor = {} if self.vendor < 0 else {"vendor_id": self.vendor}
        try:
            return ort.OrtValue.ortvalue_from_numpy(
                np.asarray(array, order="C"), self.memory, 0, **vendor
            )
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            size = f"{array.nbytes / 1e6:.1f} MB"
            reason = f"{str(error).splitlines()[0]:.200}"
            raise ContextError(
                f"no {size} of {self.memory} memory ({reason}); choose a smaller --context, or "
                f"fewer beams or questions"
            ) from None


HOST = Device("CPUExecutionProvider", "cpu")
"""Stands in for a GPU, with the same graphs, buffers and calls."""


def read(value: ort.OrtValue) -> NDArray[Any]:
    """Returns a copy of a buffer's contents on the host."""
    found: NDArray[Any] = value.numpy()
    return (
        found.copy() if value.device_name() == HOST.memory else found
    )  # a host buffer gives a view that does not keep its memory alive


def write(value: ort.OrtValue, array: NDArray[Any]) -> None:
    """Replaces a buffer's contents; the array must have the buffer's shape and dtype."""
    value.update_inplace(np.asarray(array, order="C"))


class Bound:
    """A session bound to buffers of one shape.

    `inputs` and `outputs` get device buffers. Inputs named in `host` stay in host
    memory and may be written directly. `updated` maps a pair of input and output names
    to the one buffer both use, which the graph updates in place. `graph`, counted from
    0, has the call captured as the CUDA graph of that number.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        device: Device,
        inputs: Mapping[str, NDArray[Any]],
        outputs: Mapping[str, NDArray[Any]],
        updated: Mapping[tuple[str, str], ort.OrtValue],
        host: Collection[str] = (),
        graph: int | None = None,
    ) -> None:
        self._session, self._binding, self._device = session, session.io_binding(), device
        self._options = ort.RunOptions()
        if device.captures:
            self._options.add_run_config_entry(
                _CAPTURE, _NOT_CAPTURED if graph is None else str(graph)
            )
        self.values = {
            name: (HOST if name in host else device).hold(array)
            for name, array in {**inputs, **outputs}.items()
        }
        for name in inputs:
            self._binding.bind_ortvalue_input(name, self.values[name])
        for name in outputs:
            self._binding.bind_ortvalue_output(name, self.values[name])
        for (taken, given), value in updated.items():
            self._binding.bind_ortvalue_input(taken, value)
            self._binding.bind_ortvalue_output(given, value)

    def write(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Replaces the contents of the named inputs."""
        for name, array in arrays.items():
            write(self.values[name], array)

    def read(self, name: str) -> NDArray[Any]:
        """Returns an output of the last `run`."""
        return read(self.values[name])

    def logits(self) -> NDArray[np.float32]:
        """Returns the logits [n,V] of the last `run`, with NaN in rows whose mass is
        non-finite: 8-bit layers can turn non-finite values into finite ones.
        """
        found: NDArray[np.float32] = self.read(LOGITS)
        finite = np.isfinite(self.read(LOGITS_MASS))
        return found if finite.all() else np.where(finite[:, None], found, np.float32(np.nan))

    def run(self) -> None:
        """Runs the session. Raises `EngineError`."""
        apart = (
            self._device.memory != HOST.memory
        )  # copies and kernels may use different streams; a run is not guaranteed to wait for them
        try:
            if apart:
                self._binding.synchronize_inputs()
            self._session.run_with_iobinding(self._binding, self._options)
            if apart:
                self._binding.synchronize_outputs()
        except Exception as error:  # see `Device.hold`
            engine_errors(error)
