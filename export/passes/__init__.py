"""Graph passes. `SIMPLIFY` lists those that every graph gets; a target's row in
`export.targets` lists its own. `run_passes` runs them, and every pass
counts its changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from export.passes.contract import GraphPass, PassResult
from export.passes.simplify import CLEAN, FOLD_CONSTANTS, FOLD_TRANSPOSES, INLINE, REWRITE

__all__ = ["SIMPLIFY", "GraphPass", "PassResult", "run_passes"]

SIMPLIFY: tuple[GraphPass, ...] = (INLINE, FOLD_TRANSPOSES, FOLD_CONSTANTS, REWRITE, CLEAN)
"""The passes from the exporter's output to the canonical graph. Transposes of weights
are folded before constants, so that weights keep their names.
"""


def run_passes(model: ir.Model, passes: Sequence[GraphPass]) -> list[tuple[str, PassResult]]:
    """Runs passes in order, in place. Returns each pass's name and result."""
    results = []
    for step in passes:
        result = step(model)
        results.append((step.name, result))
    return results
