"""The decode loop: from the logits of the prompts to the tokens of the answers, for one
sequence or for several side by side.

`decode` takes `Generation`s, which choose their own tokens, and a `Decoder`, which
computes the next logits for all of them in one call. A single sequence decodes in the
engine's own cache (`SingleDecoder`) and can verify drafted tokens (speculative
decoding); several decode as a batch (`BatchDecoder`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.engines import Batch, Engine
from runtime.engines.logits import greedy
from runtime.generation.prompt_lookup import PromptLookup

__all__ = ["BatchDecoder", "Decoder", "Generation", "Limits", "Progress", "SingleDecoder", "decode"]

Sample = Callable[[NDArray[np.float32]], int]
_DRAFTS_BEFORE_JUDGING = 4  # drafts to time before deciding whether drafting is faster


@dataclass
class Progress:
    """What is known of an answer so far.

    `finish_reason` is "stop" (the model or a stop text ended it), "length" (token limit
    or full cache) or "cancelled". `kept` counts the tokens whose cache rows may be
    reused: those up to the first that was verified together with drafts, because a row
    computed among others equals a row computed alone only up to rounding. Times are
    seconds; `step_seconds` has one for each call of the decoder after the prompt.
    """

    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""
    prefill_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    kept: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Limits:
    """Where an answer ends: at `eos_id`, or after `new_tokens`. `rows` is the number of
    cache rows that the prompt fills.
    """

    eos_id: int
    new_tokens: int
    rows: int


class _DraftTimer:
    """Measures whether verifying drafts yields more tokens a second than plain steps.

    This decides about speed only: the tokens are the same either way.
    """

    def __init__(self) -> None:
        self._plain: list[float] = []
        self._seconds, self._tokens, self._calls = 0.0, 0, 0

    def pays(self) -> bool:
        """True until enough drafts were timed, then whether they were faster."""
        if self._calls < _DRAFTS_BEFORE_JUDGING or len(self._plain) < 2:
            return True
        return self._seconds / self._tokens < sorted(self._plain)[len(self._plain) // 2]

    def add(self, seconds: float, tokens: int, drafted: bool) -> None:
        """Records one call of the decoder and how many tokens it yielded."""
        if drafted:
            self._seconds, self._tokens = self._seconds + seconds, self._tokens + tokens
            self._calls += 1
        else:
            self._plain.append(seconds)


class Generation:
    """One answer while it is generated.

    Args:
        sample: Chooses a token from logits [V].
        limits: Where the answer ends.
        logits: The logits [V] of the prompt's last position.
        progress: Receives the outcome; it is up to date whenever `take` yields.
        draft_length: The most tokens drafted for one call (0: no speculative decoding).
        context: Where drafts are looked up.
    """

    def __init__(
        self,
        sample: Sample,
        limits: Limits,
        logits: NDArray[np.float32],
        progress: Progress | None = None,
        draft_length: int = 0,
        context: PromptLookup | None = None,
    ) -> None:
        self.sample, self.limits = sample, limits
        self.progress = progress or Progress()
        self.rows = limits.rows
        """Cache rows that hold this sequence."""
        self.drafts: list[int] = []
        self._pending: Sequence[NDArray[np.float32] | int] = [logits]
        self._draft_length, self._lookup = draft_length, context or PromptLookup()
        self._timer, self._elapsed = _DraftTimer(), 0.0

    @property
    def last_token(self) -> int:
        """The token whose row is computed next."""
        return self.progress.tokens[-1]

    def take(self) -> Iterator[int]:
        """Yields the tokens that the pending logits decide: one, and one more for each
        accepted draft.

        Whoever reads them may end the answer by setting `progress.finish_reason`.
        """
        progress, limits = self.progress, self.limits
        chosen = 0
        for chosen, row in enumerate(self._pending, 1):
            token = row if isinstance(row, int) else self.sample(row)
            if token == limits.eos_id:
                progress.finish_reason = "stop"
                return
            progress.tokens.append(token)
            accepted = chosen <= len(self.drafts) and token == self.drafts[chosen - 1]
            if accepted:
                progress.accepted, self.rows = progress.accepted + 1, self.rows + 1
            yield token
            if progress.finish_reason:
                return
            if len(progress.tokens) >= limits.new_tokens:
                progress.finish_reason = "length"
                return
            if self._draft_length:
                self._lookup.add(token)
            if not accepted:
                break  # later rows were computed after a draft that was wrong
        if self._draft_length and self._elapsed:
            self._timer.add(self._elapsed, chosen, bool(self.drafts))

    def draft(self, capacity: int) -> list[int]:
        """Drafts tokens for the next call, as many as the limits and the cache allow."""
        self.drafts = []
        if self._draft_length:
            left = self.limits.new_tokens - len(self.progress.tokens) - 1
            room = min(self._draft_length, left, capacity - self.rows - 1)
            if room > 0 and self._timer.pays():
                self.drafts = self._lookup.draft(room)
        return self.drafts

    def receive(self, pending: Sequence[NDArray[np.float32] | int], seconds: float) -> None:
        """Takes the result of a call: logits [V] or a token for each computed position."""
        self._pending, self._elapsed = pending, seconds
        progress = self.progress
        self.rows, progress.drafted = self.rows + 1, progress.drafted + len(self.drafts)
        if not progress.drafted:
            progress.kept += 1
        progress.step_seconds.append(seconds)


class Decoder(Protocol):
    """Computes the next logits of the active generations in one call of the engine."""

    def step(self, active: Sequence[Generation]) -> None:
        """Feeds each generation's last token and hands it the result."""
        ...

    def keep(self, slots: Sequence[int], rows: int) -> None:
        """Drops the sequences that ended: slot i continues the former slot slots[i],
        whose cache has at most `rows` rows.
        """
        ...


