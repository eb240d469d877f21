"""Adds the decoder outputs that a GPU's decode loop needs: logits of chosen rows, the
most likely token of each, and a number that is finite only if all logits are.

With them, a decode step copies a token id and one number to the host instead of logits
for the whole vocabulary.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from export.passes.contract import GraphPass, PassResult, constant, insert, mark_full
from export.passes.logits_to_keep import last_position
from runtime.contract.graphs import LOGITS, LOGITS_MASS, LOGITS_ROWS, NEXT_TOKEN

__all__ = ["FIRST_TOKEN_OUTPUTS", "TOKEN_OUTPUTS"]

_FP32, _INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def _outputs(model: ir.Model, first: bool) -> PassResult:
    graph = model.graph
    if any(value.name == LOGITS_ROWS for value in graph.inputs):
        return PassResult(0)
    gather, reason = last_position(model, "token_outputs")
    if gather is None:
        return PassResult(0, (reason,))
    hidden, row = gather.inputs[0], gather.outputs[0]
    assert hidden is not None and hidden.shape is not None, "captured graphs carry shapes"
    rows = ir.Value(name=LOGITS_ROWS, shape=ir.Shape(["n"]), type=ir.TensorType(_INT64))
    sizes = np.array([-1, int(hidden.shape[2])], np.int64)  # type: ignore[arg-type]
    width = constant(model, f"{LOGITS_ROWS}.width", sizes)
    (chosen,) = insert(model, gather, "Gather", [hidden, rows], _FP32, axis=1)
    (matrix,) = insert(model, gather, "Reshape", [chosen, width], _FP32)
    ir.convenience.replace_all_uses_with(row, matrix)
    graph.remove(gather, safe=True)
    graph.inputs[:] = [*graph.inputs[:2], rows, *graph.inputs[2:]]
    logits = graph.outputs[0]
    assert logits.name == LOGITS and logits.shape is not None, "captured graphs give logits first"
    logits.shape = ir.Shape(["n", logits.shape[1]])
    graph.outputs[:] = [logits, *_summaries(model, logits, hidden, first), *graph.outputs[1:]]
    return PassResult(1)


def _summaries(
    model: ir.Model, logits: ir.Value, hidden: ir.Value, first: bool
) -> tuple[ir.Value, ir.Value]:
    """Returns `next_token` [n] int64 and `logits_mass` [n].

    The mass includes the hidden rows [B,L,H] of the whole call. 8-bit layers can turn
    non-finite values into finite ones, but the residual stream keeps them.

    With `first`, the lowest id wins among equal logits, as on the CPU, whatever order
    the engine uses for ArgMax. For this, the ids of all logits that equal the largest
    are compared. The comparison uses floats, which hold the ids exactly, because
    reductions of integers are a recent feature.
    """
    assert logits.shape is not None, "captured graphs carry shapes"
    axis = constant(model, "last_axis", np.array([-1], np.int64))

    def add(
        op_type: str, inputs: list[ir.Value], dtype: ir.DataType = _FP32, **attributes: int
    ) -> ir.Value:
        node = ir.node(op_type, inputs, dict(attributes))
        mark_full(node)
        node.outputs[0].type = ir.TensorType(dtype)
        model.graph.append(node)
        return node.outputs[0]

    if first:
        count = int(logits.shape[1])  # type: ignore[arg-type]
        ids = constant(model, "token_ids", np.arange(count, dtype=np.float32))
        beyond = constant(model, "token_ids.beyond", np.array(count, np.float32))
        equal = add(
            "Equal", [logits, add("ReduceMax", [logits, axis], keepdims=1)], ir.DataType.BOOL
        )
        lowest = add("ReduceMin", [add("Where", [equal, ids, beyond]), axis], keepdims=0)
        token = add("Cast", [lowest], _INT64, to=_INT64)
    else:
        token = add("ArgMax", [logits], _INT64, axis=-1, keepdims=0, select_last_index=0)
    everything = add(
        "ReduceSum",
        [add("Abs", [hidden]), constant(model, "all_axes", np.array([0, 1, 2], np.int64))],
        keepdims=0,
    )
    mass = add("Add", [add("ReduceSum", [add("Abs", [logits]), axis], keepdims=0), everything])
    token.name, mass.name = NEXT_TOKEN, LOGITS_MASS
    token.shape = mass.shape = ir.Shape(["n"])
    return token, mass


_REQUIRES = frozenset({"::Gather"})
FIRST_TOKEN_OUTPUTS = GraphPass(
    "first_token_outputs", partial(_outputs, first=True), _REQUIRES, frozenset({"::ReduceMin"})
)
TOKEN_OUTPUTS = GraphPass(
    "token_outputs", partial(_outputs, first=False), _REQUIRES, frozenset({"::ArgMax"})
)
