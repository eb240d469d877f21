"""The report as data: rows with one outcome each. Runs in the same folder are merged,
and the report is written after every step.

`report.json`: `"format": "infmllm-gpu-check", "version": 1`, then
  machine   `gpus` (name, capability, memory_mb), driver, cuda, packages, python, os
  runs      each run's command, commit and start (UTC)
  rows      see `Row`; the newest row of each (part, model, target, scheme)
  goals, verdict, exit_code    computed from the rows, for convenience
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from runtime.contract.errors import DataError

__all__ = [
    "ABSENT",
    "FAILED",
    "FORMAT",
    "JSON",
    "MEASURED",
    "PASSED",
    "VERSION",
    "Report",
    "Row",
    "read_report",
    "write_report",
]

FORMAT, VERSION, JSON = "infmllm-gpu-check", 1, "report.json"
PASSED, FAILED, MEASURED, ABSENT = "passed", "failed", "measured", "absent"


@dataclass(frozen=True)
class Row:
    """The result of one step. `part` is bandwidth, parity, latency or rounds; `target`
    may be PyTorch; `model`, `target` and `scheme` may be "".

    `outcome` is passed or failed (parity, or any step that broke down), measured, or
    absent. `reason` explains a failed or absent row, where needed. `values` holds the
    figures. For parity: `stages` [{stage, error (null: not finite), tolerance,
    agreement}] and `tokens` (greedy answers to golden prompts). For rounds: lists of
    milliseconds `vision`, `prefill` and `step` for each contender. For latency: the
    figures of `runtime.bench`.
    """

    part: str
    model: str
    target: str
    scheme: str
    outcome: str
    reason: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    commit: str = ""
    started: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Returns the key of the row; a newer row replaces an older one with the same
        key.
        """
        return self.part, self.model, self.target, self.scheme


@dataclass(frozen=True)
class Report:
    """All results for one machine's GPU."""

    machine: Mapping[str, Any]
    runs: tuple[Mapping[str, str], ...] = ()
    rows: tuple[Row, ...] = ()

    def find(self, part: str, model: str = "", target: str = "", scheme: str = "") -> Row | None:
        """Returns the row with that key, or None."""
        return next((row for row in self.rows if row.key == (part, model, target, scheme)), None)

    def of(self, part: str) -> list[Row]:
        """Returns all rows of a part."""
        return [row for row in self.rows if row.part == part]

    def with_row(self, row: Row) -> Report:
        """Returns the report with the row added, or in place of the old row with its
        key. An absent row does not replace a row with results.
        """
        old = next((place for place, known in enumerate(self.rows) if known.key == row.key), None)
        if old is None:
            return replace(self, rows=(*self.rows, row))
        if row.outcome == ABSENT and self.rows[old].outcome != ABSENT:
            return self
        return replace(self, rows=(*self.rows[:old], row, *self.rows[old + 1 :]))


def write_report(path: Path, report: Report, conclusions: Mapping[str, Any]) -> None:
    """Writes the file atomically, so that a run killed at any point leaves a complete
    one.
    """
    text = json.dumps(
        {"format": FORMAT, "version": VERSION, **conclusions, **asdict(report)},
        indent=1,
        allow_nan=False,
    )
    staged = path.with_suffix(".partial")
    staged.write_text(text + "\n")
    staged.replace(path)


def read_report(path: Path) -> Report:
    """Reads a report of an earlier run. Raises `DataError`."""
    try:
        data = json.loads(path.read_bytes())
        if data["format"] != FORMAT or data["version"] != VERSION:
            raise DataError(
                f"{path} is {data['format']!r:.40} version {data['version']!r:.10}, expected "
                f"{FORMAT} {VERSION}; choose another --out"
            )
        return Report(
            data["machine"], tuple(data["runs"]), tuple(Row(**row) for row in data["rows"])
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is no report of ours ({' '.join(str(error).split()):.120}); choose another "
            f"--out"
        ) from None
