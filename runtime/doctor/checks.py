"""The table of all checks, and a diagnosis: every check asked, and which answers matter
to the targets wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from runtime.contract.errors import UsageError
from runtime.doctor import gpu, host, jetson, libraries
from runtime.doctor.facts import Facts
from runtime.doctor.finding import CPU, CUDA, RTX, TENSORRT, WANTED, Check, Finding

__all__ = ["CHECKS", "Diagnosis", "Result", "choose_targets", "diagnose"]

CHECKS: tuple[Check, ...] = (*host.CHECKS, *gpu.CHECKS, *libraries.CHECKS, *jetson.CHECKS)


@dataclass(frozen=True)
class Result:
    """A check's answer. Where it matters to none of the targets wanted (`aside`), it is
    a note at most.
    """

    check: str
    targets: tuple[str, ...]
    finding: Finding
    aside: bool


@dataclass(frozen=True)
class Diagnosis:
    """All answers, for these targets."""

    targets: tuple[str, ...]
    results: tuple[Result, ...]

    @property
    def problems(self) -> tuple[Result, ...]:
        """What keeps a wanted target from running."""
        return tuple(result for result in self.results if result.finding.level == "problem")


def choose_targets(facts: Facts, wanted: str | None) -> tuple[str, ...]:
    """The target asked for, or (None) the CPU and those that could be meant here: a
    Jetson's, and those whose packages are installed.
    """
    if wanted is not None:
        if wanted not in WANTED:
            raise UsageError(f"unknown target {wanted!r}; choose one of: {', '.join(WANTED)}")
        return (wanted,)
    meant = {
        CPU: True,
        CUDA: "onnxruntime-gpu" in facts.packages,
        TENSORRT: facts.jetson is not None or facts.probes["tensorrt"].installed,
        RTX: bool(facts.plugin),
    }
    return tuple(target for target, here in meant.items() if here)


def diagnose(facts: Facts, targets: Sequence[str]) -> Diagnosis:
    """Asks every check of the table."""
    results = []
    for check in CHECKS:
        if (finding := check.run(facts)) is not None:
            aside = not set(check.targets) & set(targets)
            kept = replace(finding, level="note") if aside and finding.level != "ok" else finding
            results.append(Result(check.name, check.targets, kept, aside))
    return Diagnosis(tuple(targets), tuple(results))
