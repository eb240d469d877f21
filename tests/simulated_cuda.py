"""Simulates the CUDA runtime in host memory, with the names of cuda-python. It is
stricter than a real one.

Work is queued and runs only when the stream is synchronised. New memory is full of NaN.
Every copy must lie within one allocation of the stated side. Captured work runs only
when its graph is launched, and calls that must not be captured invalidate the capture.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

ALIGNMENT = 256
Work = Callable[[], None]


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorNoDevice = 100
    cudaErrorLaunchFailure = 719
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


_SIDES = {1: ("host", "device"), 2: ("device", "host"), 3: ("device", "device")}
OK, BAD = cudaError_t.cudaSuccess, cudaError_t.cudaErrorInvalidValue


class _Stream:
    def __int__(self) -> int:
        return 0x57


class Cuda(ModuleType):
    """Stands in for the module `cuda.bindings.runtime`.

    `fails` maps the name of a call to the errors that its next calls return; `lost` is
    returned by every call. `brought` lists the sizes of copies to the host.
    """

    cudaStreamNonBlocking = 1

    def __init__(self, total: int = 64 << 20) -> None:
        super().__init__("cuda.bindings.runtime")
        self.cudaError_t, self.cudaMemcpyKind = cudaError_t, cudaMemcpyKind
        self.cudaStreamCaptureMode = cudaStreamCaptureMode
        self.total, self.name = total, b"Simulated GPU\0"
        self.driver = 12060
        self.blocks: dict[int, tuple[np.ndarray, int, str]] = {}
        self.queue: list[Work] = []
        self.captured: list[Work] | None = None
        self.spoilt = False
        self.fails: dict[str, list[cudaError_t]] = {}
        self.lost = OK
        self.calls: list[str] = []
        self.launched = 0
        self.brought: list[int] = []

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if not name.startswith("cuda") or not callable(found) or isinstance(found, type):
            return found

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if name.startswith("cudaGetError"):
                return (OK, found(*arguments))
            fault = self.lost or (self.fails.get(name) or [OK]).pop(0)
            if (
                not fault
                and self.captured is not None
                and name
                in (
                    "cudaMalloc",
                    "cudaFree",
                    "cudaMallocHost",
                    "cudaFreeHost",
                    "cudaStreamSynchronize",
                )
            ):
                self.spoilt, fault = True, cudaError_t.cudaErrorStreamCaptureUnsupported
            if fault:
                if name == "cudaStreamEndCapture":
                    self.captured = None  # the capture ends even if this call fails
                return (fault, None)
            value = found(*arguments)
            return (
                value
                if isinstance(value, tuple)
                else (OK,)
                if value is None
                else (value,)
                if isinstance(value, cudaError_t)
                else (OK, value)
            )

        return call

    def submit(self, work: Work) -> None:
        """Queues work, or records it during a stream capture."""
        (self.queue if self.captured is None else self.captured).append(work)

    def view(self, address: int, size: int, side: str) -> np.ndarray:
        """Returns the bytes at an address. They must lie within one allocation on that
        side.
        """
        for base, (content, length, kind) in self.blocks.items():
            if base <= address and address + size <= base + length:
                assert kind == side, f"{size} bytes at {address:#x} are {kind} memory, not {side}"
                return content[address - base : address - base + size]
        raise AssertionError(f"{size} bytes at {address:#x} lie in no allocation of the {side}")

    @property
    def used(self) -> int:
        """Returns the bytes of device memory in use."""
        return sum(length for _, length, kind in self.blocks.values() if kind == "device")

    def cudaGetErrorName(self, error: cudaError_t) -> bytes:
        return error.name.encode()

    def cudaGetErrorString(self, error: cudaError_t) -> bytes:
        return b"said the simulation"

    def cudaGetLastError(self) -> cudaError_t:
        return OK

    def cudaGetDeviceCount(self) -> int:
        return 1

    def cudaGetDeviceProperties(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(name=self.name, major=8, minor=7)

    def cudaDriverGetVersion(self) -> int:
        return self.driver

    def cudaRuntimeGetVersion(self) -> int:
        return 12060

    def cudaStreamCreateWithFlags(self, flags: int) -> _Stream:
        assert flags == 1, "a stream that does not wait for the default one"
        return _Stream()

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return (OK, self.total - self.used, self.total)

    def _take(self, size: int, side: str) -> int | cudaError_t:
        if side == "device" and self.used + size > self.total:
            return cudaError_t.cudaErrorMemoryAllocation
        raw = np.full(size + ALIGNMENT, 0xFF, np.uint8)  # NaN in every floating type
        skip = -raw.ctypes.data % ALIGNMENT
        self.blocks[raw.ctypes.data + skip] = (raw[skip : skip + size], size, side)
        return raw.ctypes.data + skip

    def _give(self, address: int) -> None:
        self.cudaStreamSynchronize(None)
        del self.blocks[address]

    def cudaMalloc(self, size: int) -> int | cudaError_t:
        return self._take(size, "device")

    def cudaMallocHost(self, size: int) -> int | cudaError_t:
        return self._take(size, "host")

    cudaFree = cudaFreeHost = _give

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: _Stream) -> None:
        self.submit(lambda: self.view(address, size, "device").fill(value))

    def cudaMemset2DAsync(
        self, address: int, pitch: int, value: int, width: int, rows: int, stream: _Stream
    ) -> None:
        def work() -> None:
            for row in range(rows):
                self.view(address + row * pitch, width, "device").fill(value)

        self.submit(work)

    def cudaMemcpyAsync(
        self, to: int, source: int, size: int, kind: cudaMemcpyKind, stream: _Stream
    ) -> None:
        self._copy(to, size, source, size, size, 1, kind)

    def cudaMemcpy2DAsync(
        self,
        to: int,
        to_pitch: int,
        source: int,
        pitch: int,
        width: int,
        rows: int,
        kind: cudaMemcpyKind,
        stream: _Stream,
    ) -> Any:
        if width > min(to_pitch, pitch):
            return BAD
        self._copy(to, to_pitch, source, pitch, width, rows, kind)
        return None

    def _copy(
        self,
        to: int,
        to_pitch: int,
        source: int,
        pitch: int,
        width: int,
        rows: int,
        kind: cudaMemcpyKind,
    ) -> None:
        origin, target = _SIDES[kind]

        def work() -> None:
            if target == "host":
                self.brought.append(width)
            for row in range(rows):
                self.view(to + row * to_pitch, width, target)[...] = self.view(
                    source + row * pitch, width, origin
                )

        self.submit(work)

    def cudaStreamSynchronize(self, stream: _Stream | None) -> None:
        while self.queue:
            self.queue.pop(0)()

    def cudaStreamBeginCapture(self, stream: _Stream, mode: cudaStreamCaptureMode) -> None:
        assert isinstance(mode, cudaStreamCaptureMode) and not self.queue, "captured behind nothing"
        self.captured, self.spoilt = [], False

    def cudaStreamEndCapture(self, stream: _Stream) -> Any:
        captured, self.captured = self.captured, None
        return cudaError_t.cudaErrorStreamCaptureInvalidated if self.spoilt else captured

    def cudaGraphInstantiate(self, graph: list[Work], flags: int) -> Any:
        return {"work": list(graph)}

    def cudaGraphDestroy(self, graph: list[Work]) -> None:
        graph.clear()

    def cudaGraphLaunch(self, executable: dict[str, list[Work]], stream: _Stream) -> Any:
        if not executable["work"]:
            return BAD
        self.launched += 1
        self.queue += executable["work"]
        return None

    def cudaGraphExecDestroy(self, executable: dict[str, list[Work]]) -> None:
        executable["work"].clear()


def array_at(cuda: Cuda, address: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a view of device memory as an array."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    found = cuda.view(address, size, "device")
    assert address % ALIGNMENT == 0, f"a tensor at {address:#x} is not aligned"
    return found.view(dtype).reshape(shape)
