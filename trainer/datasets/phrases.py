"""Small grammar shared by the data sets that write their own sentences."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["article", "listed"]


def article(word: str) -> str:
    """The indefinite article before a word."""
    return "an" if word[0] in "aeiou" else "a"


def listed(parts: Sequence[str]) -> str:
    """Parts joined by commas and a final "and"; empty for none."""
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else "".join(parts)
