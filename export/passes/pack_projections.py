"""Merges the decoder's layers that share an input into one product: queries, keys and
values, and the two halves of the gated MLP.

A decode step has many small products, and each of them wakes the threads and rounds its
input. Packing leaves four products in a layer instead of seven. The columns of a packed
weight are those of its parts, so the results stay the same. Packed queries, keys and
values go directly into the attention operator.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.linear import LinearScheme
from export.passes.contract import GraphPass, PassResult, initializer, is_weight, lazy_initializer

__all__ = ["PACKED", "pack_projections", "parts_of"]

PACKED = "+"
"""Separates the parameters' names in the name of a packed weight."""

_ATTENTION = "GroupQueryAttention"


def parts_of(name: str) -> list[str]:
    """Returns the names of the parameters that a weight is made of."""
    return name.split(PACKED)


def pack_projections(scheme_of: Callable[[str], LinearScheme]) -> GraphPass:
    """Returns the pass that packs products of one input whose weights have the same
    scheme.
    """

    def run(model: ir.Model) -> PassResult:
        groups: dict[tuple[ir.Value, LinearScheme], list[ir.Node]] = defaultdict(list)
        for node in model.graph:
            if (
                node.op_type == "MatMul"
                and is_weight(node.inputs[1])
                and PACKED not in str(node.inputs[1].name)  # type: ignore[union-attr]
            ):
                assert (
                    node.inputs[0] is not None
                    and node.inputs[1] is not None
                    and node.inputs[1].name is not None
                )
                groups[node.inputs[0], scheme_of(node.inputs[1].name)].append(node)
        modified, refused = 0, []
        for nodes in groups.values():
            users = [use.node for node in nodes for use in node.outputs[0].uses()]
            attention = next((user for user in users if user.op_type == _ATTENTION), None)
            if attention is not None:
                wanted = [value for value in attention.inputs[:3] if value is not None]
                if wanted != [node.outputs[0] for node in nodes] or len(users) != 3:
                    refused.append(
                        f"pack_projections: {nodes[0].inputs[1].name}: "  # type: ignore[union-attr]
                        "queries, keys and values go different ways"
                    )
                    continue
            elif len(nodes) < 2:
                continue
            _pack(model, nodes, attention)
            modified += 1
        return PassResult(modified, tuple(refused))

    return GraphPass("pack_projections", run)


def _pack(model: ir.Model, nodes: Sequence[ir.Node], attention: ir.Node | None) -> None:
    weights = [node.inputs[1] for node in nodes]
    names = [str(weight.name) for weight in weights if weight]
    tensors = [
        weight.const_value for weight in weights if weight and weight.const_value is not None
    ]
    shapes = [tensor.shape.numpy() for tensor in tensors]
    widths = [int(shape[1]) for shape in shapes]
    packed = lazy_initializer(
        model,
        PACKED.join(names),
        partial(_join, tensors),
        ir.DataType.FLOAT,
        (int(shapes[0][0]), sum(widths)),
    )
    product = ir.node("MatMul", [nodes[0].inputs[0], packed])
    result, first = product.outputs[0], nodes[0].outputs[0]
    result.type = ir.TensorType(ir.DataType.FLOAT)
    if first.shape is not None:
        result.shape = ir.Shape([*first.shape[:-1], sum(widths)])
    model.graph.insert_before(nodes[0], product)
    if attention is not None:
        for place, value in enumerate((result, None, None)):
            attention.replace_input_with(place, value)
    else:
        sizes = initializer(model, f"{packed.name}.sizes", np.array(widths, np.int64))
        split = ir.node("Split", [result, sizes], {"axis": -1}, num_outputs=len(nodes))
        model.graph.insert_before(nodes[0], split)
        for node, output in zip(nodes, split.outputs, strict=True):
            output.type, output.shape = node.outputs[0].type, node.outputs[0].shape
            ir.convenience.replace_all_uses_with(node.outputs[0], output)
    for node, name in zip(nodes, names, strict=True):
        model.graph.remove(node, safe=True)
        del model.graph.initializers[name]


def _join(tensors: Sequence[ir.TensorProtocol]) -> NDArray[np.float32]:
    return np.concatenate([tensor.numpy() for tensor in tensors], axis=1)
