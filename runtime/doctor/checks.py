"""The table of all checks, and the diagnosis: runs every check and separates the
results that matter to the wanted targets.
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
    """A check's result. If it matters to none of the wanted targets, `aside` is True
    and its level is lowered to at most "note".
    """

    check: str
    targets: tuple[str, ...]
    finding: Finding
    aside: bool


@dataclass(frozen=True)
class Diagnosis:
    """All results for the given targets."""

    targets: tuple[str, ...]
    results: tuple[Result, ...]

    @property
    def problems(self) -> tuple[Result, ...]:
        """The results that keep a wanted target from running."""
        return tuple(result for result in self.results if result.finding.level == "problem")


def choose_targets(facts: Facts, wanted: str | None) -> tuple[str, ...]:
    """Returns the wanted target. For None, returns the CPU and the targets that are
    likely here: a Jetson's, and those whose packages are installed.
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
    """Runs every check of the table."""
    results = []
    for check in CHECKS:
        if (finding := check.run(facts)) is not None:
            aside = not set(check.targets) & set(targets)
            kept = replace(finding, level="note") if aside and finding.level != "ok" else finding
            results.append(Result(check.name, check.targets, kept, aside))
    return Diagnosis(tuple(targets), tuple(results))
