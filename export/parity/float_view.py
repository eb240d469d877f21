"""Turns a packed graph into the same graph in float32: every integer kernel becomes a
product with the weight that it stores, and half precision becomes single.

The result shows the structure of the graph without its rounding, so it can be compared
with PyTorch as closely as float arithmetic allows. Only the exact patterns that this
toolchain writes are accepted, with their exact constants. Anything else raises
`UnknownFormError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.parity.float_graph import FloatView, add_input
from export.parity.kernel_patterns import (
    block_product,
    eight_bit_cache,
    integer_product,
    is_stored,
    restored_weight,
    static_input,
)
from export.parity.stored_weights import StoredWeight, UnknownFormError
from runtime.contract.spec import ModelSpec

__all__ = ["FloatView", "float_view", "read_tensors"]

_FP32, _FP16 = ir.DataType.FLOAT, ir.DataType.FLOAT16
_LARGE = 1024  # larger float initializers become inputs, so that opening the graph copies nothing
_QUANTISED = (
    "MatMulInteger",
    "DynamicQuantizeLinear",
    "QuantizeLinear",
    "DequantizeLinear",
    "MatMulNBits",
)


def float_view(path: Path, spec: ModelSpec) -> FloatView:
    """Returns the float32 form of a model's graph file. Weights stay on disk until they
    are read. Raises `UnknownFormError`.

    Constants of attention that half precision rounded become exact again.
    """
    view = FloatView(ir.load(path))
    graph = view.model.graph
    for node in list(graph):
        if node.op_type == "MatMulInteger":
            integer_product(view, node)
        elif node.op_type == "MatMulNBits":
            block_product(view, node)
        elif node.op_type == "DequantizeLinear" and is_stored(node.inputs[0]):
            restored_weight(view, node)
        elif node.op_type == "GroupQueryAttention":
            eight_bit_cache(view, node)
    for node in list(graph):
        if node.op_type == "QuantizeLinear":
            static_input(view, node)
    _remove_unused(graph)
    left = sorted({node.op_type for node in graph if node.op_type in _QUANTISED})
    if left:
        raise UnknownFormError(f"{path.name} has {', '.join(left)} outside the known patterns")
    _widen(view, _attention_scales(spec))
    _name_float_weights(view)
    return view


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
        wide_input = add_input(view, plain, [int(side) for side in tensor.shape.numpy()], read)
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
            read, half = partial(stored.astype, np.float32), stored.dtype == np.float16
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
