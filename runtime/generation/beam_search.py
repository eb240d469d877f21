"""Beam search: decodes several sequences side by side and keeps the most likely, scored
by log probability over length ** length penalty.

It follows the rules of `transformers` and gives the same tokens. Each step takes twice
as many candidates as beams, and ended candidates compete with a score of their own. The
search ends when no open beam can beat the worst ended one. The beams are decoded as a
batch; when they change slots, only rows after the prompt are copied.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.engines import Engine
from runtime.engines.logits import check_finite
from runtime.generation.constraints import Constraint
from runtime.generation.decoding import Decoding
from runtime.generation.generate import Limits, Progress
from runtime.generation.sampling import log_softmax, scores

__all__ = ["beam_search"]

Row = NDArray[np.float32]


@dataclass(frozen=True)
class _Beam:
    """An open or ended sequence. `score` is the sum of log probabilities; for ended
    ones it is divided by length ** length penalty. `parent` is the slot of the beam it
    extends. `ended_itself` means an end token or stop text, not the length limit.
    """

    tokens: tuple[int, ...]
    score: float
    state: Any = None
    parent: int = 0
    ended_itself: bool = False


class _Search:
    def __init__(
        self,
        decoding: Decoding,
        limits: Limits,
        constraint: Constraint | None,
        stopped: Callable[[Sequence[int]], bool],
    ) -> None:
        self._decoding, self._limits, self._constraint, self._stopped = (
            decoding,
            limits,
            constraint,
            stopped,
        )
        self.open = [_Beam((), 0.0, constraint.start() if constraint else None)]
        self._ended: list[_Beam] = []
        self._hopeful = True

    def advance(self, logits: Row) -> None:
        """Extends the n open beams by one token, given their logits [n,V]."""
        check_finite(logits)
        following = self._candidates(logits)
        opened: list[_Beam] = []
        for place, (beam, token) in enumerate(following):
            tokens = (*beam.tokens, token)
            ends = (
                token == self._limits.eos_id
                or len(tokens) >= self._limits.new_tokens
                or self._stopped(tokens)
            )
            if not ends:
                if len(opened) < self._decoding.beams:
                    opened.append(self._extend(beam, tokens))
            elif place < self._decoding.beams and self._hopeful:
                itself = token == self._limits.eos_id
                score = beam.score / len(tokens) ** self._decoding.length_penalty
                self._ended.append(
                    _Beam(
                        tokens[:-1] if itself else tokens,
                        score,
                        ended_itself=itself or len(tokens) < self._limits.new_tokens,
                    )
                )
        self._ended = sorted(self._ended, key=lambda beam: -beam.score)[: self._decoding.beams]
        self.open = opened
        if opened and len(self._ended) == self._decoding.beams:
            length = len(opened[0].tokens)
            self._hopeful = (
                self._hopeful
                and opened[0].score / length**self._decoding.length_penalty > self._ended[-1].score
            )

    def _candidates(self, logits: Row) -> list[tuple[_Beam, int]]:
        """Returns (beam with its new score, token) of the best continuations, best
        first: at most twice as many as there are beams.
        """
        rows = []
        for index, beam in enumerate(self.open):
            values = log_softmax(logits[index])
            if self._constraint is not None:
                values = np.where(self._constraint.allowed(beam.state), values, np.float32(-np.inf))
            rows.append(
                scores(values, self._decoding, beam.tokens, self._limits.eos_id)
                + np.float32(beam.score)
            )
        flat = np.concatenate(rows)
        count = min(2 * self._decoding.beams, flat.size)
        best = np.argpartition(-flat, count - 1)[:count]
        best = best[np.lexsort((best, -flat[best]))]
        found = []
        for place in best[np.isfinite(flat[best])].tolist():
            parent, token = divmod(place, logits.shape[1])
            beam = self.open[parent]
            found.append((_Beam(beam.tokens, float(flat[place]), beam.state, parent), token))
        return found

    def _extend(self, beam: _Beam, tokens: tuple[int, ...]) -> _Beam:
        state = (
            self._constraint.after(beam.state, tokens[-1]) if self._constraint is not None else None
        )
        return _Beam(tokens, beam.score, state, beam.parent)

    @property
    def over(self) -> bool:
        """True when no open beam is left, or none can win."""
        return not self.open or not self._hopeful

    def best(self) -> _Beam:
        """Returns the best ended sequence; if none ended (the search was cancelled),
        the best open one.
        """
        return max(self._ended or self.open or [_Beam((), 0.0)], key=lambda beam: beam.score)


def beam_search(
    engine: Engine,
    table: NDArray[np.floating],
    logits: Row,
    decoding: Decoding,
    limits: Limits,
    progress: Progress,
    constraint: Constraint | None = None,
    stopped: Callable[[Sequence[int]], bool] = lambda tokens: False,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Runs the search and stores the best sequence in `progress`. `logits` [V] belong
    to the prompt, whose `limits.rows` rows are in the engine's cache.

    `stopped` says whether a sequence ends with a stop text, `cancelled` whether to end
    the search early. Raises `NonFiniteError` or `ContextError`.
    """
    search = _Search(decoding, limits, constraint, stopped)
    batch = engine.batch(decoding.beams, limits.rows + limits.new_tokens)
    for slot in range(decoding.beams):
        batch.fill(slot, limits.rows)
    search.advance(logits[None])
    rows = limits.rows
    while not search.over and not cancelled():
        started = time.perf_counter()
        beams = search.open
        batch.copy([beam.parent for beam in beams], limits.rows, rows)
        embeds = table[[beam.tokens[-1] for beam in beams]][:, None]
        stepped = batch.step(embeds, np.full(len(beams), rows, np.int32))
        rows += 1
        search.advance(stepped)
        progress.step_seconds.append(time.perf_counter() - started)
    winner = search.best()
    progress.tokens = list(winner.tokens)
    progress.finish_reason = (
        "cancelled"
        if cancelled() and not search.over
        else "stop"
        if winner.ended_itself
        else "length"
    )
