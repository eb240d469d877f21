"""Reads power rails from `tegrastats`, for Jetsons whose sensors this user may not
read: parses its lines to watts and runs the program as a source.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator

from runtime.hardware.power import Integrator

__all__ = ["Tegrastats", "parse_line"]

_PERIOD_MS = 100
# "VDD_IN 5297mW/5101mW" since JetPack 5, "VDD_IN 5297/5101" before: current and average power.
# Memory ("RAM 3276/7859MB") has another unit, so it does not match.
_RAIL = re.compile(r"(?<!\S)([A-Z0-9][A-Z0-9_]*) (\d+)(?:mW)?/\d+(?:mW)?(?!\S)")


def parse_line(line: str) -> dict[str, float]:
    """Returns the current watts per rail; unconnected channels (NC) are left out."""
    return {name: int(milliwatts) / 1e3 for name, milliwatts in _RAIL.findall(line) if name != "NC"}


class Tegrastats(Integrator):
    """The `tegrastats` program as a source; it runs until it is closed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        super().__init__("tegrastats", self._lines())

    @classmethod
    def open(cls) -> Tegrastats | None:
        """Starts `tegrastats`; returns None if it is not installed."""
        path = shutil.which("tegrastats")
        if path is None:
            return None
        return cls(
            subprocess.Popen(
                [path, "--interval", str(_PERIOD_MS)],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )

    def _lines(self) -> Iterator[dict[str, float]]:
        assert self._process.stdout is not None, "it was opened with a pipe"
        for line in self._process.stdout:
            if rails := parse_line(line):
                yield rails

    def close(self) -> None:
        """See `Source.close`."""
        self._process.terminate()
        super().close()
        self._process.wait()
