"""Limits that decide how a build is done: how many golden cases it compares, and which models
are too large to load whole.
"""

from __future__ import annotations

from runtime.contract.spec import ModelSpec

__all__ = [
    "CALLS_MODEL",
    "FEW_CASES",
    "GOLDEN_CASES",
    "LARGE_BYTES",
    "PIECE_BYTES",
    "WHOLE_MODEL",
    "golden_count",
]


GOLDEN_CASES, FEW_CASES = 6, 2
CALLS_MODEL = 150_000_000  # most parameters of a model whose float graphs are run whole
WHOLE_MODEL = 500_000_000  # most parameters of a model that is loaded whole to answer in PyTorch
LARGE_BYTES = 2 << 30  # bytes of weights above which a build does not load its bundle whole
PIECE_BYTES = 1 << 29  # bytes of weights in memory at once in that case


def golden_count(spec: ModelSpec) -> int:
    """Returns the number of golden cases of a build. Large models, where one case takes
    a minute, get fewer.
    """
    return GOLDEN_CASES if spec.parameters <= WHOLE_MODEL else FEW_CASES
