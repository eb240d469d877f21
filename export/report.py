"""Prints what the parity gate found: the proof, the cost of rounding, the answers."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from export.parity.finding import Finding
from export.parity.references import MetricCheck
from runtime.output.console import note
from runtime.parity import StageError

__all__ = ["print_answers", "print_findings", "print_stages"]


def print_findings(findings: Sequence[Finding]) -> None:
    """Prints one line per kind of comparison of the proof, with its largest error, and one
    for each that failed.
    """
    for check in dict.fromkeys(finding.check for finding in findings):
        rows = [finding for finding in findings if finding.check == check]
        failed = [row for row in rows if not row.passed]
        for row in failed:
            note(f"proof  {row}  FAILED")
        if failed:
            continue
        errors = [row for row in rows if row.error is not None and row.allowed]
        worst = max(errors, key=lambda row: (row.error or 0) / (row.allowed or 1), default=None)
        figures = f" error {worst.error:.2g} (allowed {worst.allowed:.2g})" if worst else ""
        left_out = next((row.place for row in rows if row.place.startswith("not ")), "")
        note(f"proof  {check:11}{figures}  {left_out or 'ok'}")


def print_answers(metrics: MetricCheck) -> None:
    """Prints the answers' scores with their intervals, and what they do not show."""
    for task, (torch, found) in metrics.scores.items():
        low, high = metrics.intervals.get(task, (0.0, 100.0))
        note(
            f"answers {task:8} PyTorch {torch:.1f} %, bundle {found:.1f} % (95 % interval "
            f"{low:.0f} to {high:.0f})"
        )
    if metrics.left_out:
        note(f"answers: {metrics.left_out} questions could not be asked, such as long prompts")
    if metrics.weakness:
        note(f"warning: {metrics.weakness}")


def print_stages(stages: Iterable[StageError]) -> None:
    """Prints one line per parity stage on standard error."""
    for stage in stages:
        agreement = (
            f", the most likely token is PyTorch's in {100 * stage.agreement:.0f} % of rows"
            if stage.agreement is not None
            else ""
        )
        if stage.agreement is not None and stage.agreement < 1 and not stage.flips:
            agreement += " and nearly as likely in the others"
        if stage.divergence is not None:
            agreement += f", divergence {stage.divergence:.2g} nats"
        if stage.allowed_divergence is not None:
            agreement += f" (allowed {stage.allowed_divergence:.2g})"
        verdict = "ok" if stage.passed else "FAILED"
        print(
            f"parity {stage.stage:8} error {stage.error:.3g} (allowed {stage.tolerance:.3g})"
            f"{agreement}  {verdict}",
            file=sys.stderr,
        )
