"""Decoding one sequence: from the prompt's logits to a stream of token ids, with the
time each step took.

Where drafted tokens are at hand (`Lookup`), several steps are computed in one call, and
as many tokens taken as plain decoding would have chosen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.engines import Engine
from runtime.generation.prompt_lookup import Lookup
from runtime.generation.sampling import greedy

__all__ = ["Generation", "Limits", "generate"]

Choose = Callable[[NDArray[np.float32]], int]
_TRIALS = 4  # drafts tried before judging whether they pay


@dataclass
class Generation:
    """Progress of one answer. `finish_reason` is "stop" (the model or a stop text ended
    it), "length" (token limit or full cache) or "cancelled".

    `exact` counts the tokens whose rows are in the cache, up to the first that was
    checked among others (whose row equals a stepwise one only up to rounding, and is
    not kept); times are seconds, `step_seconds` one for each call after the prompt
    (without drafts: each token). `drafted` and `accepted` count looked-up tokens.
    """

    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    prefill_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    exact: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Limits:
    """Where an answer ends: at `eos_id`, after `new_tokens`; `rows` are those the
    prompt fills.
    """

    eos_id: int
    new_tokens: int
    rows: int


class _Pays:
    """Whether checking drafts gives more tokens a second than plain steps. Speed only:
    the tokens are the same either way.
    """

    def __init__(self) -> None:
        self._plain: list[float] = []
        self._seconds, self._tokens, self._calls = 0.0, 0, 0

    def __bool__(self) -> bool:
        if self._calls < _TRIALS or len(self._plain) < 2:
            return True
        return self._seconds / self._tokens < sorted(self._plain)[len(self._plain) // 2]

    def note(self, seconds: float, tokens: int, drafted: bool) -> None:
        if drafted:
            self._seconds, self._tokens, self._calls = (
                self._seconds + seconds,
                self._tokens + tokens,
                self._calls + 1,
            )
        else:
            self._plain.append(seconds)


def generate(
    engine: Engine,
    table: NDArray[np.floating],
    logits: NDArray[np.float32],
    choose: Choose,
    limits: Limits,
    progress: Generation,
    lookup: int = 0,
    context: Lookup | None = None,
) -> Iterator[int]:
    """Yields token ids; `progress` is updated before each yield and holds the outcome
    at the end.

    Where `choose` is `runtime.generation.sampling.greedy` itself, the engine chooses
    where its logits are. `logits` [V] are the prompt's, `table` the token embeddings
    [V, H], `lookup` the most tokens drafted from `context`. The caller has checked that
    everything fits (`CacheBudget`).
    """
    pays, seen = _Pays(), context or Lookup()
    rows, elapsed, drafts = limits.rows, 0.0, list[int]()
    step: Callable[[NDArray[np.float32], int], NDArray[np.float32] | int] = (
        engine.greedy if choose is greedy else engine.forward
    )
    waiting: list[NDArray[np.float32] | int] = [logits]
    while True:
        chosen = 0
        for chosen, row in enumerate(waiting, 1):
            token = row if isinstance(row, int) else choose(row)
            if token == limits.eos_id:
                progress.finish_reason = "stop"
                return
            progress.tokens.append(token)
            agreed = chosen <= len(drafts) and token == drafts[chosen - 1]
            if agreed:
                progress.accepted, rows = progress.accepted + 1, rows + 1
            yield token
            if len(progress.tokens) >= limits.new_tokens:
                progress.finish_reason = "length"
                return
            if lookup:
                seen.add(token)
            if not agreed:
                break
        if lookup and elapsed:
            pays.note(elapsed, chosen, bool(drafts))
        room = (
            min(lookup, limits.new_tokens - len(progress.tokens) - 1, engine.capacity - rows - 1)
            if lookup
            else 0
        )
        drafts = seen.draft(room) if room > 0 and pays else []
        started = time.perf_counter()
        last = table[None, token : token + 1]
        waiting = (
            list(engine.verify(table[None, [token, *drafts]], rows))
            if drafts
            else [step(last, rows)]
        )
        elapsed = time.perf_counter() - started
        rows, progress.drafted = rows + 1, progress.drafted + len(drafts)
        if not progress.drafted:
            progress.exact += 1
        progress.step_seconds.append(elapsed)
