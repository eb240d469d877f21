"""Graph passes: one ordered table per purpose, run by `run_passes`, every step counted."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from export.passes.contract import GraphPass, PassResult
from export.passes.group_query_attention import GROUP_QUERY_ATTENTION
from export.passes.logits_to_keep import KEEP_LOGITS
from export.passes.simplify import CLEAN, FOLD_CONSTANTS, FOLD_TRANSPOSES, INLINE, REWRITE

__all__ = ["LOWERING", "PASSES", "SIMPLIFY", "GraphPass", "PassResult", "run_passes"]

SIMPLIFY: tuple[GraphPass, ...] = (INLINE, FOLD_TRANSPOSES, FOLD_CONSTANTS, REWRITE, CLEAN)
"""From the exporter's output to the canonical graph. Transposes of weights are folded before constants, so that weights keep their names."""

LOWERING: dict[str, dict[str, tuple[GraphPass, ...]]] = {
    "cpu": {"vision": (), "decoder": (GROUP_QUERY_ATTENTION, KEEP_LOGITS)},
}
"""Per target and graph: passes from canonical operators to those the target's engine runs fastest."""

PASSES: dict[str, GraphPass] = {step.name: step for step in (*SIMPLIFY, GROUP_QUERY_ATTENTION, KEEP_LOGITS)}


def run_passes(model: ir.Model, passes: Sequence[GraphPass]) -> list[tuple[str, PassResult]]:
    """Runs passes in order, in place; returns each one's name and result."""
    results = []
    for step in passes:
        result = step(model)
        results.append((step.name, result))
    return results
