"""Finds cached attention in the canonical decoder graph, for the passes that replace
it.

In each layer it has the form Attention(RotaryEmbedding(q), ScatterElements(cache, rows,
RotaryEmbedding(k)), ScatterElements(cache, rows, v), mask).
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

__all__ = ["CachedAttention", "find_attention", "remove_unused", "take_over"]


@dataclass(frozen=True)
class CachedAttention:
    """The attention of one layer. `query`, `key` and `value` [B,L,heads*D] are the
    projections' outputs. Caches and updated caches are [B,KV,C,D], and `output` is
    [B,L,heads*D].

    `tables` are cos and sin of every position [C,D/2].
    """

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

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self._cache_shape()[1]

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self._cache_shape()[0]

    @property
    def heads(self) -> int:
        """Number of query heads."""
        assert self.query.shape is not None, "captured graphs carry shapes"
        return int(self.query.shape[2]) // self.head_dim  # type: ignore[arg-type]

    def _cache_shape(self) -> tuple[int, int]:
        assert self.key_cache.shape is not None, "captured graphs carry shapes"
        return int(self.key_cache.shape[1]), int(self.key_cache.shape[3])  # type: ignore[arg-type]


def find_attention(model: ir.Model, step: str) -> tuple[list[CachedAttention], list[str]]:
    """Returns all cached attention of a graph, and the reasons why other Attention
    nodes do not match. The reasons name the pass `step`.
    """
    found, refused = [], []
    for node in list(model.graph):
        if node.op_type == "Attention":
            try:
                found.append(_match(node))
            except LookupError as error:
                refused.append(f"{step}: {node.name}: {error}")
    return found, refused


def _producer(value: ir.Value | None, op_type: str) -> ir.Node:
    node = value.producer() if value is not None else None
    if node is None or node.op_type != op_type:
        raise LookupError(f"expected {op_type}, found {node.op_type if node else 'an input'}")
    return node


def _before_heads(value: ir.Value | None) -> ir.Value:
    """Returns the projection's output [B, L, heads*D] that was split into `value` [B,
    heads, L, D].
    """
    merged = _producer(_producer(value, "Transpose").inputs[0], "Reshape").inputs[0]
    assert merged is not None, "Reshape has an input"
    return merged


def _match(attention: ir.Node) -> CachedAttention:
    query_rotary = _producer(attention.inputs[0], "RotaryEmbedding")
    key_scatter, value_scatter = (
        _producer(attention.inputs[1], "ScatterElements"),
        _producer(attention.inputs[2], "ScatterElements"),
    )
    key_rotary = _producer(key_scatter.inputs[2], "RotaryEmbedding")
    transpose = next(iter(attention.outputs[0].uses())).node
    reshape = next(iter(transpose.outputs[0].uses())).node
    if (transpose.op_type, reshape.op_type) != ("Transpose", "Reshape"):
        raise LookupError(
            f"output goes to {transpose.op_type} and {reshape.op_type}, expected Transpose and "
            f"Reshape"
        )
    cos, sin = query_rotary.inputs[1], query_rotary.inputs[2]
    key_cache, value_cache = key_scatter.inputs[0], value_scatter.inputs[0]
    assert (
        cos is not None and sin is not None and key_cache is not None and value_cache is not None
    ), "operators have all inputs"
    return CachedAttention(
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


def take_over(
    match: CachedAttention, output: ir.Value, key_out: ir.Value, value_out: ir.Value
) -> None:
    """Replaces a layer's output and updated caches with new values, which get their
    names.
    """
    for old, new in zip(
        (match.output, match.key_out, match.value_out), (output, key_out, value_out), strict=True
    ):
        new.shape, new.type, name = new.shape or old.shape, old.type, old.name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name, new.name = f"{name}.replaced", name


def remove_unused(graph: ir.Graph) -> None:
    """Removes nodes whose outputs are unused."""
    outputs = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(output.uses() or output in outputs for output in node.outputs):
            graph.remove(node, safe=True)
