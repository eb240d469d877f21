"""Replaces newer operators with ones for which ONNX Runtime's CUDA provider has kernels
in every supported version, at opset 20.

RMSNormalization becomes SimplifiedLayerNormalization, which takes and returns half
precision and sums in fp32. The tower's Attention becomes
`com.microsoft.MultiHeadAttention` (flash attention). The image's batch dimension is
fixed at one. This removes all arithmetic on shapes, which would run on the CPU.
"""

from __future__ import annotations

import onnx_ir as ir

from export.passes.cached_attention import remove_unused
from export.passes.contract import GraphPass, PassResult, replace_node
from export.passes.plain_operators import is_bare

__all__ = ["MULTI_HEAD_ATTENTION", "ONE_PICTURE", "SIMPLIFIED_NORMS"]

_MS = "com.microsoft"


def _norms(model: ir.Model) -> PassResult:
    modified = 0
    for node in list(model.graph):
        if node.op_type == "RMSNormalization":
            attributes = {
                "axis": -1,
                "epsilon": node.attributes["epsilon"].as_float(),
                "stash_type": 1,
            }
            norm = ir.node("SimplifiedLayerNormalization", list(node.inputs), attributes)
            model.graph.insert_before(node, norm)
            replace_node(model, node, norm.outputs[0])
            modified += 1
    return PassResult(modified)


def _split(value: ir.Value | None) -> tuple[ir.Value, int]:
    """Returns the projection's output [N, T, heads*D] that was split into `value` [N,
    heads, T, D], and the number of heads. Raises `LookupError` if there is no such
    projection.
    """
    turned = value.producer() if value is not None else None
    shaped = (
        turned.inputs[0].producer()
        if turned is not None and turned.op_type == "Transpose" and turned.inputs[0] is not None
        else None
    )
    if (
        shaped is None
        or shaped.op_type != "Reshape"
        or value is None
        or value.shape is None
        or shaped.inputs[0] is None
    ):
        raise LookupError("its inputs are not projections split into heads")
    return shaped.inputs[0], int(value.shape[1])  # type: ignore[arg-type]


def _merge(attention: ir.Node) -> ir.Node:
    """Returns the node that merges the heads again. Raises `LookupError` if there is
    none.
    """
    found = attention
    for expected in ("Transpose", "Reshape"):
        users = [use.node for use in found.outputs[0].uses()]
        if len(users) != 1 or users[0].op_type != expected:
            raise LookupError(
                f"its output goes to {', '.join(user.op_type for user in users)}, expected "
                f"{expected}"
            )
        found = users[0]
    return found


def _attention(model: ir.Model) -> PassResult:
    modified, refused = 0, []
    for node in list(model.graph):
        if node.op_type != "Attention":
            continue
        if not is_bare(node):
            refused.append(f"multi_head_attention: {node.name} has a mask or a scale of its own")
            continue
        try:
            merged, projections = _merge(node), [_split(value) for value in node.inputs[:3]]
        except LookupError as error:
            refused.append(f"multi_head_attention: {node.name}: {error}")
            continue
        fused = ir.node(
            "MultiHeadAttention",
            [value for value, _ in projections],
            {"num_heads": projections[0][1]},
            domain=_MS,
        )
        model.graph.insert_before(node, fused)
        replace_node(model, merged, fused.outputs[0])
        modified += 1
    remove_unused(model.graph)
    if modified:
        model.opset_imports[_MS] = 1
    return PassResult(modified, tuple(refused))


def _one_picture(model: ir.Model) -> PassResult:
    """Fixes the batch dimension at one. The class token then precedes the patches of a
    single image and needs no repetition.
    """
    pixels, modified = model.graph.inputs[0], 0
    assert pixels.shape is not None, "captured graphs carry shapes"
    if pixels.shape[0] == 1:
        return PassResult(0)
    expands = [node for node in model.graph if node.op_type == "Expand"]
    for node in expands:
        token, result = node.inputs[0], node.outputs[0]
        if (
            token is None
            or token.shape is None
            or not token.is_initializer()
            or token.shape[0] != 1
        ):
            return PassResult(
                0, (f"one_picture: {node.name} repeats something that is not one token",)
            )
        ir.convenience.replace_all_uses_with(result, token)
        modified += 1
    batch = str(pixels.shape[0])
    for value in (
        *model.graph.inputs,
        *model.graph.outputs,
        *(output for node in model.graph for output in node.outputs),
    ):
        if value.shape is not None:
            value.shape = ir.Shape([1 if str(size) == batch else size for size in value.shape])
    remove_unused(model.graph)
    return PassResult(modified)


SIMPLIFIED_NORMS = GraphPass(
    "simplified_norms",
    _norms,
    ensures=frozenset({"::SimplifiedLayerNormalization"}),
    removes=frozenset({"::RMSNormalization"}),
)
MULTI_HEAD_ATTENTION = GraphPass(
    "multi_head_attention",
    _attention,
    ensures=frozenset({f"{_MS}::MultiHeadAttention"}),
    removes=frozenset({"::Attention"}),
)
ONE_PICTURE = GraphPass("one_picture", _one_picture, removes=frozenset({"::Expand", "::Shape"}))
