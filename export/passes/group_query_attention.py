"""Lowers cached attention to `com.microsoft.GroupQueryAttention`, ONNX Runtime's fused rotary + cache update + attention.

Canonical form per layer: Attention(RotaryEmbedding(q), ScatterElements(cache, rows, RotaryEmbedding(k)), ScatterElements(cache, rows, v), mask).
The fused operator writes new rows into the cache buffer it is given, so binding one buffer as input and output updates it in place. Row counts
replace positions as inputs: `seqlens_k` (rows filled after this call, minus one) and `total_sequence_length`.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from export.passes.contract import GraphPass, PassResult
from runtime.contract.spec import POSITION_IDS, SEQLENS_K, TOTAL_LENGTH

__all__ = ["GROUP_QUERY_ATTENTION"]


@dataclass(frozen=True)
class _Match:
    attention: ir.Node
    query: ir.Value
    key: ir.Value
    value: ir.Value
    key_cache: ir.Value
    value_cache: ir.Value
    key_out: ir.Value
    value_out: ir.Value
    tables: tuple[ir.Value, ir.Value]
    output: ir.Value


def _producer(value: ir.Value | None, op_type: str) -> ir.Node:
    node = value.producer() if value is not None else None
    if node is None or node.op_type != op_type:
        raise LookupError(f"expected {op_type}, found {node.op_type if node else 'an input'}")
    return node


def _before_heads(value: ir.Value | None) -> ir.Value:
    """From [B, heads, L, D] back to the projection's output [B, L, heads*D]."""
    merged = _producer(_producer(value, "Transpose").inputs[0], "Reshape").inputs[0]
    assert merged is not None, "Reshape has an input"
    return merged


def _match(attention: ir.Node) -> _Match:
    query_rotary = _producer(attention.inputs[0], "RotaryEmbedding")
    key_scatter, value_scatter = _producer(attention.inputs[1], "ScatterElements"), _producer(attention.inputs[2], "ScatterElements")
    key_rotary = _producer(key_scatter.inputs[2], "RotaryEmbedding")
    transpose = next(iter(attention.outputs[0].uses())).node
    reshape = next(iter(transpose.outputs[0].uses())).node
    if (transpose.op_type, reshape.op_type) != ("Transpose", "Reshape"):
        raise LookupError(f"output goes to {transpose.op_type} and {reshape.op_type}, expected Transpose and Reshape")
    cos, sin = query_rotary.inputs[1], query_rotary.inputs[2]
    key_cache, value_cache = key_scatter.inputs[0], value_scatter.inputs[0]
    assert cos is not None and sin is not None and key_cache is not None and value_cache is not None, "operators have all inputs"
    return _Match(
        attention,
        _before_heads(query_rotary.inputs[0]),
        _before_heads(key_rotary.inputs[0]),
        _before_heads(value_scatter.inputs[2]),
        key_cache,
        value_cache,
        key_scatter.outputs[0],
        value_scatter.outputs[0],
        (cos, sin),
        reshape.outputs[0],
    )


def _heads(cache: ir.Value, width: ir.Value) -> tuple[int, int]:
    """(heads of `width`, heads of the cache)."""
    assert cache.shape is not None and width.shape is not None, "captured graphs carry shapes"
    head_dim = int(cache.shape[3])  # type: ignore[arg-type]
    return int(width.shape[2]) // head_dim, int(cache.shape[1])  # type: ignore[arg-type]


def _replace(model: ir.Model, match: _Match, seqlens: ir.Value, total: ir.Value) -> None:
    heads, kv_heads = _heads(match.key_cache, match.query)
    fused = ir.Node(
        "com.microsoft",
        "GroupQueryAttention",
        inputs=[match.query, match.key, match.value, match.key_cache, match.value_cache, seqlens, total, *match.tables],
        attributes=[ir.AttrInt64("num_heads", heads), ir.AttrInt64("kv_num_heads", kv_heads), ir.AttrInt64("do_rotary", 1)],
        num_outputs=3,
        name=f"{match.key_cache.name}.attention",
    )
    model.graph.insert_before(match.attention, fused)
    for old, new in zip((match.output, match.key_out, match.value_out), fused.outputs, strict=True):
        new.shape, new.type, name = old.shape, old.type, old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name, new.name = f"{name}.replaced", name


def _lower(model: ir.Model) -> PassResult:
    matches, refused = [], []
    for node in list(model.graph):
        if node.op_type != "Attention":
            continue
        try:
            matches.append(_match(node))
        except LookupError as error:
            refused.append(f"group_query_attention: {node.name}: {error}")
    if not matches or refused:
        return PassResult(0, tuple(refused))
    graph = model.graph
    batch = graph.inputs[0].shape[0]  # type: ignore[index]
    seqlens = ir.Value(name=SEQLENS_K, shape=ir.Shape([batch]), type=ir.TensorType(ir.DataType.INT32))
    total = ir.Value(name=TOTAL_LENGTH, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT32))
    for match in matches:
        _replace(model, match, seqlens, total)
    _remove_unused(graph)
    kept = [value for value in graph.inputs if value.name != POSITION_IDS]
    graph.inputs[:] = [kept[0], seqlens, total, *kept[1:]]
    model.opset_imports["com.microsoft"] = 1
    return PassResult(len(matches))


def _remove_unused(graph: ir.Graph) -> None:
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(output.uses() or output in outputs for output in node.outputs):
            graph.remove(node, safe=True)


GROUP_QUERY_ATTENTION = GraphPass(
    "group_query_attention",
    _lower,
    requires=frozenset({"::Attention"}),
    ensures=frozenset({"com.microsoft::GroupQueryAttention"}),
    removes=frozenset({"::Attention", "::RotaryEmbedding", "::ScatterElements"}),
)
