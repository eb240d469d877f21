"""Drafting tokens by looking them up: what followed the last few tokens where they
occurred before, in the question or in the answer.

Drafts are only guesses for `generate` to check in one step (prompt lookup decoding; the
n-gram case of speculative decoding, arXiv 2211.17192).
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Lookup"]

_LONGEST = 3


class Lookup:
    """Remembers where each short run of tokens was last followed by something."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._tokens: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """The text goes on with `token`."""
        for length in range(1, min(_LONGEST, len(self._tokens)) + 1):
            self._places[tuple(self._tokens[-length:])] = len(self._tokens)
        self._tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """Up to `most` tokens that followed the longest run of last tokens seen before;
        none if not even two of them were.
        """
        for length in range(min(_LONGEST, len(self._tokens)), 1, -1):
            place = self._places.get(tuple(self._tokens[-length:]))
            if place is not None:
                return self._tokens[place : place + most]
        return []
