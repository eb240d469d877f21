"""Runs a graph's float view, or a part of it, in ONNX Runtime on the CPU. Every form of
the decoder's cache is fed: rows in place, rows to append, and fixed-length buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from export.parity.float_view import FloatView
from export.parity.stored_weights import UnknownFormError
from export.parity.subgraphs import cut_out
from runtime.contract.graphs import (
    INPUTS_EMBEDS,
    LOGITS,
    LOGITS_ROWS,
    LOGITS_TO_KEEP,
    POSITION_IDS,
    SEQLENS_K,
    TOTAL_LENGTH,
    present,
)
from runtime.contract.spec import DecoderSpec
from runtime.engines.onnxruntime.sessions import session_options

__all__ = ["DecoderRunner", "GraphSession", "lengths", "view_session"]

Array = NDArray[np.float32]
Feed = dict[str, NDArray[Any]]
_TYPES: Mapping[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
}


class GraphSession:
    """A session of a graph, or of the part between the tensors `starts` and `ends`.

    `feeds` are functions that compute inputs which are the same in every run. They are
    called once. `optimise` lets ONNX Runtime fuse operators, as the runtime does.
    """

    def __init__(
        self,
        model: ir.Model,
        starts: Collection[str] = (),
        ends: Collection[str] = (),
        feeds: Mapping[str, Callable[[], Array]] | None = None,
        optimise: bool = False,
    ) -> None:
        if ends:
            model = cut_out(model, starts, ends)
        settings = session_options(None, spinning=False, exact=False)
        if not optimise:
            settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = ort.InferenceSession(
                ir.to_proto(_in_memory(model)).SerializeToString(),
                settings,
                providers=["CPUExecutionProvider"],
            )
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            raise _cannot_run(error) from None
        self.inputs = {value.name: value for value in self._session.get_inputs()}
        self.outputs = [value.name for value in self._session.get_outputs()]
        self._fixed = {name: make() for name, make in (feeds or {}).items() if name in self.inputs}

    def run(self, feed: Mapping[str, NDArray[Any]]) -> dict[str, Array]:
        """Runs once, with inputs cast to the graph's types. Inputs that the graph does not
        have are left out.
        """
        given = {
            name: np.asarray(feed[name], _TYPES.get(value.type))
            for name, value in self.inputs.items()
            if name not in self._fixed
        }
        try:
            found = self._session.run(self.outputs, {**self._fixed, **given})
        except Exception as error:  # see above
            raise _cannot_run(error) from None
        return dict(zip(self.outputs, found, strict=True))

    def fixed_rows(self, names: Collection[str]) -> int | None:
        """Returns the length of fixed caches, or None if a cache may have any length."""
        for name in names:
            if name in self.inputs and isinstance(self.inputs[name].shape[2], int):
                return int(self.inputs[name].shape[2])
        return None


def _in_memory(model: ir.Model) -> ir.Model:
    """Reads the tensors that are stored beside the graph, so that it can run from memory."""
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.Tensor(
                tensor.numpy(), dtype=tensor.dtype, shape=tensor.shape, name=name
            )
    return model


def _cannot_run(error: Exception) -> UnknownFormError:
    return UnknownFormError(f"the graph cannot run: {str(error).splitlines()[0]:.200}")


def view_session(
    view: FloatView, starts: Collection[str] = (), ends: Collection[str] = ()
) -> GraphSession:
    """Returns a session of a float view, or of a part of it."""
    return GraphSession(view.model, starts, ends, view.feeds)


def lengths(start: int, rows: int, slots: int = 1) -> Feed:
    """Returns the inputs that tell where the rows of a call stand."""
    return {
        POSITION_IDS: np.tile(np.arange(start, start + rows, dtype=np.int64), (slots, 1)),
        SEQLENS_K: np.full(slots, start + rows - 1, np.int32),
        TOTAL_LENGTH: np.array(start + rows, np.int32),
    }


class DecoderRunner:
    """Runs a whole decoder view with a cache, call by call."""

    def __init__(self, view: FloatView, spec: DecoderSpec, capacity: int) -> None:
        self._session = view_session(view)
        self._names = spec.cache_names
        self.capacity = self._session.fixed_rows(self._names) or capacity
        shape = (1, spec.kv_heads, self.capacity, spec.head_dim)
        self._caches = {name: np.zeros(shape, np.float32) for name in self._names}
        self.keeps = {LOGITS_TO_KEEP, LOGITS_ROWS} & set(self._session.inputs)

    def run(self, inputs_embeds: Array, start: int, keep: int = 1) -> Array:
        """Computes rows [1, L, H] from position `start`. Returns the logits [keep, V] of
        the last rows.
        """
        rows = inputs_embeds.shape[1]
        feed: Feed = {INPUTS_EMBEDS: inputs_embeds, **lengths(start, rows), **self._caches}
        feed[LOGITS_TO_KEEP] = np.array([keep], np.int64)
        feed[LOGITS_ROWS] = np.arange(rows - keep, rows, dtype=np.int64)
        found = self._session.run(feed)
        for name in self._names:
            updated = found[present(name)]
            if updated.shape[2] == self.capacity:
                self._caches[name] = np.ascontiguousarray(updated)
            else:
                self._caches[name][:, :, start : start + rows] = updated
        return np.asarray(found[LOGITS], np.float32)
