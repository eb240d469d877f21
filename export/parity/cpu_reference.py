"""Runs the graphs of a GPU bundle literally on the CPU. The build's parity gate
compares the results with PyTorch before any GPU runs the graphs.

ONNX Runtime's optimisers stay off, so every operator computes in the type that the
graph names (float16 products are computed in float32 and rounded after each operator).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from export.targets import LOWERING
from runtime.contract.bundle import (
    DECODER,
    DECODER_FUSED,
    VISION,
    VISION_FUSED,
    Bundle,
    read_bundle,
)
from runtime.contract.errors import EngineError, UsageError
from runtime.contract.graphs import (
    IMAGE_EMBEDS,
    INPUTS_EMBEDS,
    LOGITS,
    LOGITS_ROWS,
    NEXT_TOKEN,
    PIXELS,
    POOL,
    POSITION_IDS,
    present,
)
from runtime.engines import Engine, EngineOptions, Validation
from runtime.engines.onnxruntime.cuda import OrtCudaEngine
from runtime.engines.onnxruntime.io_binding import HOST
from runtime.engines.onnxruntime.sessions import session_options
from runtime.output.console import note
from runtime.parity import StageError
from runtime.session import Session, load

__all__ = ["ReferenceEngine", "open_session", "reference_session", "replay_forms"]


class ReferenceEngine:
    """An `Engine` for tensorrt bundles that runs the plain graphs or the fused ones. It
    is slow and meant for builds and tests.
    """

    verifies = False
    validation: Validation | None = None

    def __init__(self, bundle: Bundle, fused: bool = False, threads: int | None = None) -> None:
        spec = bundle.spec.decoder
        self.capacity, self.version, self._fused = (
            bundle.capacity,
            f"reference, onnxruntime {ort.__version__}",
            fused,
        )
        self._vision, self._decoder = (
            _open(str(bundle.file(file)), threads)
            for file in ((VISION_FUSED, DECODER_FUSED) if fused else (VISION, DECODER))
        )
        shape = (1, spec.kv_heads, self.capacity, spec.head_dim)
        names = spec.cache_names
        self._caches = {name: np.zeros(shape, np.float16) for name in names}
        self._outputs = [LOGITS, NEXT_TOKEN, *(present(name) for name in names)]

    def embed_image(
        self, pixels: NDArray[np.float32], pool: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """See `Engine.embed_image`."""
        (embeds,) = self._vision.run([IMAGE_EMBEDS], {PIXELS: pixels, POOL: pool})
        return np.asarray(embeds, np.float32)

    def forward(self, inputs_embeds: NDArray[np.float32], start: int) -> NDArray[np.float32]:
        """See `Engine.forward`."""
        return self._run(inputs_embeds, start)[0][0]

    def greedy(self, inputs_embeds: NDArray[np.float32], start: int) -> int:
        """Returns the most likely token, as the graph itself selects it."""
        return int(self._run(inputs_embeds, start)[1][0])

    def _run(self, inputs_embeds: NDArray[np.float32], start: int) -> list[Any]:
        length = inputs_embeds.shape[1]
        feed: dict[str, NDArray[Any]] = {
            INPUTS_EMBEDS: inputs_embeds.astype(np.float16),
            POSITION_IDS: np.arange(start, start + length)[None],
            LOGITS_ROWS: np.array([length - 1]),
            **self._caches,
        }
        logits, token, *rows = self._decoder.run(self._outputs, feed)
        for cache, found in zip(self._caches.values(), rows, strict=True):
            if self._fused:
                cache[...] = found
            else:
                cache[:, :, start : start + length] = found
        return [logits, token]

    def verify(self, inputs_embeds: NDArray[np.float32], start: int) -> NDArray[np.float32]:
        """See `Engine.verify`. It is never called with more than one step."""
        return self.forward(inputs_embeds, start)[None]

    def batch(self, slots: int, rows: int) -> Any:
        """Raises `UsageError`, because builds ask one question at a time."""
        raise UsageError(
            "a GPU bundle that runs on the CPU answers one question at a time; leave out --beams "
            "and --batch"
        )


def reference_session(bundle: Bundle, fused: bool = False) -> Session:
    """Opens a session over one form of a GPU bundle's graphs. Graphs for ONNX Runtime
    run in their own engine, in CPU memory.
    """
    engine: Engine = (
        ReferenceEngine(bundle, fused)
        if DECODER_FUSED in bundle.files
        else OrtCudaEngine(bundle, EngineOptions(), HOST)
    )
    return Session(bundle, engine)


def replay_forms(bundle: Bundle, tolerance: Mapping[str, float]) -> list[StageError]:
    """Replays the golden cases through every form of the graphs. Returns the worse
    result of each stage.
    """
    forms = [
        reference_session(bundle, fused).replay(tolerance=tolerance)
        for fused in ((False, True) if DECODER_FUSED in bundle.files else (False,))
    ]
    return [max(rows, key=lambda row: row.error) for rows in zip(*forms, strict=True)]


def open_session(path: Path) -> Session:
    """Opens a session of any bundle on its own engine, if this machine has it.
    Otherwise the graphs of a GPU bundle run on the CPU, and a notice says so.
    """
    try:
        return load(path)
    except EngineError as error:
        bundle = read_bundle(path)
        if bundle.target not in LOWERING or not LOWERING[bundle.target].compare_on_cpu:
            raise
        note(f"{error}. The graphs run on the CPU instead, without optimisation")
        return reference_session(bundle)


def _open(path: str, threads: int | None) -> ort.InferenceSession:
    settings = session_options(threads)
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
