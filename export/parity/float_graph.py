"""The value that a float view is: a graph in float32, with what the packed graph stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.parity.stored_weights import StoredWeight

__all__ = ["FloatView", "add_input"]


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


def add_input(
    view: FloatView, name: str, shape: Sequence[int], read: Callable[[], NDArray[np.float32]]
) -> ir.Value:
    """Adds an input that every run feeds with the result of `read`."""
    value = ir.Value(
        name=f"{name}|float", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT)
    )
    view.model.graph.inputs.append(value)
    view.feeds[f"{name}|float"] = read
    return value
