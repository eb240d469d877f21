"""Applying a scheme to a graph's linear layers, each as the target's fastest kernel for its numbers.

Every quantised tensor is computed when the graph is written, from a checkpoint that stays on disk; the pass itself only rewires.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.calibrate import Calibrated
from calibration.linear import LinearScheme, Quantised, activation_grid, fits
from export.passes.contract import GraphPass, PassResult, initializer, is_weight, lazy_initializer, replace_node
from export.passes.pack_projections import parts_of
from runtime.contract.errors import BuildError

__all__ = ["quantise_linears", "store_half"]

SchemeOf = Callable[[str], LinearScheme]

_LEVELS = 127.0
_MIN_ROWS = 16  # smaller weights cost more in quantisation than they save
_FP32, _U8, _I8 = ir.DataType.FLOAT, ir.DataType.UINT8, ir.DataType.INT8


def store_half(chosen: Callable[[str, int], bool]) -> GraphPass:
    """The pass that stores the tensors `chosen` by name and number of dimensions in fp16, with a Cast behind them that engines fold as they load."""

    def run(model: ir.Model) -> PassResult:
        modified, refused = 0, []
        for name, value in list(model.graph.initializers.items()):
            tensor = value.const_value
            if tensor is None or tensor.dtype != _FP32 or len(tensor.shape) < 2 or not chosen(name, len(tensor.shape)):
                continue
            if np.abs(tensor.numpy()).max(initial=0.0) > np.finfo(np.float16).max:
                refused.append(f"fp16: {name} has values beyond 65504")
                continue
            half = lazy_initializer(model, f"{name}.fp16", partial(_as_half, tensor), ir.DataType.FLOAT16, tensor.shape.numpy())
            node = ir.node("Cast", [half], {"to": _FP32})
            node.outputs[0].shape, node.outputs[0].type = value.shape, ir.TensorType(_FP32)
            model.graph.insert_before(model.graph[0], node)
            ir.convenience.replace_all_uses_with(value, node.outputs[0])
            del model.graph.initializers[name]
            modified += 1
        return PassResult(modified, tuple(refused))

    return GraphPass("store_half", run)


def _as_half(tensor: ir.TensorProtocol) -> NDArray[np.float16]:
    return tensor.numpy().astype(np.float16)


def quantise_linears(scheme_of: SchemeOf, calibrated: Calibrated) -> GraphPass:
    """The pass that gives every linear layer with integer weights its kernel."""

    def run(model: ir.Model) -> PassResult:
        modified, refused = 0, []
        quantised = lru_cache(maxsize=1)(partial(_quantised, calibrated))  # levels, scales and zero points are written one after the other
        shared: dict[tuple[ir.Value, str], ir.Value | _Levels] = {}
        for node in list(model.graph):
            weight = node.inputs[1] if node.op_type == "MatMul" else None
            if not is_weight(weight):
                continue
            assert weight is not None and weight.name is not None and weight.const_value is not None
            scheme, (rows, columns) = scheme_of(parts_of(weight.name)[0]), weight.const_value.shape.numpy()
            if not scheme.quantised:
                continue
            if rows < _MIN_ROWS:
                refused.append(f"{scheme.weight}: {weight.name} has {rows} rows, fewer than {_MIN_ROWS}")
                continue
            layer = _Layer(model, node, weight.name, scheme, int(rows), int(columns), quantised, calibrated, shared)
            del model.graph.initializers[weight.name]
            _KERNELS[scheme.activation](layer)
            modified += 1
        return PassResult(modified, tuple(refused))

    return GraphPass("quantise_linears", run)


def _quantised(calibrated: Calibrated, name: str, scheme: LinearScheme) -> Quantised:
    """A weight on its grid; a packed one's rows are those of its parts."""
    parts = [calibrated.quantised(part, scheme) for part in parts_of(name)]
    scale, zero = torch.cat([part.grid.scale for part in parts]), torch.cat([part.grid.zero for part in parts])
    return Quantised(torch.cat([part.levels for part in parts]), replace(parts[0].grid, scale=scale, zero=zero))


@dataclass(frozen=True)
class _Levels:
    """Quantised activations [..., K]: uint8 levels, their zero point (scalar), and a scale, one per row [..., 1] or one in all."""

    levels: ir.Value
    zero_point: ir.Value
    scale: ir.Value


