"""Bookkeeping of the key/value cache: checks whether a request fits before anything is
computed, and tracks which rows are already in the cache.

Prompts are divided into segments: the text before the image together with the image,
the text after it and, in a conversation, each answer and each further turn. A segment
is always computed by itself. A row is therefore bit-identical whether the rows before
it were computed now or for an earlier question.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from runtime.contract.errors import ContextError
from runtime.engines import Engine
from runtime.engines.logits import check_finite

__all__ = ["CacheBudget", "PrefixCache", "Segment"]


@dataclass(frozen=True)
class CacheBudget:
    """The cache rows of one request: prompt text, visual tokens and new tokens,
    compared with the engine's capacity.
    """

    capacity: int
    text_tokens: int
    visual_tokens: int

    @property
    def prompt_tokens(self) -> int:
        """Number of rows filled by prefill."""
        return self.text_tokens + self.visual_tokens

    def allow(self, wanted: int) -> int:
        """Returns how many new tokens can be generated, at most `wanted`. Raises a
        `ContextError` with the counts if not even one fits.
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

    Segments with equal keys behind equal segments fill equal rows. `decoded` ones,
    answers that were generated, are computed token by token.
    """

    key: Hashable
    rows: int
    embeds: Callable[[], NDArray[np.float32]]
    decoded: bool = False


@dataclass
class PrefixCache:
    """Knows which segments the engine's cache begins with, and computes only the rest."""

    engine: Engine
    _held: list[tuple[Hashable, int]] = field(default_factory=list)

    def _reusable(self, segments: Sequence[Segment]) -> int:
        """Counts the leading segments that are in the cache already. The last segment
        is always computed, because its logits are needed.
        """
        count = 0
        for segment, held in zip(segments[:-1], self._held, strict=False):
            if (segment.key, segment.rows) != held:
                break
            count += 1
        return count

    def prefill(self, segments: Sequence[Segment]) -> tuple[NDArray[np.float32], int]:
        """Computes the segments that are missing.

        Returns the logits [V] of the last position, valid until the engine's next call,
        and how many rows were in the cache already. Raises `NonFiniteError`.
        """
        reused = self._reusable(segments)
        del self._held[reused:]
        cached = start = sum(rows for _, rows in self._held)
        logits: NDArray[np.float32] | None = None
        for segment in segments[reused:]:
            embeds = segment.embeds()
            width = 1 if segment.decoded else segment.rows
            for at in range(0, segment.rows, width):
                logits = self.engine.forward(embeds[:, at : at + width], start + at)
                # Later segments can hide a non-finite value, so every segment is checked.
                check_finite(logits)
            start += segment.rows
            self._held.append((segment.key, segment.rows))
        assert logits is not None, "the last segment is always computed"
        return logits, cached

    def extend(self, key: Hashable, rows: int) -> None:
        """Records that `rows` decoded rows follow in the cache."""
        if rows:
            self._held.append((key, rows))

    def clear(self) -> None:
        """Forgets all rows, before and after anything that may have changed them."""
        self._held.clear()
