"""Defines the pass contract: a named step over a graph that counts what it changed, and
reports what it refused and why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = [
    "GraphPass",
    "PassResult",
    "constant",
    "graph_input",
    "initializer",
    "insert",
    "is_full",
    "is_weight",
    "lazy_initializer",
    "lazy_tensor",
    "mark_full",
    "replace_node",
]

_FULL = "fp32"


@dataclass(frozen=True)
class PassResult:
    """How many places a pass changed, and the reason for each place it declined."""

    modified: int
    refused: tuple[str, ...] = ()


@dataclass(frozen=True)
class GraphPass:
    """A step over an `onnx_ir.Model`, in place.

    `requires` lists operators (as "domain::Op") of which at least one must be present.
    `ensures` lists operators that must be present after the pass changed anything.
    `removes` lists operators that must be gone if the pass reports no refusal. Every
    call checks all three.
    """

    name: str
    run: Callable[[ir.Model], PassResult]
    requires: frozenset[str] = field(default_factory=frozenset)
    ensures: frozenset[str] = field(default_factory=frozenset)
    removes: frozenset[str] = field(default_factory=frozenset)

    def __call__(self, model: ir.Model) -> PassResult:
        """Applies the pass and checks `requires`, `ensures` and `removes`."""
        if self.requires and not self.requires & _operators(model):
            return PassResult(
                0, (f"{self.name}: none of {', '.join(sorted(self.requires))} in the graph",)
            )
        result = self.run(model)
        after = _operators(model)
        left, lacking = self.removes & after, self.ensures - after
        assert not left or result.refused, (
            f"pass {self.name} left {sorted(left)} without saying why"
        )
        assert not lacking or not result.modified, (
            f"pass {self.name} changed {result.modified} places but made no {sorted(lacking)}"
        )
        return result


def _operators(model: ir.Model) -> set[str]:
    return {f"{node.domain}::{node.op_type}" for node in model.graph.all_nodes()}


def is_weight(value: ir.Value | None) -> bool:
    """True for an initializer of two dimensions."""
    return (
        value is not None
        and value.is_initializer()
        and value.const_value is not None
        and len(value.const_value.shape) == 2
    )


def initializer(model: ir.Model, name: str, array: object) -> ir.Value:
    """Adds a tensor to the graph under `name` and returns its value."""
    return _register(model, ir.tensor(array, name=name))  # type: ignore[arg-type]


def constant(model: ir.Model, name: str, array: NDArray[np.generic]) -> ir.Value:
    """Returns the initializer of that name, and adds it if it is missing."""
    known = model.graph.initializers
    return known[name] if name in known else initializer(model, name, array)


def insert(
    model: ir.Model,
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    *dtypes: ir.DataType,
    domain: str = "",
    full: bool = False,
    **attributes: Any,
) -> list[ir.Value]:
    """Inserts one operator before a node and returns its typed outputs. `full` keeps it
    in fp32 where a graph computes in fp16.
    """
    node = ir.node(op_type, inputs, dict(attributes), domain=domain, num_outputs=len(dtypes))
    for output, dtype in zip(node.outputs, dtypes, strict=True):
        output.type = ir.TensorType(dtype)
    if full:
        mark_full(node)
    model.graph.insert_before(before, node)
    return list(node.outputs)


def mark_full(node: ir.Node) -> None:
    """Keeps a node in fp32 where a graph computes in fp16."""
    node.meta[_FULL] = True


def graph_input(model: ir.Model, name: str) -> ir.Value:
    """Returns the graph's input of that name."""
    return next(value for value in model.graph.inputs if value.name == name)


def is_full(node: ir.Node) -> bool:
    """True for a node that stays in fp32 (see `mark_full`)."""
    return bool(node.meta.get(_FULL))


def lazy_tensor(
    name: str, make: Callable[[], NDArray[np.generic]], dtype: ir.DataType, shape: Sequence[int]
) -> ir.LazyTensor:
    """Returns a tensor that is computed each time it is read, and never kept."""
    return ir.LazyTensor(
        lambda: ir.tensor(make(), name=name), dtype=dtype, shape=ir.Shape(shape), name=name
    )


def lazy_initializer(
    model: ir.Model,
    name: str,
    make: Callable[[], NDArray[np.generic]],
    dtype: ir.DataType,
    shape: Sequence[int],
) -> ir.Value:
    """Adds an initializer whose tensor is computed when the graph is written."""
    return _register(model, lazy_tensor(name, make, dtype, shape))


def _register(model: ir.Model, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=tensor.name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    model.graph.register_initializer(value)
    return value


def replace_node(model: ir.Model, old: ir.Node, result: ir.Value) -> None:
    """Replaces a node's only output with `result`, which gets its name and shape, and
    removes the node.
    """
    before = old.outputs[0]
    result.shape, result.type, name = before.shape, before.type, before.name
    ir.convenience.replace_all_uses_with(before, result, replace_graph_outputs=True)
    model.graph.remove(old, safe=True)
    result.name = name
