"""Simplifies the canonical graphs. Well-maintained optimisers do the general work, and
one pass of this project keeps weights recognisable.

onnxscript folds constants and rewrites. onnx_ir removes nodes that are unused or
repeated. Each is a counted pass. Weights are never read: a transpose is applied when
the graph is written. (onnxsim once ran last and was removed. It changed nothing after
these passes, and it needs the whole model in one message.)
"""

from __future__ import annotations

import logging

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer, rewriter

from export.passes.contract import GraphPass, PassResult, is_weight, lazy_tensor, replace_node

__all__ = ["CLEAN", "FOLD_CONSTANTS", "FOLD_TRANSPOSES", "INLINE", "REWRITE"]

_FOLD_LIMIT = 8192  # elements; larger results are not folded, and weights are never touched


def _fold_transposes(model: ir.Model) -> PassResult:
    """Replaces MatMul(x, Transpose(weight)) with MatMul(x, weight), where the weight is
    transposed once and keeps the parameter's name.
    """
    modified = 0
    for node in list(model.graph):
        if _is_plain_gemm(node):
            assert node.inputs[1] is not None, "checked above"
            product = ir.node("MatMul", [node.inputs[0], _transpose(node.inputs[1])])
            model.graph.insert_before(node, product)
            replace_node(model, node, product.outputs[0])
            modified += 1
            continue
        if (
            node.op_type != "Transpose"
            or not is_weight(node.inputs[0])
            or list(node.attributes["perm"].as_ints()) != [1, 0]
        ):
            continue
        weight, output = node.inputs[0], node.outputs[0]
        assert weight is not None and weight.const_value is not None
        if len(weight.uses()) > 1:
            continue
        ir.convenience.replace_all_uses_with(output, _transpose(weight))
        model.graph.remove(node, safe=True)
        modified += 1
    return PassResult(modified)


def _transpose(weight: ir.Value) -> ir.Value:
    stored = weight.const_value
    assert stored is not None and weight.name is not None, "checked by the caller"
    shape = stored.shape.numpy()[::-1]
    weight.const_value = lazy_tensor(
        weight.name, lambda: np.ascontiguousarray(stored.numpy().T), stored.dtype, shape
    )
    weight.shape = ir.Shape(shape)
    return weight


def _is_plain_gemm(node: ir.Node) -> bool:
    """True for Gemm(x, weight, transB=1) with a weight that no other node uses: a
    linear layer without bias.
    """
    if node.op_type != "Gemm" or len(node.inputs) != 2 or not is_weight(node.inputs[1]):
        return False
    settings = {name: attribute.value for name, attribute in node.attributes.items()}
    weight = node.inputs[1]
    unscaled = (
        settings.get("alpha", 1.0) == 1.0
        and settings.get("transB", 0) == 1
        and settings.get("transA", 0) == 0
    )
    return unscaled and weight is not None and len(weight.uses()) == 1


def _run(model: ir.Model, *passes: ir.passes.InPlacePass) -> PassResult:
    """Applies onnx_ir passes. Counts the nodes that were removed (or 1 if only their
    content changed).
    """
    before = sum(1 for _ in model.graph.all_nodes())
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    changed = any([step(model).modified for step in passes])
    gone = before - sum(1 for _ in model.graph.all_nodes())
    return PassResult(gone if gone > 0 else int(changed))


def _fold_constants(model: ir.Model) -> PassResult:
    return _run(
        model,
        _FoldConstants(),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    )


class _FoldConstants(ir.passes.InPlacePass):
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        result = optimizer.fold_constants_ir(
            model, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT
        )
        return ir.passes.PassResult(model, bool(result.modified))


def _rewrite(model: ir.Model) -> PassResult:
    return _run(
        model, rewriter.RewritePass(rewriter._DEFAULT_REWRITE_RULES), common.RemoveUnusedNodesPass()
    )


def _clean(model: ir.Model) -> PassResult:
    return _run(
        model,
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.ClearMetadataAndDocStringPass(),
        common.OutputFixPass(),
    )


INLINE = GraphPass("inline", lambda model: _run(model, common.InlinePass()))
FOLD_TRANSPOSES = GraphPass("fold_transposes", _fold_transposes)
FOLD_CONSTANTS = GraphPass("fold_constants", _fold_constants)
REWRITE = GraphPass("rewrite", _rewrite)
CLEAN = GraphPass("clean", _clean)
