"""Converts a graph's arithmetic from fp32 to fp16. Norms, rotary angles, softmax and
explicitly marked nodes stay fp32, because their sums are long or their ranges wide.

Weights become fp16 when the graph is written. Casts stand where the two types meet, one
per value. Engines that take types literally (TensorRT's strongly typed networks)
compute exactly this.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.passes.contract import GraphPass, PassResult, is_full, lazy_initializer
from runtime.contract.errors import BuildError

__all__ = ["to_half"]

_FP32, _FP16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
_FULL_OPS = {"LayerNormalization", "RMSNormalization", "RotaryEmbedding", "Softmax"}
_SCALE_ERROR = 5e-3  # largest relative error of a scale in fp16; 1/2048 unless it is subnormal
_BORDER = "fp32 | fp16"  # marks the Casts that this pass inserts
_OTHER_TYPES = {
    "Shape": ir.DataType.INT64,
    "LessOrEqual": ir.DataType.BOOL,
    "Less": ir.DataType.BOOL,
    "Size": ir.DataType.INT64,
}


def to_half(full_values: Collection[str]) -> GraphPass:
    """Returns the pass. Graph inputs and outputs named in `full_values` stay fp32."""

    def run(model: ir.Model) -> PassResult:
        _infer_types(model)
        state = _Halves(model, full_values)
        for node in list(model.graph):
            state.convert(node)
        state.finish()
        return PassResult(state.modified)

    return GraphPass("to_half", run)


def _infer_types(model: ir.Model) -> None:
    """Sets the types that the exporter left out: the type of the first input, except
    for a few operators.
    """
    for node in model.graph:
        for output in node.outputs:
            if output.type is not None:
                continue
            if node.op_type == "Cast":
                dtype = ir.DataType(node.attributes["to"].as_int())
            elif node.op_type == "Constant":
                dtype = node.attributes["value"].as_tensor().dtype
            else:
                first = node.inputs[0].type if node.inputs and node.inputs[0] is not None else None
                assert node.op_type in _OTHER_TYPES or first is not None, (
                    f"{node.op_type} {output.name} has no type"
                )
                dtype = _OTHER_TYPES.get(node.op_type) or first.dtype  # type: ignore[union-attr]
            output.type = ir.TensorType(dtype)


class _Halves:
    """Maps each fp32 value to its fp16 form, and each fp16 value to its fp32 form."""

    def __init__(self, model: ir.Model, full_values: Collection[str]) -> None:
        self.model, self.modified = model, 0
        self._full_values = full_values
        self._half: dict[ir.Value, ir.Value] = {}
        self._full: dict[ir.Value, ir.Value] = {}
        self._weights = [
            value for value in model.graph.initializers.values() if value.dtype == _FP32
        ]
        for value in model.graph.inputs:
            if value.dtype == _FP32 and value.name not in full_values:
                value.type = ir.TensorType(_FP16)

    def convert(self, node: ir.Node) -> None:
        """Casts a node's inputs to the type it computes in, and gives its outputs that
        type.
        """
        if node.meta.get(_BORDER):
            return
        full = is_full(node) or node.op_type in _FULL_OPS
        halved = not full and (node.op_type != "Cast" or node.attributes["to"].as_int() == _FP32)
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in (_FP32, _FP16):
                node.replace_input_with(
                    index, self._as_full(value, node) if full else self._as_half(value, node)
                )
        if node.op_type == "Constant" and not full:
            return  # small, and cast where it is used
        for output in node.outputs:
            if halved and output.dtype == _FP32:
                output.type = ir.TensorType(_FP16)
                self.modified += 1
        if halved and node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", _FP16)

    def finish(self) -> None:
        """Casts outputs to the types that the contract names, and removes fp32 weights
        that are no longer used.
        """
        graph = self.model.graph
        for index, value in enumerate(graph.outputs):
            wanted = _FP32 if value.name in self._full_values else _FP16
            if value.dtype in (_FP32, _FP16) and value.dtype != wanted:
                cast, name = ir.node("Cast", [value], {"to": wanted}), value.name
                cast.meta[_BORDER] = True
                graph.append(cast)
                cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(wanted)
                value.name, cast.outputs[0].name = f"{name}.before", name
                graph.outputs[index] = cast.outputs[0]
        for value in self._weights:
            if not value.uses() and value.name:
                del graph.initializers[value.name]

    def _as_half(self, value: ir.Value, node: ir.Node) -> ir.Value:
        if value.dtype == _FP16:
            return value
        if value not in self._half:
            self._half[value] = (
                self._store(value) if value.is_initializer() else self._cast(value, node, _FP16)
            )
        return self._half[value]

    def _as_full(self, value: ir.Value, node: ir.Node) -> ir.Value:
        if value.dtype == _FP32:
            return value
        if value not in self._full:
            self._full[value] = self._cast(value, node, _FP32)
        return self._full[value]

    def _cast(self, value: ir.Value, node: ir.Node, dtype: ir.DataType) -> ir.Value:
        cast = ir.node("Cast", [value], {"to": dtype})
        cast.meta[_BORDER] = True
        cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(dtype)
        self.model.graph.insert_before(node, cast)
        return cast.outputs[0]

    def _store(self, value: ir.Value) -> ir.Value:
        tensor = value.const_value
        assert tensor is not None and value.name, "initializers hold tensors"
        self.modified += 1
        return lazy_initializer(
            self.model, f"{value.name}.fp16", partial(_round, tensor), _FP16, tensor.shape.numpy()
        )


def _round(tensor: ir.TensorProtocol) -> NDArray[np.float16]:
    """Returns the tensor in fp16. Raises `BuildError` if a value would become infinite,
    or if a scale would lose too much precision.
    """
    full = tensor.numpy()
    with np.errstate(over="ignore", under="ignore"):
        half = full.astype(np.float16)
    if not np.isfinite(half).all():
        raise BuildError(
            f"{tensor.name} has values beyond 65504, the maximum of fp16; build for --target "
            f"cpu with --precision fp32"
        )
    if (tensor.name or "").endswith("scale") and not np.allclose(
        half.astype(np.float32), full, rtol=_SCALE_ERROR, atol=0
    ):
        raise BuildError(
            f"{tensor.name} has quantisation scales too small for fp16; keep that block in fp16: "
            f"--keep BLOCK=fp16"
        )
    return half
