"""Lowers cached attention to `com.microsoft.GroupQueryAttention`, ONNX Runtime's fused
rotary + cache update + attention.

The fused operator writes new rows into the cache buffer it is given, so binding one
buffer as input and output updates it in place. Row counts replace positions as inputs:
`seqlens_k` (rows filled after this call, minus one) and `total_sequence_length`.
"""

from __future__ import annotations

import onnx_ir as ir

from export.passes.cached_attention import CachedAttention, find_attention, remove_unused, take_over
from export.passes.contract import GraphPass, PassResult
from runtime.contract.graphs import POSITION_IDS, SEQLENS_K, TOTAL_LENGTH

__all__ = ["GROUP_QUERY_ATTENTION"]


def _replace(model: ir.Model, match: CachedAttention, seqlens: ir.Value, total: ir.Value) -> None:
    fused = ir.Node(
        "com.microsoft",
        "GroupQueryAttention",
        inputs=[
            match.query,
            match.key,
            match.value,
            match.key_cache,
            match.value_cache,
            seqlens,
            total,
            *match.tables,
        ],
        attributes=[
            ir.AttrInt64("num_heads", match.heads),
            ir.AttrInt64("kv_num_heads", match.kv_heads),
            ir.AttrInt64("do_rotary", 1),
        ],
        num_outputs=3,
        name=f"{match.key_cache.name}.attention",
    )
    model.graph.insert_before(match.attention, fused)
    take_over(match, *fused.outputs)


def _lower(model: ir.Model) -> PassResult:
    matches, refused = find_attention(model, "group_query_attention")
    if not matches or refused:
        return PassResult(0, tuple(refused))
    graph = model.graph
    batch = graph.inputs[0].shape[0]  # type: ignore[index]
    seqlens = ir.Value(
        name=SEQLENS_K, shape=ir.Shape([batch]), type=ir.TensorType(ir.DataType.INT32)
    )
    total = ir.Value(name=TOTAL_LENGTH, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT32))
    for match in matches:
        _replace(model, match, seqlens, total)
    remove_unused(graph)
    kept = [value for value in graph.inputs if value.name != POSITION_IDS]
    graph.inputs[:] = [kept[0], seqlens, total, *kept[1:]]
    model.opset_imports["com.microsoft"] = 1
    return PassResult(len(matches))


GROUP_QUERY_ATTENTION = GraphPass(
    "group_query_attention",
    _lower,
    requires=frozenset({"::Attention"}),
    ensures=frozenset({"com.microsoft::GroupQueryAttention"}),
    removes=frozenset({"::Attention", "::RotaryEmbedding", "::ScatterElements"}),
)
