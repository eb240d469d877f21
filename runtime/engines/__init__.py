"""The protocol of inference engines, and the table of targets that selects one.

An engine owns both graphs and the key/value cache buffers. Heavy imports live in each
engine's own module and happen when `load_engine` is called.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.contract.arguments import whole_number
from runtime.contract.bundle import Bundle
from runtime.contract.errors import EngineError, UsageError
from runtime.output.console import note

__all__ = [
    "PIP_ONNXRUNTIME_GPU",
    "TARGETS",
    "Batch",
    "Engine",
    "EngineOptions",
    "Target",
    "Validation",
    "available_cores",
    "load_engine",
]


def available_cores() -> int:
    """Returns how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class EngineOptions:
    """Settings of an engine: CPU threads (None: all cores this process may use) and
    cache rows (None: the model's context).

    `engine_cache` allows the engine to keep large weights on disk in the format its
    kernels need. `workspace_mb` is the memory that a GPU compiler may use while
    building (None: $INFMLLM_WORKSPACE_MB, else half of the free memory).
    """

    threads: int | None = None
    context: int | None = None
    engine_cache: bool = True
    workspace_mb: int | None = None

    def __post_init__(self) -> None:
        for name in ("threads", "context", "workspace_mb"):
            value = whole_number(name, getattr(self, name))
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}, expected at least 1 or None")
            object.__setattr__(self, name, value)


class Batch(Protocol):
    """Several sequences decoded together, each in a slot with its own cache rows. The
    slots hold copies, so the engine's own cache is not changed.
    """

    def fill(self, slot: int, rows: int) -> None:
        """Copies the first `rows` rows of the engine's own cache into a slot."""
        ...

    def step(
        self, inputs_embeds: NDArray[np.float32], starts: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """Runs one decode step for the first n slots: embeddings [n,1,H] are written to
        cache row starts[i] of slot i. Returns logits [n,V], valid until the next call.
        """
        ...

    def copy(self, sources: Sequence[int], start: int, end: int) -> None:
        """Copies rows `start` to `end` of slot sources[i] to slot i, for all slots as
        if at the same time.
        """
        ...


class Validation(Protocol):
    """Validation that an engine made on this machine must pass before it may answer:
    the bundle's goldens are replayed through it.
    """

    def conclude(self, failed: Mapping[str, str]) -> None:
        """Receives the outcome: each stage (vision, prefill, decode) out of tolerance,
        and by how much.

        A failed graph is replaced by another variant of the same graph, if the bundle
        has one, which must then be validated too. Raises `EngineError` if there is
        none.
        """
        ...


class Engine(Protocol):
    """Runs the two graphs of a bundle. Not safe for use by several threads at once."""

    capacity: int
    version: str
    """Version of the engine's library; results may change between versions."""
    verifies: bool
    """True if `verify` works: the graph can return logits of several positions."""

    @property
    def validation(self) -> Validation | None:
        """Set while the engine must not answer yet (see `Validation`); engines that run
        the bundle's own graphs need none.
        """
        ...

    def embed_image(
        self, pixels: NDArray[np.float32], pool: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Computes image embeddings [N,T,H] from pixels [N,3,S,S] and pool [T,s*s]."""
        ...

    def forward(self, inputs_embeds: NDArray[np.float32], start: int) -> NDArray[np.float32]:
        """Writes cache rows start to start+L from input embeddings [1,L,H]. Returns the
        logits [V] of the last position, valid until the next call.
        """
        ...

    def greedy(self, inputs_embeds: NDArray[np.float32], start: int) -> int:
        """Runs `forward` for one position [1,1,H] and returns the most likely token.
        The choice is made on the device that holds the logits. Raises `NonFiniteError`.
        """
        ...

    def verify(self, inputs_embeds: NDArray[np.float32], start: int) -> NDArray[np.float32]:
        """Runs several decode steps in one call of the decoder graph. Returns the
        logits of every position [L,V], valid until the next call.
        """
        ...

    def batch(self, slots: int, rows: int) -> Batch:
        """Allocates memory for `slots` sequences of up to `rows` rows. Raises
        `ContextError` if there is not enough memory.
        """
        ...


@dataclass(frozen=True)
class Target:
    """One kind of device that runs bundles.

    `engine` is the engine's class as "module:class". `extra` is the optional dependency
    of this package that installs what it needs, "" for none. `gpu` tells that it runs
    on an NVIDIA GPU. If `plugin`, a package, is installed, this engine also runs
    bundles of the targets in `substitutes` whose own engine is missing.
    """

    name: str
    engine: str
    extra: str
    help: str
    gpu: bool = True
    plugin: str = ""
    substitutes: tuple[str, ...] = ()


_ORT = "runtime.engines.onnxruntime"
TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="cpu",
            engine=f"{_ORT}.cpu:OrtEngine",
            extra="",
            help="ONNX Runtime on the CPU",
            gpu=False,
        ),
        Target(
            name="cuda",
            engine=f"{_ORT}.cuda:OrtCudaEngine",
            extra="gpu",
            help="ONNX Runtime on an NVIDIA GPU",
        ),
        Target(
            name="tensorrt",
            engine="runtime.engines.tensorrt.engine:TensorRtEngine",
            extra="tensorrt",
            help="TensorRT on an NVIDIA GPU or Jetson",
        ),
        Target(
            name="rtx",
            engine=f"{_ORT}.tensorrt_rtx:OrtRtxEngine",
            extra="rtx",
            help="ONNX Runtime's TensorRT-RTX plugin on a desktop RTX GPU",
            plugin="onnxruntime_ep_nv_tensorrt_rtx",
            substitutes=("tensorrt",),
        ),
    )
}


def load_engine(bundle: Bundle, options: EngineOptions) -> Engine:
    """Creates the engine a bundle was built for. Raises `EngineError` if the target is
    unknown or its engine is not installed.
    """
    target = TARGETS.get(bundle.target)
    if target is None:
        raise EngineError(
            f"bundle target is {bundle.target!r:.40}, expected one of: {', '.join(TARGETS)}; "
            f"rebuild the bundle with --target"
        )
    try:
        return _create(target, bundle, options)
    except ImportError as error:
        for other in TARGETS.values():
            if bundle.target in other.substitutes and importlib.util.find_spec(other.plugin):
                note(
                    f"the engine of target {target.name} is not installed; {other.help} runs this "
                    f"bundle"
                )
                return _create(other, bundle, options)
        extra = f"[{target.extra}]" if target.extra else ""
        fault = (
            "is not installed"
            if isinstance(error, ModuleNotFoundError)
            else f"cannot be loaded ({' '.join(str(error).split()):.160})"
        )
        raise EngineError(
            f"target {target.name} needs {error.name or 'a library'}, which {fault}; run: pip "
            f"install 'infmllm-edge{extra}'"
        ) from None


def _create(target: Target, bundle: Bundle, options: EngineOptions) -> Engine:
    module, _, name = target.engine.partition(":")
    engine: Engine = getattr(importlib.import_module(module), name)(bundle, options)
    return engine


PIP_ONNXRUNTIME_GPU = (
    "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu[cuda,cudnn]'"
)
"""How to have onnxruntime-gpu alone, with the libraries of its CUDA."""
