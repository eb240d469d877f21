"""Graph passes: one ordered table per purpose. `run_passes` runs them, and every pass
counts its changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from export.passes.contract import GraphPass, PassResult
from export.passes.cuda_operators import MULTI_HEAD_ATTENTION, ONE_PICTURE, SIMPLIFIED_NORMS
from export.passes.group_query_attention import GROUP_QUERY_ATTENTION
from export.passes.logits_to_keep import KEEP_LOGITS
from export.passes.plain_operators import PLAIN_ATTENTION, PLAIN_GELU, PLAIN_NORMS
from export.passes.simplify import CLEAN, FOLD_CONSTANTS, FOLD_TRANSPOSES, INLINE, REWRITE
from export.passes.tensorrt_attention import FUSED_CACHE, PLAIN_CACHE
from export.passes.token_outputs import FIRST_TOKEN_OUTPUTS, TOKEN_OUTPUTS

__all__ = ["PASSES", "SIMPLIFY", "GraphPass", "PassResult", "run_passes"]

SIMPLIFY: tuple[GraphPass, ...] = (INLINE, FOLD_TRANSPOSES, FOLD_CONSTANTS, REWRITE, CLEAN)
"""The passes from the exporter's output to the canonical graph. Transposes of weights
are folded before constants, so that weights keep their names.
"""

LOWERINGS: tuple[GraphPass, ...] = (
    *(GROUP_QUERY_ATTENTION, KEEP_LOGITS),
    *(SIMPLIFIED_NORMS, MULTI_HEAD_ATTENTION, ONE_PICTURE),
    *(
        PLAIN_NORMS,
        PLAIN_GELU,
        PLAIN_ATTENTION,
        PLAIN_CACHE,
        FUSED_CACHE,
        FIRST_TOKEN_OUTPUTS,
        TOKEN_OUTPUTS,
    ),
)

PASSES: dict[str, GraphPass] = {step.name: step for step in (*SIMPLIFY, *LOWERINGS)}


def run_passes(model: ir.Model, passes: Sequence[GraphPass]) -> list[tuple[str, PassResult]]:
    """Runs passes in order, in place. Returns each pass's name and result."""
    results = []
    for step in passes:
        result = step(model)
        results.append((step.name, result))
    return results
