"""The pooling matrix: average pooling of an s x s patch grid to p x p cells, written as
a matrix so that the engine takes any p.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime.contract.errors import SpecError

__all__ = ["pool_matrix"]


def pool_matrix(s: int, p: int) -> NDArray[np.float32]:
    """[p*p, s*s] float32: row t averages the patches of cell t, both grids row-major.
    Raises `SpecError` unless p divides s.
    """
    if p <= 0 or s % p:
        raise SpecError(f"pool size {p} does not divide the {s}x{s} patch grid")
    cell = np.kron(
        np.eye(p, dtype=np.float32), np.full((1, s // p), p / s, np.float32)
    )  # [p, s], rows sum to one
    matrix: NDArray[np.float32] = np.asarray(np.kron(cell, cell), np.float32)
    return matrix
