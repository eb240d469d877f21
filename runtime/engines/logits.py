"""Takes the most likely token from logits, and refuses logits that are not finite."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from runtime.contract.errors import NonFiniteError

__all__ = ["check_finite", "greedy"]


Row = NDArray[np.float32]


def greedy(logits_V: Row) -> int:
    """The most likely token; ties go to the lowest id. Raises `NonFiniteError` if any
    logit is NaN or infinite.
    """
    token = int(logits_V.argmax())
    # NaN and +inf are their row's argmax; what is left is -inf.
    if not (math.isfinite(logits_V[token]) and math.isfinite(logits_V.min())):
        _refuse()
    return token


def check_finite(values: Row, maker: str = "the decoder", what: str = "logits") -> None:
    """Raises `NonFiniteError` if any logit (or whatever `maker` made) is NaN or
    infinite.
    """
    if not np.isfinite(values).all():
        _refuse(maker, what)


def _refuse(maker: str = "the decoder", what: str = "logits") -> None:
    raise NonFiniteError(
        f"{maker} produced NaN or infinite {what}; no token was taken. Run infmllm-run "
        f"--self-test, or rebuild with --precision fp32"
    )
