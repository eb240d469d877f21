"""The pooling matrix: average pooling of an s x s patch grid to p x p cells. It is a
graph input, so one vision graph works for every p.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.contract.errors import SpecError

__all__ = ["pool_matrix"]


def pool_matrix(s: int, p: int) -> NDArray[np.float32]:
    """Returns the pooling matrix, [p*p, s*s] float32. Row t averages the patches of
    cell t; both grids are row-major. Raises `SpecError` unless p divides s.
    """
    if p <= 0 or s % p:
        raise SpecError(f"pool size {p} does not divide the {s}x{s} patch grid")
    cell = np.kron(
        np.eye(p, dtype=np.float32), np.full((1, s // p), p / s, np.float32)
    )  # [p, s], rows sum to one
    matrix: NDArray[np.float32] = np.asarray(np.kron(cell, cell), np.float32)
    return matrix
