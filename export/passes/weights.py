"""Applying a scheme to a graph's linear layers: weights stored in half precision, or 8-bit weights met by 8-bit activations.

8-bit activations are quantised where they are used, one symmetric scale per row (token), so that no row's outlier costs another row precision. The
zero point is the constant 128: rows become unsigned, which every x86 and Arm integer kernel takes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.passes.contract import GraphPass, PassResult, initializer, is_weight
from export.schemes import Scheme

__all__ = ["apply_scheme", "quantize_per_channel"]

_LEVELS = 127.0
_MIN_ROWS = 16  # smaller weights cost more in quantisation than they save


def quantize_per_channel(weight_KN: NDArray[np.floating]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric 8-bit weights [K, N] and one scale per output channel [N]; an all-zero channel gets scale 1."""
    scale = np.abs(weight_KN).max(axis=0) / _LEVELS
    scale = np.where(scale > 0, scale, 1.0).astype(np.float32)
    return np.rint(weight_KN / scale).clip(-_LEVELS, _LEVELS).astype(np.int8), scale


def apply_scheme(scheme: Scheme) -> GraphPass:
    """The pass that stores and computes every linear layer as the scheme says."""

    def run(model: ir.Model) -> PassResult:
        stored = _store_half(model, scheme)
        integer = _integer_linears(model, scheme)
        return PassResult(stored.modified + integer.modified, stored.refused + integer.refused)

    return GraphPass(f"scheme_{scheme.name}", run)


def _store_half(model: ir.Model, scheme: Scheme) -> PassResult:
    """Weights in fp16 with a Cast behind them, which engines fold when they load the graph."""
    modified, refused = 0, []
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) < 2 or scheme.linear(name).weight != "fp16":
            continue
        array = tensor.numpy()
        if np.abs(array).max(initial=0.0) > np.finfo(np.float16).max:
            refused.append(f"fp16: {name} has values beyond 65504")
            continue
        half = initializer(model, f"{name}.fp16", array.astype(np.float16))
        node = ir.node("Cast", [half], {"to": ir.DataType.FLOAT})
        node.outputs[0].shape, node.outputs[0].type = value.shape, ir.TensorType(ir.DataType.FLOAT)
        first = model.graph[0]
        model.graph.insert_before(first, node)
        ir.convenience.replace_all_uses_with(value, node.outputs[0])
        del model.graph.initializers[name]
        modified += 1
    return PassResult(modified, tuple(refused))


def _integer_linears(model: ir.Model, scheme: Scheme) -> PassResult:
    modified, refused = 0, []
    quantised: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if not is_weight(weight):
            continue
        assert weight is not None and weight.const_value is not None and weight.name is not None
        if scheme.linear(weight.name).weight != "int8":
            continue
        array = weight.const_value.numpy()
        if not np.isfinite(array).all():
            refused.append(f"int8: {weight.name} has NaN or infinite values")
        elif array.shape[0] < _MIN_ROWS:
            refused.append(f"int8: {weight.name} has {array.shape[0]} rows, fewer than {_MIN_ROWS}")
        else:
            _to_integer(model, node, array, quantised)
            modified += 1
    return PassResult(modified, tuple(refused))


def _to_integer(model: ir.Model, node: ir.Node, array: NDArray[np.floating], quantised: dict[ir.Value, tuple[ir.Value, ir.Value]]) -> None:
    """Replaces MatMul(x, weight) by quantise(x) -> MatMulInteger -> rescale; layers that share x share its quantisation."""
    x, weight = node.inputs
    assert x is not None and weight is not None and weight.name is not None

    def insert(op_type: str, inputs: list[ir.Value], dtype: ir.DataType, **attributes: int) -> ir.Value:
        new = ir.node(op_type, inputs, dict(attributes))
        new.outputs[0].type = ir.TensorType(dtype)
        model.graph.insert_before(node, new)
        return new.outputs[0]

    if x not in quantised:
        quantised[x] = _quantize_rows(model, x, insert)
    levels, row_scale = quantised[x]
    integers, scale = quantize_per_channel(array)
    del model.graph.initializers[weight.name]
    stored = initializer(model, f"{weight.name}.int8", integers)
    column_scale = initializer(model, f"{weight.name}.scale", scale)
    zero = _constant(model, "zero_point.128", np.array(128, np.uint8))
    product = insert("MatMulInteger", [levels, stored, zero], ir.DataType.INT32)
    product = insert("Cast", [product], ir.DataType.FLOAT, to=ir.DataType.FLOAT)
    result = insert("Mul", [insert("Mul", [product, row_scale], ir.DataType.FLOAT), column_scale], ir.DataType.FLOAT)
    old = node.outputs[0]
    result.shape, name = old.shape, old.name
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    result.name = name


def _constant(model: ir.Model, name: str, array: NDArray[np.generic]) -> ir.Value:
    return model.graph.initializers[name] if name in model.graph.initializers else initializer(model, name, array)


def _quantize_rows(model: ir.Model, x: ir.Value, insert: Callable[..., ir.Value]) -> tuple[ir.Value, ir.Value]:
    """x [..., K] to (uint8 levels around 128, scale [..., 1]). The floor keeps an all-zero row from dividing by zero."""
    axes = _constant(model, "last_axis", np.array([-1], np.int64))
    floor = _constant(model, "scale.floor", np.array(1e-12, np.float32))
    inverse = _constant(model, "levels.inverse", np.array(1 / _LEVELS, np.float32))
    offset = _constant(model, "levels.offset", np.array(128, np.float32))
    fp32 = ir.DataType.FLOAT
    peak = insert("ReduceMax", [insert("Abs", [x], fp32), axes], fp32, keepdims=1)
    scale = insert("Mul", [insert("Max", [peak, floor], fp32), inverse], fp32)
    rounded = insert("Round", [insert("Div", [x, scale], fp32)], fp32)
    levels = insert("Cast", [insert("Add", [rounded, offset], fp32)], ir.DataType.UINT8, to=ir.DataType.UINT8)
    return levels, scale
