"""Turns a packed graph into the same graph in float32: every integer kernel becomes a
product with the weight that it stores, and half precision becomes single.

The result shows the structure of the graph without its rounding, so it can be compared
with PyTorch as closely as float arithmetic allows. Only the exact patterns that this
toolchain writes are accepted, with their exact constants. Anything else raises
`UnknownFormError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.parity.stored_weights import (
    StoredWeight,
    UnknownFormError,
    parameter_name,
    read_block_weight,
    read_channel_weight,
)
from runtime.contract.spec import ModelSpec

__all__ = ["FloatView", "float_view", "read_tensors"]

_FP32, _FP16, _INT8 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT8
_LARGE = 1024  # larger float initializers become inputs, so that opening the graph copies nothing
_QUANTISED = (
    "MatMulInteger",
    "DynamicQuantizeLinear",
    "QuantizeLinear",
    "DequantizeLinear",
    "MatMulNBits",
)
_MIDDLE = 8  # 4-bit level that means zero


@dataclass
class FloatView:
    """A graph in float32.

    Attributes:
        model: The graph. Large float tensors are graph inputs; `feeds` has their values.
        weights: The linear weights by parameter name.
        tensors: All other float tensors by name, as stored (fp16 or fp32).
        feeds: Functions that compute the values of the weight inputs, by input name.
        cache_scales: Scales of 8-bit keys and values by initializer name.
        half: True if the graph computes anything in half precision.
    """

    model: ir.Model
    weights: dict[str, StoredWeight] = field(default_factory=dict)
    tensors: dict[str, NDArray[Any]] = field(default_factory=dict)
    feeds: dict[str, Callable[[], NDArray[np.float32]]] = field(default_factory=dict)
    cache_scales: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    kept: dict[str, ir.Value] = field(default_factory=dict)
    half: bool = False


def float_view(path: Path, spec: ModelSpec) -> FloatView:
    """Returns the float32 form of a model's graph file. Weights stay on disk until they
    are read. Raises `UnknownFormError`.

    Constants of attention that half precision rounded become exact again.
    """
    view = FloatView(ir.load(path))
    graph = view.model.graph
    for node in list(graph):
        if node.op_type == "MatMulInteger":
            _integer_product(view, node)
        elif node.op_type == "MatMulNBits":
            _block_product(view, node)
        elif node.op_type == "DequantizeLinear" and _is_stored(node.inputs[0]):
            _restored_weight(view, node)
        elif node.op_type == "GroupQueryAttention":
            _eight_bit_cache(view, node)
    for node in list(graph):
        if node.op_type == "QuantizeLinear":
            _static_input(view, node)
    _remove_unused(graph)
    left = sorted({node.op_type for node in graph if node.op_type in _QUANTISED})
    if left:
        raise UnknownFormError(f"{path.name} has {', '.join(left)} outside the known patterns")
    _widen(view, _attention_scales(spec))
    _name_float_weights(view)
    return view


def _is_stored(value: ir.Value | None) -> bool:
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
    stored = value.const_value.numpy() if _is_stored(value) and value.const_value else None  # type: ignore[union-attr]
    if stored is None or stored.size != 1 or np.float32(stored.reshape(())) != np.float32(expected):
        raise UnknownFormError(f"{where}: a constant is {stored}, expected {expected}")


def _weight_input(view: FloatView, weight: StoredWeight) -> ir.Value:
    if weight.name in view.weights:
        raise UnknownFormError(f"{weight.name} is stored twice")
    view.weights[weight.name] = weight
    return _add_input(view, weight.name, weight.shape, weight.decoded)


def _add_input(
    view: FloatView, name: str, shape: Sequence[int], read: Callable[[], NDArray[np.float32]]
) -> ir.Value:
    value = ir.Value(name=f"{name}|float", shape=ir.Shape(shape), type=ir.TensorType(_FP32))
    view.model.graph.inputs.append(value)
    view.feeds[f"{name}|float"] = read
    return value


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


def _integer_product(view: FloatView, node: ir.Node) -> None:
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


def _block_product(view: FloatView, node: ir.Node) -> None:
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


def _restored_weight(view: FloatView, node: ir.Node) -> None:
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


def _static_input(view: FloatView, node: ir.Node) -> None:
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


def _eight_bit_cache(view: FloatView, node: ir.Node) -> None:
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


def _remove_unused(graph: ir.Graph) -> None:
    kept = set(graph.outputs)
    for node in reversed(list(graph)):
        if any(output in kept or list(output.uses()) for output in node.outputs):
            continue
        graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not list(value.uses()):
            del graph.initializers[name]


def _attention_scales(spec: ModelSpec) -> list[float]:
    """Returns the constants of attention that a half-precision graph stores rounded."""
    widths = (spec.vision.width // spec.vision.heads, spec.decoder.head_dim)
    return [width**power for width in widths for power in (-0.5, -0.25)]


def _widen(view: FloatView, constants: Sequence[float]) -> None:
    """Makes every half-precision value single, and large float initializers inputs."""
    graph = view.model.graph
    view.half = any(value.dtype == _FP16 for node in graph for value in node.outputs)
    for value in (*graph.inputs, *(out for node in graph for out in node.outputs)):
        if value.dtype == _FP16:
            value.type = ir.TensorType(_FP32)
    for node in graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == _FP16:
            node.attributes["to"] = ir.AttrInt64("to", int(_FP32))
        for name, attribute in node.attributes.items():
            if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == _FP16:
                wide = ir.tensor(attribute.as_tensor().numpy().astype(np.float32))
                node.attributes[name] = ir.AttrTensor(name, wide)
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None:
            continue
        if tensor.dtype not in (_FP32, _FP16):
            value.const_value = ir.tensor(tensor.numpy(), name=name)
            continue
        plain = name.removesuffix(".fp16")

        def read(tensor: ir.TensorProtocol = tensor) -> NDArray[np.float32]:
            return np.asarray(tensor.numpy(), np.float32)

        if tensor.size <= _LARGE:
            view.tensors[plain] = np.array(tensor.numpy())
            small = ir.tensor(_exact(read(), tensor.dtype == _FP16, constants), name=name)
            value.const_value, value.type = small, ir.TensorType(_FP32)
            continue
        del graph.initializers[name]
        wide_input = _add_input(view, plain, [int(side) for side in tensor.shape.numpy()], read)
        wide_input.meta["stored"] = tensor.dtype
        view.kept[plain] = wide_input
        ir.convenience.replace_all_uses_with(value, wide_input)


def _exact(
    array: NDArray[np.float32], half: bool, constants: Sequence[float]
) -> NDArray[np.float32]:
    """Returns a widened scalar as the constant that it was rounded from, if it is one."""
    for value in constants if half and array.size == 1 else ():
        if np.float32(np.float16(value)) == array.reshape(()):
            return np.full_like(array, value)
    return array


def _name_float_weights(view: FloatView) -> None:
    """Records the float weights of products, which have no kernel of their own."""
    graph = view.model.graph
    for node in graph:
        if node.op_type != "MatMul" or node.inputs[1] is None:
            continue
        value = node.inputs[1]
        while (cast := value.producer()) is not None and cast.op_type == "Cast":
            assert cast.inputs[0] is not None
            value = cast.inputs[0]
        name = str(value.name).removesuffix("|float").removesuffix(".fp16")
        if name in view.weights or not name.endswith(".weight"):
            continue
        if name in view.kept:
            read, half = view.feeds[f"{name}|float"], view.kept[name].meta["stored"] == _FP16
        elif name in view.tensors:
            stored = view.tensors[name]
            read, half = (lambda a=stored: a.astype(np.float32)), stored.dtype == np.float16  # type: ignore[misc]
        else:
            continue
        shape = tuple(int(side) for side in (value.shape or ir.Shape([])).numpy())
        view.weights[name] = _float_weight(name, (shape[0], shape[1]), half, read)


def _float_weight(
    name: str, shape: tuple[int, int], half: bool, read: Callable[[], NDArray[np.float32]]
) -> StoredWeight:
    def parts() -> tuple[Any, Any, Any]:
        return read(), np.float32(1.0), np.float32(0.0)

    return StoredWeight(name, "fp16" if half else "fp32", shape, "float", 0, parts)


def read_tensors(view: FloatView) -> Mapping[str, Callable[[], NDArray[Any]]]:
    """Returns functions that read all float tensors that are not weights of products."""
    found: dict[str, Callable[[], NDArray[Any]]] = {}
    for name, array in view.tensors.items():
        if name not in view.weights:
            found[name] = lambda array=array: array  # type: ignore[misc]
    for name, value in view.kept.items():
        if name not in view.weights:
            kind = np.float16 if value.meta["stored"] == _FP16 else np.float32
            read = view.feeds[f"{name}|float"]
            found[name] = lambda read=read, kind=kind: read().astype(kind)  # type: ignore[misc]
    return found
