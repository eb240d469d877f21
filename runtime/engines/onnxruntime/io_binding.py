"""Memory of a device and calls bound to it, for engines that run in ONNX Runtime on a
GPU; the CPU can stand in for one.

Every buffer is allocated once and keeps its address; a call copies in what changes,
runs, and copies out what is asked for.
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
_CAPTURE = "gpu_graph_id"  # run option of CUDA's provider; others ignore it


@dataclass(frozen=True)
class Device:
    """An execution provider and the memory it computes in: `memory` as `OrtValue` names
    it, `vendor` a PCI vendor where it asks for one.

    `captures` providers replay a call of fixed shapes and addresses as one CUDA graph.
    """

    provider: str
    memory: str
    vendor: int = -1
    captures: bool = False

    def hold(self, array: NDArray[Any]) -> ort.OrtValue:
        """A buffer of the device with the array's contents. Raises `ContextError` if
        there is no memory for it.
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
"""Stands in for a GPU: the same graphs, buffers and calls."""


def read(value: ort.OrtValue) -> NDArray[Any]:
    """A copy of a buffer's contents on the host."""
    found: NDArray[Any] = value.numpy()
    return (
        found.copy() if value.device_name() == HOST.memory else found
    )  # on the host it is a view that does not keep its memory alive


def write(value: ort.OrtValue, array: NDArray[Any]) -> None:
    """Replaces a buffer's contents; shape and dtype must be those it has."""
    value.update_inplace(np.asarray(array, order="C"))


class Bound:
    """A session bound to buffers of one shape.

    `inputs` and `outputs` are copied to the device, `host` inputs stay where they are
    and may be written to directly; `updated` maps inputs to the outputs that take their
    place in the same memory. `graph`, from 0, has the call captured as the CUDA graph
    of that number.
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
        """Replaces inputs by name."""
        for name, array in arrays.items():
            write(self.values[name], array)

    def read(self, name: str) -> NDArray[Any]:
        """An output of the last `run`."""
        return read(self.values[name])

    def logits(self) -> NDArray[np.float32]:
        """Logits [n,V] of the last `run`, NaN where the mass is not finite: 8-bit
        layers make numbers of what is not.
        """
        found: NDArray[np.float32] = self.read(LOGITS)
        finite = np.isfinite(self.read(LOGITS_MASS))
        return found if finite.all() else np.where(finite[:, None], found, np.float32(np.nan))

    def run(self) -> None:
        """Computes. Raises `EngineError`."""
        apart = (
            self._device.memory != HOST.memory
        )  # copies and kernels may be on different streams, and a run waits for neither by contract
        try:
            if apart:
                self._binding.synchronize_inputs()
            self._session.run_with_iobinding(self._binding, self._options)
            if apart:
                self._binding.synchronize_outputs()
        except Exception as error:  # see `Device.hold`
            engine_errors(error)
