"""The pass contract: a named step over a graph that counts what it changed and says what it refused and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir

__all__ = ["GraphPass", "PassResult", "initializer", "is_weight"]


@dataclass(frozen=True)
class PassResult:
    """How many places a pass changed, and the places it declined, each with its reason."""

    modified: int
    refused: tuple[str, ...] = ()


@dataclass(frozen=True)
class GraphPass:
    """A step over an `onnx_ir.Model`, in place.

    `requires` are operators (as "domain::Op") of which one at least must be present; `removes` are operators that may not be left
    when it reports no refusal. Both are checked around the call.
    """

    name: str
    run: Callable[[ir.Model], PassResult]
    requires: frozenset[str] = field(default_factory=frozenset)
    removes: frozenset[str] = field(default_factory=frozenset)

    def __call__(self, model: ir.Model) -> PassResult:
        """Applies the pass and checks its promises."""
        if self.requires and not self.requires & _operators(model):
            return PassResult(0, (f"{self.name}: none of {', '.join(sorted(self.requires))} in the graph",))
        result = self.run(model)
        left = self.removes & _operators(model)
        assert not left or result.refused, f"pass {self.name} left {sorted(left)} without saying why"
        return result


def _operators(model: ir.Model) -> set[str]:
    return {f"{node.domain}::{node.op_type}" for node in model.graph.all_nodes()}


def is_weight(value: ir.Value | None) -> bool:
    """True for an initializer of two dimensions."""
    return value is not None and value.is_initializer() and value.const_value is not None and len(value.const_value.shape) == 2


def initializer(model: ir.Model, name: str, array: object) -> ir.Value:
    """Adds a tensor to the graph under `name` and returns its value."""
    tensor = ir.tensor(array, name=name)  # type: ignore[arg-type]
    value = ir.Value(name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value
