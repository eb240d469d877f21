"""Lowers cached attention for TensorRT, in two forms that use the same weights.

Plain: standard operators that every TensorRT from 10.3 on parses. Caches are inputs
only. The rows of a call are returned as `present.*` [B,KV,L,D], and the engine writes
them into the caches. Scores over the cache and over the call's own rows are computed
separately, so no cache is ever copied.

Fused: TensorScatter (IKVCacheUpdateLayer: the output is the cache's own memory) and a
single-output Attention, for versions that have them. The caches have a fixed length.

Both forms apply rotary angles and the scale in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from export.passes.cached_attention import CachedAttention, find_attention, remove_unused, take_over
from export.passes.contract import GraphPass, PassResult, constant, graph_input, insert
from export.passes.plain_operators import attended
from runtime.contract.graphs import INPUTS_EMBEDS, POSITION_IDS

__all__ = ["FUSED_CACHE", "PLAIN_CACHE", "fixed_capacity"]

_FP32, _INT64, _BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
Shared = dict[str, ir.Value]


def _ints(model: ir.Model, *values: int) -> ir.Value:
    return constant(model, "ints." + ".".join(map(str, values)), np.array(values, np.int64))


def _heads(model: ir.Model, node: ir.Node, x_BLE: ir.Value, heads: int, head_dim: int) -> ir.Value:
    """Reshapes [B,L,heads*D] to [B,heads,L,D]."""
    (split,) = insert(model, node, "Reshape", [x_BLE, _ints(model, 0, 0, heads, head_dim)], _FP32)
    (turned,) = insert(model, node, "Transpose", [split], _FP32, perm=[0, 2, 1, 3])
    return turned


def _rotate(
    model: ir.Model,
    match: CachedAttention,
    x_BHLD: ir.Value,
    shared: Shared,
    scale: float | None = None,
) -> ir.Value:
    """Applies rotary positions in LLaMA's half-split layout (and a scale, if given), in
    fp32.
    """
    node, half = match.attention, match.head_dim // 2
    for name, table in zip(("cos", "sin"), match.tables, strict=True):
        if name not in shared:
            (rows,) = insert(
                model,
                node,
                "Gather",
                [table, graph_input(model, POSITION_IDS)],
                _FP32,
                full=True,
                axis=0,
            )
            (shared[name],) = insert(
                model, node, "Unsqueeze", [rows, _ints(model, 1)], _FP32, full=True
            )
    cos, sin = shared["cos"], shared["sin"]
    first, second = insert(
        model, node, "Split", [x_BHLD, _ints(model, half, half)], _FP32, _FP32, full=True, axis=-1
    )

    def times(a: ir.Value, b: ir.Value) -> ir.Value:
        return insert(model, node, "Mul", [a, b], _FP32, full=True)[0]

    (left,) = insert(model, node, "Sub", [times(first, cos), times(second, sin)], _FP32, full=True)
    (right,) = insert(model, node, "Add", [times(second, cos), times(first, sin)], _FP32, full=True)
    (turned,) = insert(model, node, "Concat", [left, right], _FP32, full=True, axis=-1)
    return (
        turned
        if scale is None
        else times(turned, constant(model, "attention.scale", np.array(scale, np.float32)))
    )


def _positions(model: ir.Model, node: ir.Node, shared: Shared) -> None:
    """Adds two values to `shared`: `query` [B,1,L,1], the positions of this call, and
    `start` [B,1], the first of them.
    """
    if "query" in shared:
        return
    positions = graph_input(model, POSITION_IDS)
    (shared["query"],) = insert(model, node, "Unsqueeze", [positions, _ints(model, 1, 3)], _INT64)
    (shared["start"],) = insert(
        model, node, "Slice", [positions, _ints(model, 0), _ints(model, 1), _ints(model, 1)], _INT64
    )


def _row_numbers(model: ir.Model, match: CachedAttention, shared: Shared) -> ir.Value:
    """Returns the row numbers 0 to C-1 as [1,1,1,C]."""
    node = match.attention
    (shape,) = insert(model, node, "Shape", [match.key_cache], _INT64, start=2, end=3)
    (capacity,) = insert(model, node, "Squeeze", [shape], _INT64)
    (rows,) = insert(
        model,
        node,
        "Range",
        [
            constant(model, "zero", np.array(0, np.int64)),
            capacity,
            constant(model, "one", np.array(1)),
        ],
        _INT64,
    )
    (shaped,) = insert(model, node, "Reshape", [rows, _ints(model, 1, 1, 1, -1)], _INT64)
    return shaped


def _plain_mask(model: ir.Model, match: CachedAttention, shared: Shared) -> ir.Value:
    """Returns a mask [B,1,L,C+L] that is True where a query sees a key. A query sees
    the cache rows before this call's first row, and this call's rows up to its own.
    """
    node = match.attention
    if "mask" not in shared:
        _positions(model, node, shared)
        rows = _row_numbers(model, match, shared)
        (start,) = insert(model, node, "Unsqueeze", [shared["start"], _ints(model, 1, 2)], _INT64)
        (filled,) = insert(model, node, "Less", [rows, start], _BOOL)
        (cached,) = insert(
            model,
            node,
            "Where",
            [filled, rows, constant(model, "never", np.array(1 << 30, np.int64))],
            _INT64,
        )
        (own,) = insert(
            model, node, "Unsqueeze", [graph_input(model, POSITION_IDS), _ints(model, 1, 2)], _INT64
        )
        (keys,) = insert(model, node, "Concat", [cached, own], _INT64, axis=-1)
        (shared["mask"],) = insert(model, node, "LessOrEqual", [keys, shared["query"]], _BOOL)
    return shared["mask"]


def _fused_mask(model: ir.Model, match: CachedAttention, shared: Shared) -> ir.Value:
    """Returns a mask [B,1,L,C] that is True for cache rows up to the query's own."""
    if "mask" not in shared:
        _positions(model, match.attention, shared)
        rows = _row_numbers(model, match, shared)
        (shared["mask"],) = insert(
            model, match.attention, "LessOrEqual", [rows, shared["query"]], _BOOL
        )
    return shared["mask"]


