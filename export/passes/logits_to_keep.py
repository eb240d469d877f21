"""Lets the caller choose how many of the last positions get logits: one for usual
decoding, several when drafted tokens are verified together.

The captured decoder selects the last position in front of its head. This pass selects
the last n positions as rows of one matrix, where n is a graph input. For n = 1 the head
computes the same as before.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.passes.contract import GraphPass, PassResult, initializer
from runtime.contract.graphs import LOGITS_TO_KEEP, TOTAL_LENGTH

__all__ = ["KEEP_LOGITS", "last_position"]

_LAST = -1
_END = np.iinfo(np.int64).max


def _takes_last_position(node: ir.Node) -> bool:
    """True for Gather(x [B,L,H], -1, axis=1)."""
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 1:
        return False
    index = node.inputs[1].const_value if node.inputs[1] is not None else None
    return index is not None and index.shape.numpy() == () and int(index.numpy()) == _LAST


def last_position(model: ir.Model, step: str) -> tuple[ir.Node | None, str]:
    """Returns the node that selects the last position in front of the head. If there is
    not exactly one, returns None and the reason, which names the pass `step`.
    """
    found = [node for node in model.graph if _takes_last_position(node)]
    return (
        (found[0], "")
        if len(found) == 1
        else (None, f"{step}: {len(found)} nodes take the last position, expected 1")
    )


def _keep(model: ir.Model) -> PassResult:
    graph = model.graph
    if any(value.name == LOGITS_TO_KEEP for value in graph.inputs):
        return PassResult(0)
    gather, reason = last_position(model, "logits_to_keep")
    if gather is None:
        return PassResult(0, (reason,))
    hidden, row = gather.inputs[0], gather.outputs[0]
    assert hidden is not None and hidden.shape is not None and row.shape is not None, (
        "captured graphs carry shapes"
    )
    count = ir.Value(
        name=LOGITS_TO_KEEP, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64)
    )
    width = int(hidden.shape[2])  # type: ignore[arg-type]
    ends, axes, rows = (
        initializer(model, f"{LOGITS_TO_KEEP}.{name}", np.array(values, np.int64))
        for name, values in (("ends", [_END]), ("axes", [1]), ("rows", [-1, width]))
    )
    starts = ir.node("Neg", [count])
    cut = ir.node("Slice", [hidden, starts.outputs[0], ends, axes])
    matrix = ir.node("Reshape", [cut.outputs[0], rows])
    for node, shape in (
        (starts, [1]),
        (cut, [hidden.shape[0], None, hidden.shape[2]]),
        (matrix, [None, hidden.shape[2]]),
    ):
        graph.insert_before(gather, node)
        node.outputs[0].shape, node.outputs[0].type = (
            ir.Shape(shape),
            row.type if node is not starts else count.type,
        )
    ir.convenience.replace_all_uses_with(row, matrix.outputs[0])
    graph.remove(gather, safe=True)
    place = next((i + 1 for i, value in enumerate(graph.inputs) if value.name == TOTAL_LENGTH), 1)
    graph.inputs[:] = [*graph.inputs[:place], count, *graph.inputs[place:]]
    for output in graph.outputs[:1]:
        output.shape = ir.Shape([None, output.shape[1]])  # type: ignore[index]
    return PassResult(1)


KEEP_LOGITS = GraphPass(
    "logits_to_keep", _keep, requires=frozenset({"::Gather"}), ensures=frozenset({"::Slice"})
)
