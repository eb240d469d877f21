"""Counting bad rows of data sets: the first one is an error, or, when the user says so,
each is left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from runtime.contract.errors import ContextError, DataError, ImageError, PromptError

__all__ = ["Faults", "field"]

_SHOWN = 3
_ADVICE = "; repair it, or leave out bad rows with --skip-bad"


class Faults:
    """What was wrong with a data set's rows. With `skip` a bad row is counted; without,
    it raises `DataError`.
    """

    def __init__(self, skip: bool = False) -> None:
        self.skip, self.count = skip, 0
        self.first: list[str] = []

    @contextmanager
    def row(self, where: str) -> Iterator[None]:
        """Runs the reading of one row; `where` names file and line (or entry) in
        messages.
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
        """One line for the person; empty when nothing was left out."""
        return (
            f"left out {self.count} bad rows, such as {'; '.join(self.first)}" if self.count else ""
        )


def field(row: object, key: str, kind: type | tuple[type, ...]) -> Any:
    """`row[key]`, checked to be of a type (bool is no number); raises `ValueError`
    saying what was found.
    """
    if not isinstance(row, dict):
        raise ValueError(f"found {type(row).__name__}, expected an object")
    value = row.get(key)
    if (
        not isinstance(value, kind)
        or isinstance(value, bool)
        or (isinstance(value, str) and not value.strip())
    ):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise ValueError(f'"{key}" is {value!r:.40}, expected {kinds}')
    return value