def _plain(model: ir.Model, match: CachedAttention, shared: Shared) -> None:
    """Replaces attention with the plain form. Query heads that share keys are columns
    of one product, so keys and values are never repeated and are read in the cache's
    layout.
    """
    node, kv, dim = match.attention, match.kv_heads, match.head_dim
    _plain_shapes(model, match, shared)
    query = _rotate(
        model, match, _heads(model, node, match.query, match.heads, dim), shared, dim**-0.5
    )
    key = _rotate(model, match, _heads(model, node, match.key, kv, dim), shared)
    value = _heads(model, node, match.value, kv, dim)
    (grouped,) = insert(model, node, "Reshape", [query, _ints(model, 0, kv, -1, dim)], _FP32)
    (columns,) = insert(model, node, "Transpose", [grouped], _FP32, perm=[0, 1, 3, 2])

    def scores(keys: ir.Value) -> ir.Value:
        (product,) = insert(model, node, "MatMul", [keys, columns], _FP32)
        return insert(model, node, "Transpose", [product], _FP32, perm=[0, 1, 3, 2])[0]

    (both,) = insert(model, node, "Concat", [scores(match.key_cache), scores(key)], _FP32, axis=-1)
    (by_head,) = insert(model, node, "Reshape", [both, shared["heads, rows, keys"]], _FP32)
    weights = attended(model, node, by_head, _plain_mask(model, match, shared))
    (weights,) = insert(model, node, "Reshape", [weights, shared["groups, keys"]], _FP32)

    def product(start: ir.Value, end: ir.Value, values: ir.Value) -> ir.Value:
        (part,) = insert(model, node, "Slice", [weights, start, end, _ints(model, 3)], _FP32)
        return insert(model, node, "MatMul", [part, values], _FP32)[0]

    seen = product(_ints(model, 0), shared["capacity"], match.value_cache)
    own = product(shared["capacity"], _ints(model, np.iinfo(np.int64).max), value)
    (total,) = insert(model, node, "Add", [seen, own], _FP32)
    (split,) = insert(model, node, "Reshape", [total, shared["heads, rows, width"]], _FP32)
    _merge(model, match, split, key, value)


