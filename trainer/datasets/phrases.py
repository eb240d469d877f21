"""Grammar helpers for the data sets that write their own sentences."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["article", "listed"]


def article(word: str) -> str:
    """Returns the indefinite article for a word."""
    return "an" if word[0] in "aeiou" else "a"


def listed(parts: Sequence[str]) -> str:
    """Joins parts with commas and a final "and". Returns an empty string if there are
    none.
    """
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else "".join(parts)
