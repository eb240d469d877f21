"""Compares two reports: every metric with its change, whether the change is larger than
the noise, and limits that fail a build.

A limit is written `METRIC>+5%` (change relative to the first report), `METRIC>+50`
(change in the metric's unit) or `METRIC>20` (the value in the second report). `<` works
the same way.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from runtime.bench.metrics import METRICS, noise_percent
from runtime.bench.report import Report
from runtime.bench.tables import figure
from runtime.contract.errors import UsageError

__all__ = ["Change", "Limit", "changes", "different_conditions", "parse_limit", "rows"]

_LIMIT = re.compile(r"\s*(\w+)\s*([<>])\s*([+-]?)(\d+(?:\.\d+)?)\s*(%?)\s*")
# Conditions that must agree for a meaningful comparison of software. Versions may differ, because
# they are usually the subject of the comparison.
_MUST_AGREE = (
    "cpu",
    "board",
    "cores",
    "threads",
    "picture",
    "prompt",
    "prompt_tokens",
    "visual_tokens",
    "max_new_tokens",
)


@dataclass(frozen=True)
class Change:
    """One metric in both reports. `percent` is relative to the first report. A change
    of at most `noise` percent is not significant; None means the noise is unknown.
    """

    name: str
    unit: str
    before: float | None
    after: float | None
    percent: float | None
    noise: float | None
    verdict: str


@dataclass(frozen=True)
class Limit:
    """A parsed limit: the metric, the direction (`above` or below), the number, and
    `of`, the quantity it applies to ("percent", "change" or "value").
    """

    text: str
    metric: str
    above: bool
    number: float
    of: str

    def broken(self, found: Sequence[Change]) -> str:
        """Describes how these changes break this limit; empty if they do not. Raises
        `UsageError` if a report lacks the metric.
        """
        change = next((change for change in found if change.name == self.metric), None)
        if change is None or change.after is None or (change.before is None and self.of != "value"):
            raise UsageError(
                f"--fail-if {self.text!r}: {self.metric} is missing from one of the reports; "
                f"measure it in both, or remove this limit"
            )
        measured = {
            "percent": change.percent,
            "change": change.after - (change.before or 0.0),
            "value": change.after,
        }[self.of]
        if measured is None:
            raise UsageError(
                f"--fail-if {self.text!r}: {self.metric} is 0 in the first report, so it has no "
                f"change in percent; give a limit without %"
            )
        if not (measured > self.number if self.above else measured < self.number):
            return ""
        _, unit, before, after, percent, noise, _ = rows([change])[0]
        return f"{self.text} ({before} to {after} {unit}, {percent}, noise {noise})"


def parse_limit(text: str) -> Limit:
    """Parses one `--fail-if`. Raises `UsageError` that explains the syntax or lists the
    metrics.
    """
    match = _LIMIT.fullmatch(text)
    if match is None:
        raise UsageError(
            f"--fail-if {text!r:.80} is no limit, expected for example 'ttft>+5%', "
            f"'tokens_per_s<-3%' or 'peak_rss_mb>+50'"
        )
    name, sign, plus, digits, percent = match.groups()
    if name not in METRICS:
        raise UsageError(
            f"--fail-if {text!r:.80}: unknown metric {name!r:.40}, choose one of: "
            f"{', '.join(METRICS)}"
        )
    number = float(f"{plus}{digits}")
    of = (
        "value"
        if not plus and (not percent or METRICS[name].unit == "%")
        else "percent"
        if percent
        else "change"
    )
    if not plus and percent and METRICS[name].unit != "%":
        raise UsageError(
            f"--fail-if {text!r:.80}: write '{name}{sign}+{digits}%' for a rise or "
            f"'{name}{sign}-{digits}%' for a fall"
        )
    return Limit(text.strip(), name, sign == ">", number, of)


def changes(before: Report, after: Report) -> list[Change]:
    """Returns every metric that either report has, in the order of `METRICS`."""
    found = []
    for name, metric in METRICS.items():
        old, new = metric.value(before), metric.value(after)
        if old is None and new is None:
            continue
        percent = 1e2 * (new / old - 1) if old and new is not None else None
        noises = [
            noise
            for noise in (noise_percent(metric, before), noise_percent(metric, after))
            if noise is not None
        ]
        noise = math.hypot(*noises) if len(noises) == 2 else None
        found.append(
            Change(
                name,
                metric.unit,
                old,
                new,
                percent,
                noise,
                _verdict(percent, noise, metric.higher_is_better),
            )
        )
    return found


def _verdict(percent: float | None, noise: float | None, higher_is_better: bool) -> str:
    if percent is None:
        return "in one report only"
    if noise is None:
        return "no spread known"
    if abs(percent) <= noise:
        return "within noise"
    return "better" if (percent > 0) == higher_is_better else "worse"


def different_conditions(before: Report, after: Report) -> list[str]:
    """Returns the conditions that make the reports incomparable, such as "threads 1 and
    2".
    """
    old, new = asdict(before.conditions), asdict(after.conditions)
    pairs: list[tuple[str, Any, Any]] = [
        ("model", before.bundle.model, after.bundle.model),
        ("target", before.bundle.target, after.bundle.target),
    ]
    pairs += [(name, old[name], new[name]) for name in _MUST_AGREE]
    return [
        f"{name.replace('_', ' ')} {one} and {other}" for name, one, other in pairs if one != other
    ]


def rows(found: Sequence[Change]) -> list[tuple[str, ...]]:
    """Returns the table's cells: metric, unit, both values, change, noise, verdict."""
    return [
        (
            change.name,
            change.unit,
            figure(change.before),
            figure(change.after),
            "–" if change.percent is None else f"{change.percent:+.1f} %",
            "–" if change.noise is None else f"± {change.noise:.1f} %",
            change.verdict,
        )
        for change in found
    ]
