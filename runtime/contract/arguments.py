"""Checks the types of arguments that a program passes to the Python API."""

from __future__ import annotations

from numbers import Integral

from runtime.contract.errors import UsageError

__all__ = ["check_text", "whole_number"]


def check_text(name: str, value: object) -> None:
    """Raises `UsageError` unless the argument `name` is text."""
    if not isinstance(value, str):
        raise UsageError(f"{name} is {value!r:.60}, expected text (a str)")


def whole_number(name: str, value: object) -> int | None:
    """Returns the argument `name` as an int, also a NumPy integer; None stays None. Raises
    `UsageError` for anything else, such as "5" or True.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UsageError(f"{name} is {value!r:.60}, expected a whole number or None")
    return int(value)
