"""Gives every linear layer of the decoder at least two rows: the last row of a call is
computed twice, and the copy is discarded.

TensorRT's compiler multiplies 8-bit weights by half-precision rows inside one kernel
only for more than one row. Decoding has a single row. For that, it first writes all
weights in half precision, which is five times the traffic (docs/tensorrt.md). Attention
never sees the copy, so it still has one query, and keys and values are written once.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from export.passes.cached_attention import find_attention
from export.passes.contract import GraphPass, PassResult, constant, graph_input, insert
from export.passes.logits_to_keep import last_position
from runtime.contract.graphs import INPUTS_EMBEDS

__all__ = ["COMPANION_ROW"]

_FP32 = ir.DataType.FLOAT
_MARK = "companion.last"


def _add(model: ir.Model) -> PassResult:
    if _MARK in model.graph.initializers:
        return PassResult(0)
    matches, refused = find_attention(model, "companion_row")
    gather, reason = last_position(model, "companion_row")
    if refused or gather is None:
        return PassResult(0, tuple([*refused, *([reason] if gather is None else [])]))
    for match in matches:
        for value in dict.fromkeys((match.query, match.key, match.value)):
            _without_last(model, value)
        _with_last(model, match.output)
    _with_last(model, graph_input(model, INPUTS_EMBEDS))
    _double(model, gather)
    for node in model.graph:  # most values that had L rows now have L + 1
        for output in node.outputs:
            if output.shape is not None and len(output.shape) == 3:
                output.shape = ir.Shape([output.shape[0], None, output.shape[2]])
    return PassResult(2 * len(matches) + 2)


def _numbers(model: ir.Model, *names: str) -> list[ir.Value]:
    known = {"first": 0, "last": -1, "end": np.iinfo(np.int64).max, "rows": 1}
    return [
        constant(model, f"companion.{name}", np.array([known[name]], np.int64)) for name in names
    ]


def _without_last(model: ir.Model, value_BLH: ir.Value) -> None:
    """Removes the last row of a value for all nodes that use it."""
    uses = list(value_BLH.uses())
    (cut,) = insert(
        model, uses[0].node, "Slice", [value_BLH, *_numbers(model, "first", "last", "rows")], _FP32
    )
    cut.shape = value_BLH.shape
    for use in uses:
        use.node.replace_input_with(use.idx, cut)


def _with_last(model: ir.Model, value_BLH: ir.Value) -> None:
    """Repeats the last row of a value for all nodes that use it, except those that read
    its shape.
    """
    uses = [use for use in value_BLH.uses() if use.node.op_type != "Shape"]
    before = next(node for node in model.graph if any(use.node is node for use in uses))
    (last,) = insert(
        model, before, "Slice", [value_BLH, *_numbers(model, "last", "end", "rows")], _FP32
    )
    (both,) = insert(model, before, "Concat", [value_BLH, last], _FP32, axis=1)
    both.shape = value_BLH.shape
    for use in uses:
        use.node.replace_input_with(use.idx, both)


def _double(model: ir.Model, gather: ir.Node) -> None:
    """Lets the head compute its rows twice, and keeps the first copy."""
    row = gather.outputs[0]
    (use,) = row.uses()
    head = use.node
    (both,) = insert(model, head, "Concat", [row, row], _FP32, axis=0)
    head.replace_input_with(use.idx, both)
    logits = head.outputs[0]
    split = ir.node("Split", [logits], {"axis": 0, "num_outputs": 2}, num_outputs=2)
    model.graph.insert_after(head, split)
    assert logits.shape is not None, "captured graphs carry shapes"
    for output in split.outputs:
        output.type, output.shape = ir.TensorType(_FP32), logits.shape
    logits.shape = ir.Shape([None, logits.shape[1]])
    ir.convenience.replace_all_uses_with(logits, split.outputs[0], replace_graph_outputs=True)
    split.replace_input_with(0, logits)
    logits.name, split.outputs[0].name = f"{logits.name}.both", logits.name


COMPANION_ROW = GraphPass(
    "companion_row", _add, requires=frozenset({"::Attention"}), ensures=frozenset({"::Concat"})
)
