"""Parses data set arguments of the command line: `NAME:PATH,option=value,...`, or just
the path of a .jsonl file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from runtime.contract.errors import UsageError

__all__ = ["DataSource", "parse_source"]

OWN = "jsonl"


@dataclass(frozen=True)
class DataSource:
    """A parsed data argument: the reader's name, the path it reads, and its options.
    `text` is the argument as given.
    """

    name: str
    argument: str
    options: Mapping[str, str] = field(default_factory=dict)
    text: str = ""

    @property
    def path(self) -> Path:
        """The reader's argument as a path."""
        return Path(self.argument)

    def folder(self, option: str) -> Path:
        """Returns the folder that an option names; by default the folder of the data
        file.
        """
        return Path(self.options[option]) if option in self.options else self.path.parent

    def check_options(self, allowed: Collection[str]) -> None:
        """Raises `UsageError` for an option that the reader does not support."""
        unknown = sorted(set(self.options) - set(allowed))
        if unknown:
            raise UsageError(
                f"data {self.text!r}: {self.name} has no option {unknown[0]!r}; it has: "
                f"{', '.join(sorted(allowed)) or 'none'}"
            )


def parse_source(text: str, names: Collection[str]) -> DataSource:
    """Parses a data argument; `names` are the known readers. Text that starts with no
    reader's name is the path of a jsonl file. Raises `UsageError`.
    """
    first, *rest = text.split(",")
    name, _, argument = first.partition(":")
    if name not in names or Path(first).is_file():
        name, argument = OWN, first
    options: dict[str, str] = {}
    for part in rest:
        key, equals, value = part.partition("=")
        if not equals or not key or not value:
            raise UsageError(
                f"data {text!r}: {part!r} is not option=value; write for example "
                f"voc:FOLDER,split=train"
            )
        options[key] = value
    return DataSource(name, argument, options, text)
