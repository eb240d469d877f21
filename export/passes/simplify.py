"""Simplification of the canonical graphs: well-kept optimisers do the general work, one pass of ours keeps weights recognisable.

onnxscript folds constants and rewrites, onnx_ir removes what is unused or repeated, onnxsim has a last look. Each is a counted pass.
"""

from __future__ import annotations

import contextlib
import io
import logging

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer, rewriter

from export.passes.contract import GraphPass, PassResult, is_weight

__all__ = ["CLEAN", "FOLD_CONSTANTS", "FOLD_TRANSPOSES", "INLINE", "ONNXSIM", "REWRITE"]

_FOLD_LIMIT = 8192  # elements; larger results stay computed, weights are never touched
_PROTO_LIMIT = 1 << 30  # onnxsim works on one protobuf message, which cannot pass 2 GB


def _fold_transposes(model: ir.Model) -> PassResult:
    """MatMul(x, Transpose(weight)) becomes MatMul(x, weight transposed once), under the parameter's own name."""
    modified = 0
    for node in list(model.graph):
        if _is_plain_gemm(node):
            assert node.inputs[1] is not None, "checked above"
            product = ir.node("MatMul", [node.inputs[0], _transposed(node.inputs[1])])
            _take_over(model, node, product)
            modified += 1
            continue
        if node.op_type != "Transpose" or not is_weight(node.inputs[0]) or list(node.attributes["perm"].as_ints()) != [1, 0]:
            continue
        weight, output = node.inputs[0], node.outputs[0]
        assert weight is not None and weight.const_value is not None
        if len(weight.uses()) > 1:
            continue
        ir.convenience.replace_all_uses_with(output, _transposed(weight))
        model.graph.remove(node, safe=True)
        modified += 1
    return PassResult(modified)


def _transposed(weight: ir.Value) -> ir.Value:
    assert weight.const_value is not None, "checked by the caller"
    tensor = ir.tensor(np.ascontiguousarray(weight.const_value.numpy().T), name=weight.name)
    weight.const_value, weight.shape = tensor, ir.Shape(tensor.shape.numpy())
    return weight


def _is_plain_gemm(node: ir.Node) -> bool:
    """Gemm(x, weight, transB=1) of a weight nobody else uses: a linear layer without bias."""
    if node.op_type != "Gemm" or len(node.inputs) != 2 or not is_weight(node.inputs[1]):
        return False
    settings = {name: attribute.value for name, attribute in node.attributes.items()}
    weight = node.inputs[1]
    unscaled = settings.get("alpha", 1.0) == 1.0 and settings.get("transB", 0) == 1 and settings.get("transA", 0) == 0
    return unscaled and weight is not None and len(weight.uses()) == 1


def _take_over(model: ir.Model, old: ir.Node, new: ir.Node) -> None:
    """Puts `new` in the place of `old`, its output under the same name."""
    model.graph.insert_before(old, new)
    before, after = old.outputs[0], new.outputs[0]
    after.shape, after.type, name = before.shape, before.type, before.name
    ir.convenience.replace_all_uses_with(before, after, replace_graph_outputs=True)
    model.graph.remove(old, safe=True)
    after.name = name


def _run(model: ir.Model, *passes: ir.passes.InPlacePass) -> PassResult:
    """Applies onnx_ir passes; counts the nodes that went away (or 1 if only their content changed)."""
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
        result = optimizer.fold_constants_ir(model, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT)
        return ir.passes.PassResult(model, bool(result.modified))


def _rewrite(model: ir.Model) -> PassResult:
    return _run(model, rewriter.RewritePass(rewriter._DEFAULT_REWRITE_RULES), common.RemoveUnusedNodesPass())


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


def _onnxsim(model: ir.Model) -> PassResult:
    """Runs onnxsim on a copy without weights' names changing; its result is taken only if it keeps every parameter and shrinks the graph."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size > _PROTO_LIMIT:
        return PassResult(0, (f"onnxsim: {size >> 20} MiB of weights do not fit one protobuf message",))
    import onnxsim

    before = len(model.graph)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            proto, ok = onnxsim.simplify(ir.to_proto(model), perform_optimization=True)
    except Exception as error:  # onnxsim reports unsupported operators through many exception types
        return PassResult(0, (f"onnxsim: {type(error).__name__}: {str(error).splitlines()[0]:.120}",))
    if not ok:
        return PassResult(0, ("onnxsim: its own check of the result failed",))
    simplified = ir.from_proto(proto)
    lost = {name for name in model.graph.initializers if "." in name} - set(simplified.graph.initializers)
    if lost:
        return PassResult(0, (f"onnxsim: it renames {len(lost)} parameters, such as {min(lost)}",))
    if len(simplified.graph) >= before:
        return PassResult(0)
    model.graph = simplified.graph
    return PassResult(before - len(simplified.graph))


INLINE = GraphPass("inline", lambda model: _run(model, common.InlinePass()))
FOLD_TRANSPOSES = GraphPass("fold_transposes", _fold_transposes)
FOLD_CONSTANTS = GraphPass("fold_constants", _fold_constants)
REWRITE = GraphPass("rewrite", _rewrite)
CLEAN = GraphPass("clean", _clean)
ONNXSIM = GraphPass("onnxsim", _onnxsim)