@dataclass(frozen=True)
class _Layer:
    """A MatMul(x, weight [K,N]) on its way to another kernel. `shared` holds quantised inputs that several layers use."""

    model: ir.Model
    node: ir.Node
    name: str
    scheme: LinearScheme
    k: int
    n: int
    quantised: Callable[[str, LinearScheme], Quantised]
    calibrated: Calibrated
    shared: dict[tuple[ir.Value, str], ir.Value | _Levels]

    @property
    def x(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None, "MatMul has two inputs"
        return value

    def insert(self, op_type: str, inputs: Sequence[ir.Value | None], *dtypes: ir.DataType, domain: str = "", **attributes: int) -> list[ir.Value]:
        """Puts one operator before the MatMul and returns its outputs, typed."""
        new = ir.node(op_type, inputs, dict(attributes), domain=domain, num_outputs=len(dtypes))
        for output, dtype in zip(new.outputs, dtypes, strict=True):
            output.type = ir.TensorType(dtype)
        self.model.graph.insert_before(self.node, new)
        return list(new.outputs)

    def stored(self, suffix: str, make: Callable[[Quantised], NDArray[np.generic]], dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
        """An initializer made from the quantised weight when it is written."""
        return lazy_initializer(self.model, f"{self.name}.{suffix}", lambda: make(self.quantised(self.name, self.scheme)), dtype, shape)

    def constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        known = self.model.graph.initializers
        return known[name] if name in known else initializer(self.model, name, array)

    def weight(self) -> tuple[ir.Value, ir.Value]:
        """8-bit levels [K,N] and a scale per output channel [N]."""
        levels = self.stored("int8", _fitted, _I8, (self.k, self.n))
        return levels, self.stored("scale", lambda q: q.grid.scale.numpy()[:, 0], _FP32, (self.n,))

    def finish(self, result: ir.Value) -> None:
        replace_node(self.model, self.node, result)


def _fitted(quantised: Quantised) -> NDArray[np.int8]:
    """Levels as the kernel wants them. The manifest says that their products fit 16 bits, so they must (`calibration.linear.round_in_pairs`)."""
    assert fits(quantised), "8-bit weights for 8-bit activations are rounded in pairs"
    return np.ascontiguousarray(quantised.levels.numpy().T.astype(np.int8))


def _per_row(layer: _Layer) -> None:
    """One symmetric scale per row around the zero point 128. The floor keeps an all-zero row from dividing by zero.

    Casting truncates, so adding 128.5 rounds to the nearest level.
    """
    key = (layer.x, "int8-row")
    if key not in layer.shared:
        axes, floor = layer.constant("last_axis", np.array([-1], np.int64)), layer.constant("scale.floor", np.array(1e-12, np.float32))
        inverse = layer.constant("levels.inverse", np.array(1 / _LEVELS, np.float32))
        offset = layer.constant("levels.offset", np.array(128.5, np.float32))
        (magnitude,) = layer.insert("Abs", [layer.x], _FP32)
        (peak,) = layer.insert("ReduceMax", [magnitude, axes], _FP32, keepdims=1)
        (peak,) = layer.insert("Max", [peak, floor], _FP32)
        (scale,) = layer.insert("Mul", [peak, inverse], _FP32)
        (ratio,) = layer.insert("Div", [layer.x, scale], _FP32)
        (shifted,) = layer.insert("Add", [ratio, offset], _FP32)
        (levels,) = layer.insert("Cast", [shifted], _U8, to=_U8)
        layer.shared[key] = _Levels(levels, layer.constant("zero_point.128", np.array(128, np.uint8)), scale)
    x = layer.shared[key]
    assert isinstance(x, _Levels)
    weight, column_scale = layer.weight()
    (product,) = layer.insert("MatMulInteger", [x.levels, weight, x.zero_point], ir.DataType.INT32)
    (product,) = layer.insert("Cast", [product], _FP32, to=_FP32)
    (product,) = layer.insert("Mul", [product, x.scale], _FP32)
    layer.finish(layer.insert("Mul", [product, column_scale], _FP32)[0])


def _per_tensor(layer: _Layer) -> None:
    """One scale and zero point for the whole tensor, from its range. Both scales are multiplied first: ONNX Runtime fuses that form."""
    key = (layer.x, "int8-tensor")
    if key not in layer.shared:
        levels, scale, zero_point = layer.insert("DynamicQuantizeLinear", [layer.x], _U8, _FP32, _U8)
        layer.shared[key] = _Levels(levels, zero_point, scale)
    x = layer.shared[key]
    assert isinstance(x, _Levels)
    weight, column_scale = layer.weight()
    (product,) = layer.insert("MatMulInteger", [x.levels, weight, x.zero_point], ir.DataType.INT32)
    (product,) = layer.insert("Cast", [product], _FP32, to=_FP32)
    (both,) = layer.insert("Mul", [x.scale, column_scale], _FP32)
    layer.finish(layer.insert("Mul", [product, both], _FP32)[0])


def _static(layer: _Layer) -> None:
    """Calibrated range: QuantizeLinear and DequantizeLinear around the product, which engines fuse into one integer kernel."""
    key = (layer.x, "int8-static")
    if key not in layer.shared:
        module = parts_of(layer.name)[0].removesuffix(".weight")  # packed layers share their input, and so its range
        bounds = layer.calibrated.get(f"{module}|range")
        if bounds is None:
            raise BuildError(f"{module} has no calibrated range; build with --calib DATA")
        scale, zero = activation_grid(float(bounds[0]), float(bounds[1]))
        grid = (
            layer.constant(f"{module}.input_scale", np.array(scale, np.float32)),
            layer.constant(f"{module}.input_zero", np.array(zero, np.uint8)),
        )
        (levels,) = layer.insert("QuantizeLinear", [layer.x, *grid], _U8)
        (layer.shared[key],) = layer.insert("DequantizeLinear", [levels, *grid], _FP32)
    x = layer.shared[key]
    assert isinstance(x, ir.Value)
    (restored,) = layer.insert("DequantizeLinear", list(layer.weight()), _FP32, axis=1)
    layer.finish(layer.insert("MatMul", [x, restored], _FP32)[0])


def _weight_only(layer: _Layer) -> None:
    """Weights in blocks, unpacked inside the kernel; activations stay float to the graph (the kernel rounds them to 8 bit per block of a row)."""
    bits, block = layer.scheme.bits, layer.scheme.kernel_block(layer.k)
    count = -(-layer.k // block)
    pairs = -(-count // 2) if bits == 4 else count
    offset = 128 if bits == 8 else 0
    levels = layer.stored(f"int{bits}", lambda q: _packed(q.levels.numpy() + offset, block, bits), _U8, (layer.n, count, block * bits // 8))
    scale = layer.stored("scale", lambda q: _per_block(q.grid.scale, count), _FP32, (layer.n, count))
    zero = None
    if bits == 4 and not layer.scheme.symmetric:  # the kernel's own zero is the middle of the range, and faster
        zero = layer.stored("zero", lambda q: _packed(_per_block(q.grid.zero, count), count, 4)[:, 0], _U8, (layer.n, pairs))
    layer.model.opset_imports["com.microsoft"] = 1
    attributes = {"K": layer.k, "N": layer.n, "bits": bits, "block_size": block, "accuracy_level": 4}
    inputs = [layer.x, levels, scale, *([zero] if zero is not None else [])]
    layer.finish(layer.insert("MatMulNBits", inputs, _FP32, domain="com.microsoft", **attributes)[0])


def _per_block(values: Tensor, count: int) -> NDArray[Any]:
    """[N, blocks] of a grid as the kernel wants them; a scale per channel serves all its blocks."""
    return np.ascontiguousarray(np.broadcast_to(values.numpy(), (values.shape[0], count)))


def _packed(levels: NDArray[np.integer], block: int, bits: int) -> NDArray[np.uint8]:
    """[N, K] levels to [N, blocks, bytes], zeros behind the end; of two 4-bit levels the earlier one is the low half."""
    n, k = levels.shape
    padded = np.zeros((n, -(-k // block), block + (block % 2 if bits == 4 else 0)), np.uint8)
    for index in range(padded.shape[1]):
        part = levels[:, index * block : (index + 1) * block]
        padded[:, index, : part.shape[1]] = part
    return padded if bits == 8 else padded[..., ::2] | (padded[..., 1::2] << 4)


_KERNELS: dict[str, Callable[[_Layer], None]] = {"int8-row": _per_row, "int8-tensor": _per_tensor, "int8-static": _static, "float": _weight_only}
