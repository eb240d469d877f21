"""GPTQ: rounds a weight column by column and compensates each column's error in the
columns not yet rounded (Frantar et al., arXiv 2210.17323).

Columns are processed in the order of their inputs' energy, largest first. The grids are
fixed beforehand, so this order does not mix blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.linear import Grid, Quantised

__all__ = ["gptq"]

_PANEL = 128
_DAMPING = (
    0.01,
    0.1,
    1.0,
)  # shares of the mean diagonal; the next is tried when the factorisation fails


def gptq(weight_NK: Tensor, hessian_KK: Tensor, grid: Grid) -> Quantised:
    """Returns levels [N, K] that minimise the error of `weight @ x` over inputs with
    the second moments `hessian_KK` (the sum of x xᵀ).

    Columns whose input is always zero are rounded to nearest.
    """
    n, k = weight_NK.shape
    order = hessian_KK.diagonal().argsort(descending=True)
    inverse = _inverse_factor(hessian_KK[order][:, order])
    weight = weight_NK[:, order].clone()
    scale, zero = (t[:, order] for t in grid.expand(k))
    levels = torch.empty(n, k, dtype=torch.int16)
    for start in range(0, k, _PANEL):
        end = min(start + _PANEL, k)
        errors = torch.empty(n, end - start)
        for column in range(start, end):
            level = (
                (weight[:, column] / scale[:, column] + zero[:, column])
                .round_()
                .clamp_(grid.low, grid.high)
            )
            levels[:, column] = level.to(torch.int16)
            error = (weight[:, column] - (level - zero[:, column]) * scale[:, column]) / inverse[
                column, column
            ]
            weight[:, column + 1 : end].addr_(error, inverse[column, column + 1 : end], alpha=-1)
            errors[:, column - start] = error
        weight[:, end:].addmm_(errors, inverse[start:end, end:], alpha=-1)
    back = torch.empty_like(levels)
    back[:, order] = levels
    return Quantised(back, grid)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Returns the upper Cholesky factor of the damped inverse, or the identity if no
    damping makes the factorisation succeed.
    """
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    mean = float(diagonal.mean())
    done = 0.0
    for share in _DAMPING:
        diagonal += (share - done) * mean
        done = share
        factor, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed and bool(torch.isfinite(upper.diagonal()).all()):
                return upper
    return torch.eye(hessian.shape[0])  # no usable statistics: rounds to nearest
