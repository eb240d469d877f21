"""Access to the GPU through cuda-python: memory, one stream of copies and launches, and
captured graphs. All CUDA names that this project uses are in this file.

A failing call raises `EngineError` and marks the device as lost, since a CUDA context
does not recover from most errors. Later calls then raise at once. A failed allocation
for lack of memory and a failed capture leave the device usable.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from runtime.contract.errors import ContextError, EngineError

__all__ = ["ALIGNMENT", "Device", "Graph", "Memory", "aligned"]

ALIGNMENT = 256
"""Alignment in bytes that TensorRT requires of every tensor address."""

_MIB = 1 << 20


def aligned(size: int) -> int:
    """Rounds `size` up to a multiple of `ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _bindings() -> Any:
    """Returns cuda-python's runtime module, by its name since 12.6.1 or by the earlier
    one.
    """
    try:
        from cuda.bindings import runtime
    except ImportError:
        from cuda import cudart as runtime
    return runtime


class Memory:
    """A block of device or pinned host memory, freed with its last reference."""

    def __init__(self, address: int, size: int, free: Callable[[int], None]) -> None:
        self.address, self.size, self._free = address, size, free

    def array(self, dtype: DTypeLike, shape: tuple[int, ...], offset: int = 0) -> NDArray[Any]:
        """Returns a writable view of pinned memory; the view keeps the memory alive."""
        raw = (ctypes.c_uint8 * self.size).from_address(self.address)
        raw.owner = self  # type: ignore[attr-defined]
        found: NDArray[Any] = np.frombuffer(
            memoryview(raw), np.dtype(dtype), int(np.prod(shape)), offset
        ).reshape(shape)
        return found

    def __del__(self) -> None:
        self._free(self.address)


class Graph:
    """A captured sequence of copies and launches that can run again."""

    def __init__(self, device: Device, executable: Any) -> None:
        self._device, self._executable = device, executable

    def launch(self) -> None:
        """Queues the graph on the device's stream."""
        self._device.call("cudaGraphLaunch", self._executable, self._device.stream)

    def __del__(self) -> None:
        self._device.release("cudaGraphExecDestroy", self._executable)


class Device:
    """The first visible GPU, with one stream that orders all work on it. Raises
    `EngineError` if no GPU works.
    """

    def __init__(self) -> None:
        self._cuda, self.lost, self._capturing = _bindings(), "", False
        code, count = self._attempt("cudaGetDeviceCount")
        if code or not count:
            found = self._name_of(code) if code else "none is visible"
            raise EngineError(
                f"no GPU can be used ({found}); check nvidia-smi and the driver, or build with "
                f"--target cpu"
            )
        properties = self.call("cudaGetDeviceProperties", 0)
        name = (
            properties.name.decode(errors="replace")
            if isinstance(properties.name, bytes)
            else str(properties.name)
        )
        self.name = name.rstrip("\0")
        self.capability = f"{properties.major}.{properties.minor}"
        self.versions = (
            int(self.call("cudaDriverGetVersion")),
            int(self.call("cudaRuntimeGetVersion")),
        )
        """Versions of the driver and of the CUDA runtime in CUDA's numbering (12060 is
        12.6).
        """
        self.stream = self.call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        self.handle = int(self.stream)
        """The stream as an integer, as TensorRT expects it."""

    def _attempt(self, name: str, *arguments: Any) -> tuple[Any, Any]:
        """Makes a CUDA call and returns (error or 0, value or None). Raises
        `EngineError` if there is no driver.
        """
        try:
            code, *values = getattr(self._cuda, name)(*arguments)
        except (
            RuntimeError
        ) as error:  # cuda-python's error if a library or function of the driver is missing
            raise EngineError(
                f"no working GPU driver ({error!s:.160}); install NVIDIA's driver, or build with "
                f"--target cpu"
            ) from None
        return (code if int(code) else 0), (values[0] if values else None)

    def _name_of(self, code: Any) -> str:
        """Returns an error's name and description."""
        found = [
            self._attempt(name, code)[1] for name in ("cudaGetErrorName", "cudaGetErrorString")
        ]
        return ": ".join(
            text.decode(errors="replace") if isinstance(text, bytes) else str(text)
            for text in found
        )

    def call(self, name: str, *arguments: Any) -> Any:
        """Makes a CUDA call and returns its value. If it fails, this call and all later
        ones raise `EngineError` (see `fail`).
        """
        self.check()
        code, value = self._attempt(name, *arguments)
        if code:
            self.fail(f"{name} gave {self._name_of(code)}")
        return value

    def check(self) -> None:
        """Raises `EngineError` if the device was lost."""
        if self.lost:
            raise EngineError(self.lost)

    def fail(self, fault: str) -> None:
        """Raises `EngineError` for a fault of the device or of its work. Outside a
        capture, also marks the device as lost, so that nothing more runs on it.
        """
        if self._capturing:
            raise EngineError(fault)
        self.lost = (
            f"the GPU failed ({fault}); this session can no longer answer: restart the program, "
            f"and check dmesg and nvidia-smi if it happens again"
        )
        raise EngineError(self.lost)

    def release(self, name: str, handle: Any) -> None:
        """Releases a handle and ignores errors. Does nothing on a lost device, which
        has released it already.
        """
        if not self.lost:
            self._attempt(name, handle)

    def free_memory(self) -> tuple[int, int]:
        """Returns (free, total) bytes of device memory."""
        code, *found = self._cuda.cudaMemGetInfo()
        if int(code):
            self.fail(f"cudaMemGetInfo gave {self._name_of(code)}")
        return int(found[0]), int(found[1])

    def allocate(self, size: int, what: str) -> Memory:
        """Allocates device memory, at least one byte. Raises a `ContextError` that
        names its purpose if there is not enough memory.
        """
        return self._memory("cudaMalloc", "cudaFree", size, what)

    def pinned(self, size: int, what: str) -> Memory:
        """Allocates host memory that the GPU can copy from and to by itself. Raises
        `ContextError` if there is not enough memory.
        """
        return self._memory("cudaMallocHost", "cudaFreeHost", size, what)

    def _memory(self, take: str, give: str, size: int, what: str) -> Memory:
        self.check()
        code, address = self._attempt(take, max(1, size))
        if code and code == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            self._attempt("cudaGetLastError")  # clears it, or a later call would report it again
            free, total = self.free_memory()
            raise ContextError(
                f"no memory for {what}: {_mib(size)} wanted, {_mib(free)} of the GPU's "
                f"{_mib(total)} are free; "
                "choose a smaller --context, or close other programs"
            )
        if code:
            self.fail(f"{take} gave {self._name_of(code)}")
        return Memory(int(address), size, lambda address: self.release(give, address))

    def up(self, to: int, host: int, size: int) -> None:
        """Queues a copy from pinned memory to the device."""
        self.call(
            "cudaMemcpyAsync",
            to,
            host,
            size,
            self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice,
            self.stream,
        )

    def down(self, host: int, source: int, size: int) -> None:
        """Queues a copy from the device to pinned memory."""
        self.call(
            "cudaMemcpyAsync",
            host,
            source,
            size,
            self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost,
            self.stream,
        )

    def rows(self, to: tuple[int, int], source: tuple[int, int], width: int, count: int) -> None:
        """Queues a device-to-device copy of `count` rows of `width` bytes. `to` and
        `source` are each (address, pitch).
        """
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self.call("cudaMemcpy2DAsync", *to, *source, width, count, kind, self.stream)

    def zero(self, memory: Memory) -> None:
        """Queues filling a block with zeros."""
        self.call("cudaMemsetAsync", memory.address, 0, memory.size, self.stream)

    def zero_rows(self, to: tuple[int, int], width: int, count: int) -> None:
        """Queues filling `count` rows of `width` bytes with zeros, at (address, pitch)."""
        self.call("cudaMemset2DAsync", *to, 0, width, count, self.stream)

    def wait(self) -> None:
        """Waits until all queued work is done."""
        self.call("cudaStreamSynchronize", self.stream)

    def capture(self, work: Callable[[], None]) -> tuple[Graph | None, str]:
        """Captures the operations that `work` queues as a graph, without running them.
        Returns the graph and an empty reason, or None and the reason if they cannot be
        captured.

        Capture is per thread: a call that must not be part of a graph then fails,
        instead of being left out of it.
        """
        mode, reason = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal, ""
        self.wait()
        self._capturing = True
        try:
            self.call("cudaStreamBeginCapture", self.stream, mode)
            try:
                work()
            except EngineError as error:
                reason = str(error)
            code, graph = self._attempt("cudaStreamEndCapture", self.stream)
            if code:
                reason = reason or self._name_of(code)
            elif not reason:
                code, executable = self._attempt("cudaGraphInstantiate", graph, 0)
                self.release("cudaGraphDestroy", graph)
                if not code:
                    return Graph(self, executable), ""
                reason = self._name_of(code)
        except EngineError as error:
            reason = str(error)
        finally:
            self._capturing = False
            self._attempt("cudaGetLastError")
        return None, reason


def _mib(size: int) -> str:
    return f"{size / _MIB:.0f} MiB"
