"""Prompt-lookup speculative decoding: drafts the tokens that followed the latest n-gram
where it occurred before, in the question or in the answer.

A draft is only a guess. `runtime.generation.generate` verifies it in one call of the
decoder (speculative decoding, arXiv 2211.17192).
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["PromptLookup"]

_LONGEST_NGRAM = 3
_SHORTEST_NGRAM = 2  # after one token alone, too many drafts are wrong


class PromptLookup:
    """An index of n-grams: where each was last followed by another token."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._tokens: list[int] = []
        self._positions: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """Appends a token to the text that is searched."""
        for length in range(1, min(_LONGEST_NGRAM, len(self._tokens)) + 1):
            self._positions[tuple(self._tokens[-length:])] = len(self._tokens)
        self._tokens.append(token)

    def draft(self, limit: int) -> list[int]:
        """Returns up to `limit` tokens that followed the longest known n-gram; an empty
        list if no n-gram of at least two tokens is known.
        """
        for length in range(min(_LONGEST_NGRAM, len(self._tokens)), _SHORTEST_NGRAM - 1, -1):
            position = self._positions.get(tuple(self._tokens[-length:]))
            if position is not None:
                return self._tokens[position : position + limit]
        return []
