"""Applying a scheme to a graph's linear layers: weights stored in half precision, or 8-bit weights met by 8-bit activations.

Activations are quantised where they are used, as they occur: with one scale per row (token), so that no row's outlier costs another row precision, or
with one range per tensor, which is one fused operator and fits one-sided activations better. The scheme chooses per layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    quantised: dict[tuple[ir.Value, str], _Levels] = {}
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if not is_weight(weight):
            continue
        assert weight is not None and weight.const_value is not None and weight.name is not None
        linear = scheme.linear(weight.name)
        if linear.weight != "int8":
            continue
        array = weight.const_value.numpy()
        if not np.isfinite(array).all():
            refused.append(f"int8: {weight.name} has NaN or infinite values")
        elif array.shape[0] < _MIN_ROWS:
            refused.append(f"int8: {weight.name} has {array.shape[0]} rows, fewer than {_MIN_ROWS}")
        else:
            insert = _inserter(model, node)
            x = node.inputs[0]
            assert x is not None, "MatMul has two inputs"
            if (x, linear.activation) not in quantised:
                quantised[x, linear.activation] = _QUANTIZERS[linear.activation](model, x, insert)
            _to_integer(model, node, array, quantised[x, linear.activation], insert)
            modified += 1
    return PassResult(modified, tuple(refused))


@dataclass(frozen=True)
class _Levels:
    """Quantised activations [..., K]: uint8 levels, their zero point (scalar), and a scale, one per row [..., 1] or one in all."""

    levels: ir.Value
    zero_point: ir.Value
    scale: ir.Value
    per_row: bool


_Insert = Callable[..., list[ir.Value]]


def _inserter(model: ir.Model, before: ir.Node) -> _Insert:
    """A function that puts one operator before a node and returns its outputs, typed."""

    def insert(op_type: str, inputs: list[ir.Value], *dtypes: ir.DataType, **attributes: int) -> list[ir.Value]:
        new = ir.node(op_type, inputs, dict(attributes), num_outputs=len(dtypes))
        for output, dtype in zip(new.outputs, dtypes, strict=True):
            output.type = ir.TensorType(dtype)
        model.graph.insert_before(before, new)
        return list(new.outputs)

    return insert


def _to_integer(model: ir.Model, node: ir.Node, array: NDArray[np.floating], x: _Levels, insert: _Insert) -> None:
    """Replaces MatMul(x, weight) by MatMulInteger and rescaling; layers that share x share its levels.

    With one scale in all, both scales are multiplied first: the form ONNX Runtime fuses into a single operator.
    """
    weight = node.inputs[1]
    assert weight is not None and weight.name is not None
    integers, scale = quantize_per_channel(array)
    del model.graph.initializers[weight.name]
    stored = initializer(model, f"{weight.name}.int8", integers)
    column_scale = initializer(model, f"{weight.name}.scale", scale)
    (product,) = insert("MatMulInteger", [x.levels, stored, x.zero_point], ir.DataType.INT32)
    (product,) = insert("Cast", [product], ir.DataType.FLOAT, to=ir.DataType.FLOAT)
    if x.per_row:
        (product,) = insert("Mul", [product, x.scale], ir.DataType.FLOAT)
        (result,) = insert("Mul", [product, column_scale], ir.DataType.FLOAT)
    else:
        (both,) = insert("Mul", [x.scale, column_scale], ir.DataType.FLOAT)
        (result,) = insert("Mul", [product, both], ir.DataType.FLOAT)
    old = node.outputs[0]
    result.shape, name = old.shape, old.name
    ir.convenience.replace_all_uses_with(old, result, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    result.name = name


def _constant(model: ir.Model, name: str, array: NDArray[np.generic]) -> ir.Value:
    return model.graph.initializers[name] if name in model.graph.initializers else initializer(model, name, array)


def _quantize_rows(model: ir.Model, x: ir.Value, insert: _Insert) -> _Levels:
    """One symmetric scale per row around the zero point 128. The floor keeps an all-zero row from dividing by zero.

    Casting truncates, so adding 128.5 rounds to the nearest level.
    """
    axes = _constant(model, "last_axis", np.array([-1], np.int64))
    floor = _constant(model, "scale.floor", np.array(1e-12, np.float32))
    inverse = _constant(model, "levels.inverse", np.array(1 / _LEVELS, np.float32))
    offset = _constant(model, "levels.offset", np.array(128.5, np.float32))
    zero_point = _constant(model, "zero_point.128", np.array(128, np.uint8))
    fp32 = ir.DataType.FLOAT
    (magnitude,) = insert("Abs", [x], fp32)
    (peak,) = insert("ReduceMax", [magnitude, axes], fp32, keepdims=1)
    (peak,) = insert("Max", [peak, floor], fp32)
    (scale,) = insert("Mul", [peak, inverse], fp32)
    (ratio,) = insert("Div", [x, scale], fp32)
    (shifted,) = insert("Add", [ratio, offset], fp32)
    (levels,) = insert("Cast", [shifted], ir.DataType.UINT8, to=ir.DataType.UINT8)
    return _Levels(levels, zero_point, scale, per_row=True)


def _quantize_tensor(model: ir.Model, x: ir.Value, insert: _Insert) -> _Levels:
    """One scale and zero point for the whole tensor, from its range: a single operator, and it uses all levels of one-sided activations."""
    levels, scale, zero_point = insert("DynamicQuantizeLinear", [x], ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
    return _Levels(levels, zero_point, scale, per_row=False)


_QUANTIZERS: dict[str, Callable[[ir.Model, ir.Value, _Insert], _Levels]] = {"int8-row": _quantize_rows, "int8-tensor": _quantize_tensor}
