"""Choosing a token from logits. A token is only ever taken from finite logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.contract.errors import NonFiniteError

__all__ = ["greedy"]


def greedy(logits_V: NDArray[np.float32]) -> int:
    """The most likely token; ties go to the lowest id. Raises `NonFiniteError` if any logit is NaN or infinite."""
    if not np.isfinite(logits_V).all():
        raise NonFiniteError(
            "the decoder produced NaN or infinite logits; no token was taken. Run infmllm-run --self-test, or rebuild with --precision fp32"
        )
    return int(logits_V.argmax())
