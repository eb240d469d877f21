"""Chooses tokens from logits. Tokens are chosen only from finite logits, and only among
allowed tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.engines.logits import check_finite, greedy
from runtime.generation.constraints import Constraint
from runtime.generation.decoding import Decoding

__all__ = ["Sampler", "distribution", "log_softmax", "scores"]

Row = NDArray[np.float32]


def log_softmax(logits: Row) -> Row:
    """Computes the logarithm of the softmax over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    found: Row = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def scores(values_V: Row, decoding: Decoding, generated: Sequence[int], eos_id: int) -> Row:
    """Applies the repetition penalty to logits or log probabilities. Forbids an end
    before `min_new_tokens` unless nothing else is allowed.
    """
    if decoding.repetition_penalty == 1 and len(generated) >= decoding.min_new_tokens:
        return values_V
    values = values_V.copy()
    if decoding.repetition_penalty != 1 and generated:
        seen = np.unique(np.asarray(generated))
        penalty = np.float32(decoding.repetition_penalty)
        values[seen] = np.where(values[seen] < 0, values[seen] * penalty, values[seen] / penalty)
    if len(generated) < decoding.min_new_tokens:
        ends = values[eos_id]
        values[eos_id] = -np.inf
        if not np.isfinite(
            values
        ).any():  # only the end is allowed: the constrained text is complete
            values[eos_id] = ends
    return values


def distribution(logits_V: Row, decoding: Decoding) -> NDArray[np.float64]:
    """Returns probabilities [V] after temperature, top-k, top-p and min-p, in that
    order. At least the most likely token is kept.
    """
    values = (logits_V.astype(np.float64) - float(logits_V.max())) / decoding.temperature
    if 0 < decoding.top_k < values.size:
        values[values < np.partition(values, -decoding.top_k)[-decoding.top_k]] = -np.inf
    if decoding.top_p < 1:
        order = np.argsort(-values, kind="stable")
        before = np.cumsum(_softmax(values[order])) - _softmax(values[order])
        values[order[before >= decoding.top_p]] = -np.inf
    if decoding.min_p > 0:
        likelihood = _softmax(values)
        values[likelihood < decoding.min_p * likelihood.max()] = -np.inf
    return _softmax(values)


def _softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(values - values.max())
    found: NDArray[np.float64] = powers / powers.sum()
    return found


class Sampler:
    """Chooses the tokens of one sequence in order: greedily or by sampling (seeded if a
    seed is given), within a constraint if there is one.
    """

    def __init__(
        self, decoding: Decoding, eos_id: int, constraint: Constraint | None = None
    ) -> None:
        self._decoding, self._eos, self._constraint = decoding, eos_id, constraint
        self._state = constraint.start() if constraint else None
        self._random = np.random.default_rng(decoding.seed) if decoding.temperature > 0 else None
        self._generated: list[int] = []
        self.is_greedy = decoding.plain and constraint is None
        """True if it always chooses the same token as `greedy`."""

    def __call__(self, logits_V: Row) -> int:
        """Chooses the next token. Raises `NonFiniteError`."""
        if self.is_greedy:
            return greedy(logits_V)
        check_finite(logits_V)
        values = logits_V
        if self._constraint is not None:
            values = np.where(self._constraint.allowed(self._state), logits_V, np.float32(-np.inf))
        values = scores(values, self._decoding, self._generated, self._eos)
        token = (
            int(values.argmax())
            if self._random is None
            else int(self._random.choice(values.size, p=distribution(values, self._decoding)))
        )
        self._generated.append(token)
        if self._constraint is not None and token != self._eos:
            self._state = self._constraint.after(self._state, token)
        return token
