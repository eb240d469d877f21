"""Handles bad rows of data sets: by default the first one raises an error; with `skip`
each bad row is left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from runtime.contract.errors import ContextError, DataError, ImageError, PromptError, kind_name

__all__ = ["Faults", "field"]

_SHOWN = 3
_ADVICE = "; correct this row, or skip invalid rows with --skip-bad"


class Faults:
    """Collects the bad rows of a data set. With `skip`, a bad row is counted; without
    it, a bad row raises `DataError`.
    """

    def __init__(self, skip: bool = False) -> None:
        self.skip, self.count = skip, 0
        self.first: list[str] = []

    @contextmanager
    def row(self, where: str) -> Iterator[None]:
        """Wraps the reading of one row. `where` names the file and the line (or entry)
        in error messages.
        """
        try:
            yield
        except (
            ContextError,
            DataError,
            ImageError,
            PromptError,
            ValueError,
            OverflowError,
            OSError,
            RecursionError,
        ) as error:
            message = str(error) if where in str(error) else f"{where}: {error}"
            if not self.skip:
                raise DataError(
                    message if message.endswith(_ADVICE) else message + _ADVICE
                ) from None
            self.count += 1
            self.first = [*self.first, message][:_SHOWN]

    def summary(self) -> str:
        """Returns one line for the user; empty when no row was left out."""
        return (
            f"left out {self.count} bad rows, such as {'; '.join(self.first)}" if self.count else ""
        )


def field(row: object, key: str, kind: type | tuple[type, ...]) -> Any:
    """Returns `row[key]` after checking its type; a bool never passes and neither does
    blank text. Raises `ValueError` that shows the value.
    """
    if not isinstance(row, dict):
        raise ValueError(f"found {kind_name(type(row))}, expected an object")
    value = row.get(key)
    if (
        not isinstance(value, kind)
        or isinstance(value, bool)
        or (isinstance(value, str) and not value.strip())
    ):
        kinds = " or ".join(kind_name(k) for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f'"{key}" is {value!r:.40}, expected {kinds}')
    return value
