"""Recognises the integer kernels that this toolchain writes, with their exact constants, and
replaces each by a product with the weight that it stores.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from export.parity.float_graph import FloatView, add_input
from export.parity.stored_weights import (
    StoredWeight,
    UnknownFormError,
    parameter_name,
    read_block_weight,
    read_channel_weight,
)

__all__ = [
    "block_product",
    "eight_bit_cache",
    "integer_product",
    "is_stored",
    "restored_weight",
    "static_input",
]

_FP32 = ir.DataType.FLOAT
_MIDDLE = 8  # 4-bit level that means zero


def is_stored(value: ir.Value | None) -> bool:
    """True for a value that the graph stores."""
    return value is not None and value.is_initializer()


def _producer(value: ir.Value | None, op_type: str, where: str) -> ir.Node:
    node = value.producer() if value is not None else None
    if node is None or node.op_type != op_type:
        found = node.op_type if node is not None else "an input"
        raise UnknownFormError(f"{where}: found {found}, expected {op_type}")
    return node


def _consumer(value: ir.Value, op_type: str, where: str) -> ir.Node:
    uses = list(value.uses())
    if len(uses) != 1 or uses[0].node.op_type != op_type:
        found = ", ".join(use.node.op_type for use in uses) or "nothing"
        raise UnknownFormError(f"{where}: {found} uses {value.name}, expected {op_type}")
    return uses[0].node


def _other(node: ir.Node, value: ir.Value, where: str) -> ir.Value:
    others = [x for x in node.inputs if x is not None and x is not value]
    if len(others) != 1 or len(node.inputs) != 2:
        raise UnknownFormError(f"{where}: {node.op_type} has unexpected inputs")
    return others[0]


def _number(value: ir.Value | None, expected: float, where: str) -> None:
    tensor = value.const_value if value is not None and is_stored(value) else None
    stored = tensor.numpy() if tensor is not None else None
    if stored is None or stored.size != 1 or np.float32(stored.reshape(())) != np.float32(expected):
        raise UnknownFormError(f"{where}: a constant is {stored}, expected {expected}")


def _weight_input(view: FloatView, weight: StoredWeight) -> ir.Value:
    if weight.name in view.weights:
        raise UnknownFormError(f"{weight.name} is stored twice")
    view.weights[weight.name] = weight
    return add_input(view, weight.name, weight.shape, weight.decoded)


def _multiply(
    view: FloatView, node: ir.Node, x: ir.Value, weight: ir.Value, result: ir.Value
) -> None:
    """Puts MatMul(x, weight) in front of `node`, in place of `result`."""
    product = ir.node("MatMul", [x, weight])
    product.outputs[0].type = ir.TensorType(_FP32)
    view.model.graph.insert_before(node, product)
    name = result.name
    ir.convenience.replace_all_uses_with(result, product.outputs[0], replace_graph_outputs=True)
    result.name, product.outputs[0].name = f"{name}|replaced", name


def integer_product(view: FloatView, node: ir.Node) -> None:
    """Replaces a product of 8-bit integers. Its input was rounded with a scale per row or
    with one range for the call.
    """
    levels, stored, zero = (*node.inputs, None)[:3]
    assert levels is not None and stored is not None
    where = str(stored.name)
    cast = _consumer(node.outputs[0], "Cast", where)
    first = _consumer(cast.outputs[0], "Mul", where)
    source = levels.producer()
    if source is not None and source.op_type == "DynamicQuantizeLinear":
        activation, x = "int8-tensor", source.inputs[0]
        both = _producer(_other(first, cast.outputs[0], where), "Mul", where)
        scale = _other(both, source.outputs[1], where)
        if zero is not source.outputs[2] or levels is not source.outputs[0]:
            raise UnknownFormError(f"{where}: the zero point belongs to another tensor")
        result = first.outputs[0]
    else:
        activation = "int8-row"
        x, row_scale = _row_scale(levels, where)
        _number(zero, 128, where)
        if _other(first, cast.outputs[0], where) is not row_scale:
            raise UnknownFormError(f"{where}: the row's scale belongs to another tensor")
        last = _consumer(first.outputs[0], "Mul", where)
        scale, result = _other(last, first.outputs[0], where), last.outputs[0]
    name, shape, read = read_channel_weight(stored, scale, where)
    _expect_name(scale, f"{name}.scale")
    weight = StoredWeight(name, "int8", shape, activation, 0, read)
    assert x is not None
    _multiply(view, node, x, _weight_input(view, weight), result)


def _row_scale(levels: ir.Value, where: str) -> tuple[ir.Value, ir.Value]:
    """Returns the rounded tensor and its scale per row, from uint8 levels around 128."""
    cast = _producer(levels, "Cast", where)
    if cast.attributes["to"].as_int() != ir.DataType.UINT8:
        raise UnknownFormError(f"{where}: levels are cast to {cast.attributes['to'].as_int()}")
    shifted = _producer(cast.inputs[0], "Add", where)
    _number(shifted.inputs[1], 128.5, where)
    ratio = _producer(shifted.inputs[0], "Div", where)
    x, scale = ratio.inputs
    product = _producer(scale, "Mul", where)
    _number(product.inputs[1], 1 / 127, where)
    floor = _producer(product.inputs[0], "Max", where)
    _number(floor.inputs[1], 1e-12, where)
    peak = _producer(floor.inputs[0], "ReduceMax", where)
    _number(peak.inputs[1], -1, where)
    magnitude = _producer(peak.inputs[0], "Abs", where)
    if magnitude.inputs[0] is not x or x is None or scale is None:
        raise UnknownFormError(f"{where}: the row's scale is that of another tensor")
    if peak.attributes["keepdims"].as_int() != 1:
        raise UnknownFormError(f"{where}: the row's scale has another shape")
    return x, scale


def block_product(view: FloatView, node: ir.Node) -> None:
    """Replaces a product with a weight in blocks, which the kernel unpacks."""
    where = str(node.inputs[1].name if node.inputs[1] is not None else node.name)
    name, kind, shape, block, read = read_block_weight(node, where)
    _expect_name(node.inputs[2], f"{name}.scale")
    accuracy = node.attributes["accuracy_level"].as_int()
    activation = {0: "float", 4: "block"}.get(accuracy)
    if activation is None:
        raise UnknownFormError(f"{where}: accuracy level {accuracy}")
    symmetric = len(node.inputs) < 4 or node.inputs[3] is None
    weight = StoredWeight(name, kind, shape, activation, block, read, symmetric)
    x = node.inputs[0]
    assert x is not None
    _multiply(view, node, x, _weight_input(view, weight), node.outputs[0])


def restored_weight(view: FloatView, node: ir.Node) -> None:
    """Replaces a weight [K, N] that DequantizeLinear restores."""
    levels, scale = node.inputs[0], node.inputs[1]
    assert levels is not None and levels.const_value is not None
    where = str(levels.name)
    if len([x for x in node.inputs if x is not None]) != 2:
        raise UnknownFormError(f"{where}: a zero point, expected none")
    four = levels.const_value.dtype == ir.DataType.INT4
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    if axis != (0 if four else 1):
        raise UnknownFormError(f"{where}: scales along axis {axis}")
    if not four:
        name, shape, read = read_channel_weight(levels, scale, where)
        weight = StoredWeight(name, "int8", shape, "float", 0, read)
    else:
        block = node.attributes["block_size"].as_int()
        k, n = (int(side) for side in levels.const_value.shape.numpy())
        name = parameter_name(levels, ".int4")

        def read_four() -> tuple[Any, Any, Any]:
            assert levels.const_value is not None and scale is not None
            assert scale.const_value is not None
            scales = np.asarray(scale.const_value.numpy(), np.float32)
            if scales.shape != (k // block, n):
                raise UnknownFormError(
                    f"{where}: scales {list(scales.shape)} for blocks of {block}"
                )
            found = levels.const_value.numpy().astype(np.float32) + _MIDDLE
            return found, scales, np.full_like(scales, _MIDDLE)

        weight = StoredWeight(name, "int4", (k, n), "float", block, read_four)
    _expect_name(scale, f"{weight.name}.scale")
    value = _weight_input(view, weight)
    ir.convenience.replace_all_uses_with(node.outputs[0], value)


def static_input(view: FloatView, node: ir.Node) -> None:
    """Removes a QuantizeLinear and the DequantizeLinear behind it. Their grid becomes part
    of the weights that the result is multiplied by.
    """
    x, scale, zero = (*node.inputs, None)[:3]
    where = str(scale.name if scale is not None else node.name)
    back = _consumer(node.outputs[0], "DequantizeLinear", where)
    restored_zero = (*back.inputs, None)[2]
    if back.inputs[1] is not scale or (restored_zero is not None and restored_zero is not zero):
        raise UnknownFormError(f"{where}: values are restored with another grid")
    assert scale is not None and scale.const_value is not None
    assert zero is not None and zero.const_value is not None and x is not None
    point = zero.const_value.numpy()
    signed = point.dtype == np.int8
    if (restored_zero is None and int(point) != 0) or (not signed and point.dtype != np.uint8):
        raise UnknownFormError(f"{where}: zero point {point} of {point.dtype}")
    grid = (float(scale.const_value.numpy().reshape(())), int(point.reshape(())))
    for use in back.outputs[0].uses():
        weight = (*use.node.inputs, None, None)[1]
        name = str(weight.name).removesuffix("|float") if weight is not None else ""
        if use.node.op_type != "MatMul" or name not in view.weights:
            raise UnknownFormError(f"{where}: {use.node.op_type} uses rounded values")
        known = view.weights[name]
        activation = "int8-signed" if signed else "int8-static"
        view.weights[name] = replace(known, activation=activation, static=grid)
    ir.convenience.replace_all_uses_with(back.outputs[0], x)


def eight_bit_cache(view: FloatView, node: ir.Node) -> None:
    """Removes the scales of an 8-bit cache from an attention operator."""
    if len(node.inputs) <= 12:
        return
    layer = str(node.inputs[3].name).rpartition(".")[2] if node.inputs[3] is not None else ""
    for place, kind in ((12, "keys"), (13, "values")):
        scale = node.inputs[place]
        _expect_name(scale, f"decoder.layers.{layer}.{kind}_scale")
        assert scale is not None and scale.const_value is not None
        view.cache_scales[str(scale.name)] = np.asarray(scale.const_value.numpy(), np.float32)
    node.resize_inputs(9)
    for attribute in ("k_quant_type", "v_quant_type", "kv_cache_bit_width"):
        if attribute not in node.attributes:
            raise UnknownFormError(f"layer {layer}: an 8-bit cache without {attribute}")
        del node.attributes[attribute]
    for value in (*node.inputs[3:5], *node.outputs[1:3]):
        assert value is not None
        value.type = ir.TensorType(_FP32)


def _expect_name(value: ir.Value | None, name: str) -> None:
    found = str(value.name) if value is not None else "nothing"
    if found.removesuffix(".fp16") != name:
        raise UnknownFormError(f"found {found}, expected {name}")
