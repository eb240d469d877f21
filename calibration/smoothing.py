"""Moves scales between activations and weights, so that neither has outliers that its
grid cannot represent well.

y = W x = (W s)(x / s) holds for any positive s per input channel. The division is
folded into the norm (or linear layer) that produces x, so the graph does not change.

s = |x|^a / |W|^(1-a) (SmoothQuant, arXiv 2211.10438). The strength a is the one with
the least error of the layers' rounded outputs on calibration rows, where each layer
uses its own scheme. With float activations this is AWQ's search (arXiv 2306.00978). No
smoothing is also a candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from calibration.linear import LinearScheme, fake_activation, grid_for, round_to

__all__ = ["STRENGTHS", "output_error", "search_scales"]

STRENGTHS = (0.25, 0.4, 0.5, 0.6, 0.75, 0.9)
_FLOOR = 1e-5
_OUTPUTS = 1024  # output channels of a layer that suffice to rank scales
_LIMIT = 1e4  # larger scales would leave the range of half precision


def output_error(
    rows_RK: Tensor, weight_NK: Tensor, scheme: LinearScheme, scales_K: Tensor | None = None
) -> float:
    """Returns the relative squared error of a linear layer's output after smoothing,
    with weight and activation rounded.
    """
    exact = rows_RK @ weight_NK.T
    if scales_K is not None:
        rows_RK, weight_NK = rows_RK / scales_K, weight_NK * scales_K
    if scheme.quantised:
        weight_NK = round_to(
            weight_NK, grid_for(weight_NK, replace(scheme, rounding="nearest"))
        ).dequantised()  # nearest rounding ranks scales equally well and is far faster
    found = fake_activation(rows_RK, scheme.activation) @ weight_NK.T
    return float((found - exact).square().sum() / exact.square().sum().clamp(min=1e-30))


def search_scales(
    rows_RK: Tensor, layers: Sequence[tuple[Tensor, Sequence[LinearScheme]]]
) -> tuple[Tensor | None, float]:
    """Returns the scales [K] with the least summed error over the layers, and their
    strength. Returns None and 0 if no smoothing is best.

    `layers` lists each weight [N,K] with the schemes it will be used with.
    """
    activation = rows_RK.abs().amax(0).clamp(min=_FLOOR)
    weight = torch.stack([w.abs().amax(0) for w, _ in layers]).amax(0).clamp(min=_FLOOR)
    sampled = [(w[:: -(-len(w) // _OUTPUTS)], schemes) for w, schemes in layers]

    def error(scales: Tensor | None) -> float:
        return sum(
            output_error(rows_RK, w, scheme, scales) for w, schemes in sampled for scheme in schemes
        )

    best, chosen, strength = error(None), None, 0.0
    for share in STRENGTHS:
        scales = activation.pow(share) / weight.pow(1 - share)
        scales = (scales / scales.log().mean().exp()).clamp(1 / _LIMIT, _LIMIT)
        found = error(scales)
        if found < best:
            best, chosen, strength = found, scales, share
    return chosen, strength
