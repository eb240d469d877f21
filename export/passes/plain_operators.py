"""Replaces operators that older engines lack or fuse wrongly with equivalent plain
operators: RMSNormalization, Gelu, the tower's Attention.

TensorRT 10.3 (JetPack 6.2) parses neither RMSNormalization nor Attention. Sums of norms
and softmax stay in fp32.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from export.passes.contract import GraphPass, PassResult, constant, insert, replace_node

__all__ = ["PLAIN_ATTENTION", "PLAIN_GELU", "PLAIN_NORMS", "attended", "is_bare"]

_FP32 = ir.DataType.FLOAT
_LAST = np.array([-1], np.int64)


def _norms(model: ir.Model) -> PassResult:
    """Replaces RMSNormalization with x / sqrt(mean(x^2) + epsilon) * weight."""
    modified = 0
    for node in list(model.graph):
        if node.op_type != "RMSNormalization":
            continue
        x, weight = node.inputs[0], node.inputs[1]
        epsilon = constant(
            model,
            f"epsilon.{node.attributes['epsilon'].as_float():g}",
            np.array(node.attributes["epsilon"].as_float(), np.float32),
        )
        (square,) = insert(model, node, "Mul", [x, x], _FP32, full=True)
        (mean,) = insert(
            model,
            node,
            "ReduceMean",
            [square, constant(model, "last_axis", _LAST)],
            _FP32,
            full=True,
            keepdims=1,
        )
        (shifted,) = insert(model, node, "Add", [mean, epsilon], _FP32, full=True)
        (root,) = insert(model, node, "Sqrt", [shifted], _FP32, full=True)
        (ratio,) = insert(model, node, "Div", [x, root], _FP32, full=True)
        (scaled,) = insert(model, node, "Mul", [ratio, weight], _FP32, full=True)
        replace_node(model, node, scaled)
        modified += 1
    return PassResult(modified)


def _gelu(model: ir.Model) -> PassResult:
    """Replaces the exact Gelu with x/2 * (1 + erf(x / sqrt 2))."""
    modified, refused = 0, []
    for node in list(model.graph):
        if node.op_type != "Gelu":
            continue
        if node.attributes.get_string("approximate", "none") != "none":
            refused.append(f"plain_gelu: {node.name} is approximate")
            continue
        x = node.inputs[0]
        (ratio,) = insert(
            model,
            node,
            "Mul",
            [x, constant(model, "gelu.root", np.array(math.sqrt(0.5), np.float32))],
            _FP32,
            full=True,
        )
        (error,) = insert(model, node, "Erf", [ratio], _FP32, full=True)
        (shifted,) = insert(
            model,
            node,
            "Add",
            [error, constant(model, "gelu.one", np.array(1, np.float32))],
            _FP32,
            full=True,
        )
        (halved,) = insert(
            model,
            node,
            "Mul",
            [x, constant(model, "gelu.half", np.array(0.5, np.float32))],
            _FP32,
            full=True,
        )
        (product,) = insert(model, node, "Mul", [halved, shifted], _FP32, full=True)
        replace_node(model, node, product)
        modified += 1
    return PassResult(modified, tuple(refused))


def attended(model: ir.Model, node: ir.Node, scores: ir.Value, mask: ir.Value | None) -> ir.Value:
    """Inserts a softmax of scores over the last axis in fp32 in front of `node`, and
    returns its output. Only entries where `mask` is True count.
    """
    if mask is not None:
        (scores,) = insert(
            model,
            node,
            "Where",
            [mask, scores, constant(model, "masked", np.array(-1e9, np.float32))],
            _FP32,
            full=True,
        )
    (found,) = insert(model, node, "Softmax", [scores], _FP32, axis=-1)
    return found


def is_bare(attention: ir.Node) -> bool:
    """True for Attention(q, k, v) without a mask and with the usual scale, as in the
    tower.
    """
    given = [value for value in attention.inputs if value is not None]
    return (
        len(given) == 3
        and not attention.attributes.get_int("is_causal", False)
        and "scale" not in attention.attributes
    )


def _attention(model: ir.Model) -> PassResult:
    """Replaces Attention(q, k, v), all [N,heads,L,D], with softmax(q k^T / sqrt D) v.
    The square root of the scale is applied to q and to k, so that fp16 holds the
    products.
    """
    modified, refused = 0, []
    for node in list(model.graph):
        if node.op_type != "Attention":
            continue
        if not is_bare(node):
            refused.append(f"plain_attention: {node.name} has a mask or a scale of its own")
            continue
        q, k, v = node.inputs[:3]
        assert q is not None and q.shape is not None, "captured graphs carry shapes"
        scale = float(q.shape[3]) ** -0.25  # type: ignore[arg-type]
        root = constant(model, "attention.scale", np.array(scale, np.float32))
        (q,) = insert(model, node, "Mul", [q, root], _FP32)
        (k,) = insert(model, node, "Mul", [k, root], _FP32)
        (turned,) = insert(model, node, "Transpose", [k], _FP32, perm=[0, 1, 3, 2])
        (scores,) = insert(model, node, "MatMul", [q, turned], _FP32)
        (product,) = insert(model, node, "MatMul", [attended(model, node, scores, None), v], _FP32)
        replace_node(model, node, product)
        modified += 1
    return PassResult(modified, tuple(refused))


PLAIN_NORMS = GraphPass("plain_norms", _norms, removes=frozenset({"::RMSNormalization"}))
PLAIN_GELU = GraphPass("plain_gelu", _gelu, removes=frozenset({"::Gelu"}))
PLAIN_ATTENTION = GraphPass("plain_attention", _attention, removes=frozenset({"::Attention"}))