def _plain_shapes(model: ir.Model, match: CachedAttention, shared: Shared) -> None:
    """Adds the shapes for reshaping tensors to `shared`, once for all layers. C and L
    are known only when the graph runs.
    """
    if "capacity" in shared:
        return
    node, heads = match.attention, match.heads
    (capacity,) = insert(model, node, "Shape", [match.key_cache], _INT64, start=2, end=3)
    (length,) = insert(
        model, node, "Shape", [graph_input(model, POSITION_IDS)], _INT64, start=1, end=2
    )
    (keys,) = insert(model, node, "Add", [capacity, length], _INT64)

    def shape(*parts: ir.Value) -> ir.Value:
        return insert(model, node, "Concat", parts, _INT64, axis=0)[0]

    shared |= {
        "capacity": capacity,
        "heads, rows, keys": shape(_ints(model, 0, heads), length, keys),
        "groups, keys": shape(_ints(model, 0, match.kv_heads, -1), keys),
        "heads, rows, width": shape(_ints(model, 0, heads), length, _ints(model, match.head_dim)),
    }


def _merge(
    model: ir.Model, match: CachedAttention, attended_BHLD: ir.Value, key: ir.Value, value: ir.Value
) -> None:
    """Merges [B,heads,L,D] to [B,L,heads*D] and replaces the old output. `key` and
    `value` become the graph's outputs.
    """
    (turned,) = insert(
        model, match.attention, "Transpose", [attended_BHLD], _FP32, perm=[0, 2, 1, 3]
    )
    (merged,) = insert(
        model,
        match.attention,
        "Reshape",
        [turned, _ints(model, 0, 0, match.heads * match.head_dim)],
        _FP32,
    )
    take_over(match, merged, key, value)


def _fuse(model: ir.Model, match: CachedAttention, shared: Shared) -> None:
    node, dim = match.attention, match.head_dim
    query = _rotate(
        model, match, _heads(model, node, match.query, match.heads, dim), shared, dim**-0.5
    )
    key = _rotate(model, match, _heads(model, node, match.key, match.kv_heads, dim), shared)
    value = _heads(model, node, match.value, match.kv_heads, dim)
    mask = _fused_mask(model, match, shared)
    if "write" not in shared:
        (shared["write"],) = insert(
            model, node, "Reshape", [shared["start"], _ints(model, -1)], _INT64
        )
    (keys,) = insert(
        model, node, "TensorScatter", [match.key_cache, key, shared["write"]], _FP32, axis=2
    )
    (values,) = insert(
        model, node, "TensorScatter", [match.value_cache, value, shared["write"]], _FP32, axis=2
    )
    (found,) = insert(model, node, "Attention", [query, keys, values, mask], _FP32, scale=1.0)
    _merge(model, match, found, keys, values)


def _lower(
    model: ir.Model, name: str, replace: Callable[[ir.Model, CachedAttention, Shared], None]
) -> PassResult:
    if any(node.op_type == "TensorScatter" for node in model.graph):
        return PassResult(0)
    matches, refused = find_attention(model, name)
    if not matches or refused:
        return PassResult(0, tuple(refused))
    shared: Shared = {}
    for match in matches:
        replace(model, match, shared)
    remove_unused(model.graph)
    return PassResult(len(matches))


def _lower_plain(model: ir.Model) -> PassResult:
    result = _lower(model, "plain_cache", _plain)
    if not result.modified:
        return result
    length = graph_input(model, INPUTS_EMBEDS).shape[1]  # type: ignore[index]
    for value in model.graph.outputs:
        if value.shape is not None and len(value.shape) == 4:
            value.shape = ir.Shape([value.shape[0], value.shape[1], length, value.shape[3]])
    return result


def _lower_fused(model: ir.Model) -> PassResult:
    return _lower(model, "fused_cache", _fuse)


def fixed_capacity(rows: int) -> GraphPass:
    """Returns the pass that gives caches a fixed length, which TensorRT's cache update
    layer requires.
    """

    def run(model: ir.Model) -> PassResult:
        found = [
            value
            for value in (*model.graph.inputs, *model.graph.outputs)
            if value.shape is not None and len(value.shape) == 4
        ]
        for value in found:
            assert value.shape is not None, "chosen above"
            value.shape = ir.Shape([*value.shape[:2], rows, value.shape[3]])
        return PassResult(len(found))

    return GraphPass("fixed_capacity", run)


_REMOVED = frozenset({"::RotaryEmbedding", "::ScatterElements"})
PLAIN_CACHE = GraphPass(
    "plain_cache", _lower_plain, frozenset({"::Attention"}), removes=_REMOVED | {"::Attention"}
)
FUSED_CACHE = GraphPass(
    "fused_cache",
    _lower_fused,
    frozenset({"::Attention"}),
    frozenset({"::TensorScatter"}),
    _REMOVED,
)
