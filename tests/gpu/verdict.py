"""Summarises a report: a one-line verdict, an exit code, and the comparison of greedy
answers. It uses the rows only, so merged reports are judged in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.gpu.goals import MET, MISSED, Result, results
from tests.gpu.record import ABSENT, FAILED, PASSED, Report, Row
from tests.gpu.settings import PYTORCH

__all__ = ["conclusions", "equal_answers", "name_of", "verdict"]

NO_GPU = "NO GPU: nothing was measured"
_NAMED = 4


def name_of(row: Row) -> str:
    """Returns the name of a row for use in a sentence."""
    return " ".join(
        filter(None, (row.model, row.target, row.scheme, "" if row.part == "parity" else row.part))
    )


def verdict(report: Report) -> tuple[str, int]:
    """Returns the one-line verdict and the exit code, which is 1 if anything that ran
    failed.
    """
    failed = [row for row in report.rows if row.outcome == FAILED]
    passed = [row for row in report.rows if row.outcome == PASSED]
    names = ", ".join(gpu["name"] for gpu in report.machine.get("gpus", ())) or "this machine"
    if failed:
        shown = [f"{name_of(row)} ({row.reason or _stages(row)})" for row in failed[:_NAMED]]
        return (
            f"FAILED: {len(failed)} of {len(failed) + len(passed)} checks on {names}: "
            f"{'; '.join(shown)}{' …' if len(failed) > _NAMED else ''}",
            1,
        )
    if passed:
        met, missed = (
            sum(result.outcome == outcome for result in results(report))
            for outcome in (MET, MISSED)
        )
        goals = f"{met} goals met, {missed} missed" if met or missed else "no goal was measured"
        return (
            f"PASSED: {len(passed)} engines and schemes agree with PyTorch on {names}; {goals}",
            0,
        )
    if not report.machine.get("gpus") and all(row.outcome == ABSENT for row in report.rows):
        return NO_GPU, 0
    return f"NOTHING PROVED: none of our engines ran on {names}; the rows say why", 0


def _stages(row: Row) -> str:
    wrong = [stage for stage in row.values.get("stages", ()) if not stage["passed"]]
    words = (
        f"{s['stage']} {'not finite' if s['error'] is None else format(s['error'], '.3g')}, "
        f"allowed {s['tolerance']:.3g}"
        for s in wrong
    )
    return "; ".join(words)


def equal_answers(report: Report, row: Row) -> tuple[int, int] | None:
    """Returns how many greedy answers to the golden prompts equal those of PyTorch fp32
    token for token, and their total. Returns None if either is missing.
    """
    wanted = report.find("parity", row.model, PYTORCH, "fp32")
    if wanted is None or "tokens" not in wanted.values or "tokens" not in row.values:
        return None
    pairs = list(zip(row.values["tokens"], wanted.values["tokens"], strict=True))
    return sum(found == expected for found, expected in pairs), len(pairs)


def conclusions(report: Report) -> Mapping[str, Any]:
    """Returns the JSON fields that are computed from the rows."""
    text, code = verdict(report)
    goals: list[Result] = results(report)
    return {"verdict": text, "exit_code": code, "goals": [goal.to_json() for goal in goals]}
