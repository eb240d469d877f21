"""Bookkeeping of the key/value cache: whether a request fits before anything is
computed, and which of its rows are there already.

Prompts come in segments: the text before the image with the image, the text after it,
then, in a conversation, each answer and each further turn. A segment is always computed
by itself, so that a row is the same to the bit whether the ones before it were computed
now or for an earlier question.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.contract.errors import ContextError
from runtime.engines import Engine
from runtime.generation.sampling import check_finite

__all__ = ["CacheBudget", "Prefix", "Segment"]


@dataclass(frozen=True)
class CacheBudget:
    """The rows of one request: prompt text, visual tokens and new tokens against the
    engine's capacity.
    """

    capacity: int
    text_tokens: int
    visual_tokens: int

    @property
    def prompt_tokens(self) -> int:
        """Rows filled by prefill."""
        return self.text_tokens + self.visual_tokens

    def allow(self, wanted: int) -> int:
        """How many new tokens can be generated, at most `wanted`; at least one must
        fit. Raises `ContextError` with the counts.
        """
        # The last token is never fed back, so it needs no row.
        room = self.capacity - self.prompt_tokens + 1
        if room < 1:
            raise ContextError(
                f"the prompt does not fit: {self.text_tokens} text + {self.visual_tokens} visual "
                f"tokens, "
                f"the cache holds {self.capacity}; shorten the text, or choose fewer "
                f"--visual-tokens"
            )
        return min(room, wanted)


@dataclass(frozen=True)
class Segment:
    """A stretch of a prompt: what it is (`key`), how many rows it fills, and its input
    embeddings [1, rows, H], made when asked for.

    Segments with equal keys behind equal segments fill equal rows. `stepwise` ones,
    answers that were generated, are computed token by token.
    """

    key: Hashable
    rows: int
    embeds: Callable[[], NDArray[np.float32]]
    stepwise: bool = False


@dataclass
class Prefix:
    """What an engine's cache holds: the segments whose rows it starts with."""

    engine: Engine
    _held: list[tuple[Hashable, int]] = field(default_factory=list)

    def _reusable(self, segments: Sequence[Segment]) -> int:
        """How many leading segments are there already. The last one is always computed:
        its logits are wanted.
        """
        count = 0
        for segment, held in zip(segments[:-1], self._held, strict=False):
            if (segment.key, segment.rows) != held:
                break
            count += 1
        return count

    def prefill(self, segments: Sequence[Segment]) -> tuple[NDArray[np.float32], int]:
        """Computes what is missing: the last position's logits [V], valid until the
        engine's next call, and how many rows were there already.
        """
        reused = self._reusable(segments)
        del self._held[reused:]
        cached = start = sum(rows for _, rows in self._held)
        logits: NDArray[np.float32] | None = None
        for segment in segments[reused:]:
            embeds = segment.embeds()
            width = 1 if segment.stepwise else segment.rows
            for at in range(0, segment.rows, width):
                logits = self.engine.forward(embeds[:, at : at + width], start + at)
                check_finite(
                    logits
                )  # of every segment: what follows one that is not finite may look as if it were
            start += segment.rows
            self._held.append((segment.key, segment.rows))
        assert logits is not None, "the last segment is always computed"
        return logits, cached

    def extend(self, key: Hashable, rows: int) -> None:
        """Notes that the cache goes on with `rows` rows that were decoded."""
        if rows:
            self._held.append((key, rows))

    def forget(self) -> None:
        """Before and after anything that leaves the rows in doubt."""
        self._held.clear()
