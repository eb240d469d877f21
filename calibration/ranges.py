"""Finds ranges of activations for static quantisation: a narrow range clips values, and
a wide one rounds coarsely.

Four methods turn a sample of activation values into (low, high): the full range, a
percentile, the least squared error, and the least loss of information.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

__all__ = ["PERCENTILE", "RANGES", "find_range"]

Values = NDArray[np.float32]
_BINS = 2048
_LEVELS = 256
_PERCENTILE = 99.99
_SHARES = np.linspace(0.2, 1.0, 41)


def _min_max(values: Values) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _percentile(values: Values) -> tuple[float, float]:
    low, high = np.percentile(values, (100 - _PERCENTILE, _PERCENTILE))
    return float(low), float(high)


def _mse(values: Values) -> tuple[float, float]:
    """Returns the shrunken range with the least squared error of clipping and rounding."""
    low, high = _min_max(values)
    return min(
        ((low * share, high * share) for share in _SHARES),
        key=lambda bounds: _squared_error(values, *bounds),
    )


def _squared_error(values: Values, low: float, high: float) -> float:
    step = max((high - low) / (_LEVELS - 1), 1e-12)
    rounded = np.rint(np.clip(values, low, high) / step) * step
    return float(np.square(rounded - values, dtype=np.float64).mean())


def _entropy(values: Values) -> tuple[float, float]:
    """Returns the shrunken range whose 256-level histogram keeps most information of
    the 2048-bin histogram (least Kullback-Leibler divergence, with clipped mass at the
    ends).
    """
    low, high = _min_max(values)
    counts, edges = np.histogram(values, _BINS, (low, high) if high > low else (low, low + 1))
    found = {
        (low * share, high * share): _divergence(counts, edges, low * share, high * share)
        for share in _SHARES
    }
    best = min(found, key=lambda bounds: found[bounds])
    return best if np.isfinite(found[best]) else (low, high)  # too few different values to tell


def _divergence(
    counts: NDArray[np.int64], edges: NDArray[np.float64], low: float, high: float
) -> float:
    centres = (edges[:-1] + edges[1:]) / 2
    inside = (centres >= low) & (centres <= high)
    if inside.sum() < _LEVELS:
        return float("inf")
    kept = counts[inside].astype(np.float64)
    reference = kept.copy()
    reference[0] += counts[centres < low].sum()
    reference[-1] += counts[centres > high].sum()
    level = np.minimum((np.arange(kept.size) * _LEVELS) // kept.size, _LEVELS - 1)
    filled = np.bincount(level, kept > 0, _LEVELS)
    coarse = np.where(
        kept > 0, (np.bincount(level, kept, _LEVELS) / np.maximum(filled, 1))[level], 0.0
    )
    p, q = reference / reference.sum(), coarse / max(coarse.sum(), 1e-12)
    used = p > 0
    return float((p[used] * np.log(p[used] / np.maximum(q[used], 1e-10))).sum())


PERCENTILE = "percentile"
RANGES: dict[str, Callable[[Values], tuple[float, float]]] = {
    "min-max": _min_max,
    PERCENTILE: _percentile,
    "mse": _mse,
    "entropy": _entropy,
}


def find_range(values: Values, method: str) -> tuple[float, float]:
    """Returns (low, high) of activation values by a method of `RANGES`. Zero always
    lies inside, because padding and masks must stay exact.
    """
    low, high = RANGES[method](values)
    return min(low, 0.0), max(high, 0.0)
