"""Runs the float views of a bundle's graphs as an engine: in the runtime's own engine
where it takes float graphs, and otherwise call by call.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.parity.float_view import FloatView
from export.parity.form_runner import DecoderRunner, view_session
from export.passes.contract import lazy_initializer
from runtime.contract.bundle import DECODER, PREFILL, VISION, Bundle, weights_file
from runtime.contract.errors import UsageError
from runtime.contract.graphs import IMAGE_EMBEDS, LOGITS_ROWS, PIXELS, POOL
from runtime.engines import EngineOptions, Validation
from runtime.engines.onnxruntime.cpu import OrtEngine

__all__ = ["FloatEngine", "float_engine"]

Array = NDArray[np.float32]


def float_engine(bundle: Bundle, views: dict[str, FloatView], folder: Path) -> OrtEngine:
    """Returns the CPU runtime's own engine over float graphs, which it writes to `folder`."""
    for file in (VISION, DECODER, PREFILL):
        if file in views:
            name = file.removesuffix(".onnx")
            ir.save(_with_weights(views[file]), folder / file, external_data=weights_file(name))
    return OrtEngine(replace(bundle, path=folder), EngineOptions(engine_cache=False))


def _with_weights(view: FloatView) -> ir.Model:
    """Returns a view's graph with its weights as initializers again."""
    model = view.model.clone()
    for value in [value for value in model.graph.inputs if value.name in view.feeds]:
        assert value.name is not None and value.shape is not None
        stored = lazy_initializer(
            model,
            value.name.removesuffix("|float"),
            partial(_read, view, value.name),
            ir.DataType.FLOAT,
            [int(side) for side in value.shape.numpy()],
        )
        ir.convenience.replace_all_uses_with(value, stored)
        model.graph.inputs.remove(value)
    return model


def _read(view: FloatView, name: str) -> Array:
    return np.ascontiguousarray(view.feeds[name](), np.float32)


class FloatEngine:
    """An `Engine` over the float views of a GPU bundle's graphs, one call at a time."""

    validation: Validation | None = None
    version = "float view"

    def __init__(self, bundle: Bundle, vision: FloatView, decoder: FloatView) -> None:
        self._vision = view_session(vision)
        self._decoder = DecoderRunner(decoder, bundle.spec.decoder, bundle.capacity)
        self.capacity = self._decoder.capacity
        self.verifies = LOGITS_ROWS in self._decoder.keeps and not decoder_companion(decoder)

    def embed_image(self, pixels: Array, pool: Array) -> Array:
        """See `Engine.embed_image`."""
        return np.asarray(self._vision.run({PIXELS: pixels, POOL: pool})[IMAGE_EMBEDS], np.float32)

    def forward(self, inputs_embeds: Array, start: int) -> Array:
        """See `Engine.forward`."""
        return self._decoder.run(inputs_embeds, start)[0]

    def greedy(self, inputs_embeds: Array, start: int) -> int:
        """See `Engine.greedy`."""
        return int(self.forward(inputs_embeds, start).argmax())

    def verify(self, inputs_embeds: Array, start: int) -> Array:
        """See `Engine.verify`."""
        return self._decoder.run(inputs_embeds, start, inputs_embeds.shape[1])

    def batch(self, slots: int, rows: int) -> object:
        """Raises `UsageError`: views run one sequence."""
        raise UsageError("float views run one sequence at a time")


def decoder_companion(view: FloatView) -> bool:
    """True if the graph computes the last row of a call twice."""
    return "companion.last" in view.model.graph.initializers