class SingleDecoder:
    """Decodes one sequence in the engine's own cache, with the embedding table [V, H]."""

    def __init__(self, engine: Engine, table: NDArray[np.floating], sample: Sample) -> None:
        self._engine, self._table = engine, table
        # With plain greedy sampling the engine chooses the token where its logits are.
        self._forward: Callable[[NDArray[np.float32], int], NDArray[np.float32] | int] = (
            engine.greedy if sample is greedy else engine.forward
        )

    def step(self, active: Sequence[Generation]) -> None:
        """Computes one position, or one more for each drafted token."""
        (one,) = active
        drafts = one.draft(self._engine.capacity)
        started = time.perf_counter()
        if drafts:
            embeds = self._table[None, [one.last_token, *drafts]]
            pending = list(self._engine.verify(embeds, one.rows))
        else:
            token = one.last_token
            pending = [self._forward(self._table[None, token : token + 1], one.rows)]
        one.receive(pending, time.perf_counter() - started)

    def keep(self, slots: Sequence[int], rows: int) -> None:
        """A single sequence has nothing to move."""


class BatchDecoder:
    """Decodes several sequences, each in a slot of a batch that holds its prompt."""

    def __init__(self, batch: Batch, table: NDArray[np.floating]) -> None:
        self._batch, self._table = batch, table

    def step(self, active: Sequence[Generation]) -> None:
        """Computes one position of each sequence."""
        started = time.perf_counter()
        embeds = self._table[[one.last_token for one in active]][:, None]
        logits = self._batch.step(embeds, np.array([one.rows for one in active], np.int32))
        seconds = time.perf_counter() - started
        for slot, one in enumerate(active):
            one.receive([logits[slot]], seconds)

    def keep(self, slots: Sequence[int], rows: int) -> None:
        """Moves the caches of the sequences that go on to the first slots."""
        self._batch.copy(slots, 0, rows)


def decode(decoder: Decoder, generations: Sequence[Generation]) -> Iterator[tuple[int, int]]:
    """Yields (index of the generation, token) until every generation has ended.

    Whoever reads the tokens may end a generation early by setting its
    `progress.finish_reason`. The caller has checked that everything fits
    (`CacheBudget`). Raises `NonFiniteError`, `EngineError`.
    """
    active = list(enumerate(generations))
    while active:
        for index, one in active:
            for token in one.take():
                yield index, token
        slots = [slot for slot, (_, one) in enumerate(active) if not one.progress.finish_reason]
        if len(slots) < len(active):
            decoder.keep(slots, max((one.rows for _, one in active), default=0))
            active = [active[slot] for slot in slots]
        if active:
            decoder.step([one for _, one in active])
