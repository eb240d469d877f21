"""Bookkeeping of the key/value cache: how many rows are filled, and whether a request fits before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.contract.errors import ContextError

__all__ = ["CacheBudget"]


@dataclass(frozen=True)
class CacheBudget:
    """The rows of one request: prompt text, visual tokens and new tokens against the engine's capacity."""

    capacity: int
    text_tokens: int
    visual_tokens: int

    @property
    def prompt_tokens(self) -> int:
        """Rows filled by prefill."""
        return self.text_tokens + self.visual_tokens

    def allow(self, wanted: int) -> int:
        """How many new tokens can be generated, at most `wanted`; at least one must fit. Raises `ContextError` with the counts."""
        # The last token is never fed back, so it needs no row.
        room = self.capacity - self.prompt_tokens + 1
        if room < 1:
            raise ContextError(
                f"the prompt does not fit: {self.text_tokens} text + {self.visual_tokens} visual tokens, "
                f"the cache holds {self.capacity}; shorten the text, or choose fewer --visual-tokens"
            )
        return min(room, wanted)
