"""The result of one comparison of a proof."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """One comparison of a proof.

    Attributes:
        check: Which comparison (see `export.parity.proof`).
        where: The file, or the kind of call.
        passed: Whether it holds.
        place: Where the error is largest, or what is wrong.
        error: The largest error, if it is a number.
        allowed: The bound of the error.
    """

    check: str
    where: str
    passed: bool
    place: str = ""
    error: float | None = None
    allowed: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Finding:
        """Reads what `to_json` wrote."""
        return cls(**data)

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.check}: {self.place or self.where}"
        return (
            f"{self.check}: {self.where}, {self.place} differs from PyTorch by {self.error:.2g} "
            f"(allowed {self.allowed:.2g})"
        )
