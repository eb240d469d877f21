"""Applies a scheme to a graph's linear layers. Each gets the target's fastest kernel
for its precision.

Every quantised tensor is computed when the graph is written, from a checkpoint that
stays on disk. The pass itself only rewires the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from calibration.calibrate import Calibrated
from calibration.linear import LinearScheme, Quantised
from export.passes.contract import (
    GraphPass,
    PassResult,
    constant,
    insert,
    is_weight,
    lazy_initializer,
    replace_node,
)
from export.passes.pack_projections import parts_of
from runtime.contract.errors import BuildError

__all__ = ["Kernels", "Layer", "quantise_linears", "store_half"]

SchemeOf = Callable[[str], LinearScheme]
Kernels = Mapping[str, Callable[["Layer"], None]]
"""Maps a kind of activation to the function that rewires one layer."""

_MIN_ROWS = 16  # smaller weights cost more in quantisation than they save
_FP32 = ir.DataType.FLOAT


def store_half(chosen: Callable[[str, int], bool]) -> GraphPass:
    """Returns the pass that stores tensors in fp16, with a Cast behind them that
    engines fold as they load. `chosen` selects them by name and number of dimensions.
    """

    def run(model: ir.Model) -> PassResult:
        modified, refused = 0, []
        for name, value in list(model.graph.initializers.items()):
            tensor = value.const_value
            if (
                tensor is None
                or tensor.dtype != _FP32
                or len(tensor.shape) < 2
                or not chosen(name, len(tensor.shape))
            ):
                continue
            if np.abs(tensor.numpy()).max(initial=0.0) > np.finfo(np.float16).max:
                refused.append(f"fp16: {name} has values beyond 65504")
                continue
            half = lazy_initializer(
                model,
                f"{name}.fp16",
                partial(_as_half, tensor),
                ir.DataType.FLOAT16,
                tensor.shape.numpy(),
            )
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


def quantise_linears(scheme_of: SchemeOf, calibrated: Calibrated, kernels: Kernels) -> GraphPass:
    """Returns the pass that gives every linear layer with integer weights a kernel.
    `kernels` are the target's kernels by kind of activation.
    """

    def run(model: ir.Model) -> PassResult:
        modified, refused = 0, []
        quantised = lru_cache(maxsize=1)(
            partial(_quantise, calibrated)
        )  # cached, because levels, scales and zero points are written one after the other
        shared: dict[tuple[ir.Value, str], Any] = {}
        for node in list(model.graph):
            weight = node.inputs[1] if node.op_type == "MatMul" else None
            if not is_weight(weight):
                continue
            assert weight is not None and weight.name is not None and weight.const_value is not None
            scheme, (rows, columns) = (
                scheme_of(parts_of(weight.name)[0]),
                weight.const_value.shape.numpy(),
            )
            if not scheme.quantised:
                continue
            if rows < _MIN_ROWS:
                refused.append(
                    f"{scheme.weight}: {weight.name} has {rows} rows, fewer than {_MIN_ROWS}"
                )
                continue
            layer = Layer(
                model,
                node,
                weight.name,
                scheme,
                int(rows),
                int(columns),
                quantised,
                calibrated,
                shared,
            )
            del model.graph.initializers[weight.name]
            kernels[scheme.activation](layer)
            modified += 1
        return PassResult(modified, tuple(refused))

    return GraphPass("quantise_linears", run)


def _quantise(calibrated: Calibrated, name: str, scheme: LinearScheme) -> Quantised:
    """Returns a quantised weight. The rows of a packed weight are those of its parts."""
    parts = [calibrated.quantised(part, scheme) for part in parts_of(name)]
    scale, zero = (
        torch.cat([part.grid.scale for part in parts]),
        torch.cat([part.grid.zero for part in parts]),
    )
    return Quantised(
        torch.cat([part.levels for part in parts]), replace(parts[0].grid, scale=scale, zero=zero)
    )


@dataclass(frozen=True)
class Layer:
    """A MatMul(x, weight [K,N]) that another kernel will replace. `shared` holds
    quantised inputs that several layers use.
    """

    model: ir.Model
    node: ir.Node
    name: str
    scheme: LinearScheme
    k: int
    n: int
    quantised: Callable[[str, LinearScheme], Quantised]
    calibrated: Calibrated
    shared: dict[tuple[ir.Value, str], Any]

    @property
    def x(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None, "MatMul has two inputs"
        return value

    def insert(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        *dtypes: ir.DataType,
        domain: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """Inserts one operator before the MatMul and returns its typed outputs."""
        return insert(self.model, self.node, op_type, inputs, *dtypes, domain=domain, **attributes)

    def stored(
        self,
        suffix: str,
        make: Callable[[Quantised], NDArray[np.generic]],
        dtype: ir.DataType,
        shape: tuple[int, ...],
    ) -> ir.Value:
        """Adds an initializer that is computed from the quantised weight when the graph
        is written.
        """
        return lazy_initializer(
            self.model,
            f"{self.name}.{suffix}",
            lambda: make(self.quantised(self.name, self.scheme)),
            dtype,
            shape,
        )

    def constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        return constant(self.model, name, array)

    def finish(self, result: ir.Value) -> None:
        replace_node(self.model, self.node, result)

    def bounds(self) -> tuple[str, float, float]:
        """Returns the module whose calibrated input range applies to this layer (packed
        layers share it), and that range.
        """
        module = parts_of(self.name)[0].removesuffix(".weight")
        found = self.calibrated.get(f"{module}|range")
        if found is None:
            raise BuildError(f"{module} has no calibrated range; build with --calib DATA")
        return module, float(found[0]), float(found[1])
