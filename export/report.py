"""How a build tells the person what it is doing and what came of it: a bar with the time left, then parity, or one JSON object."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from export.pipeline import STEPS, Build, BuildOptions, build
from runtime.contract.console import note, step_bar
from runtime.selftest import StageError

__all__ = ["print_stages", "run_build"]


def run_build(options: BuildOptions, as_json: bool) -> Build:
    """Builds, showing progress on standard error, and prints the verdict."""
    started = time.monotonic()
    with step_bar(len(STEPS)) as bar:
        result = build(options, bar.step, bar.detail)
    seconds, peak = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    size = sum(file.stat().st_size for file in options.out.iterdir())
    if as_json:
        data: dict[str, Any] = {"bundle": str(options.out), "verdict": result.verdict, "stages": [asdict(stage) for stage in result.stages]}
        data |= {"metrics": result.metrics.to_json(), "bytes": size, "seconds": round(seconds, 1), "peak_mib": round(peak), "reused": result.reused}
        print(json.dumps(data))
        return result
    for graph, step, outcome in result.counts:
        note(f"  {graph:8} {step:22} changed {outcome.modified}" + "".join(f"; {reason}" for reason in outcome.refused))
    print_stages(result.stages)
    if result.metrics.skipped and not result.reused:
        note(f"answers not compared: {result.metrics.skipped}")
    for task, (torch, found) in result.metrics.scores.items():
        note(f"answers {task:8} PyTorch {torch:.1f} %, bundle {found:.1f} %")
    already = ", the same build was already there" if result.reused else f", {seconds:.0f} s, at most {peak:.0f} MiB of memory"
    print(f"{result.verdict}: {options.out} ({size / 1e6:.1f} MB{already})")
    return result


def print_stages(stages: Iterable[StageError]) -> None:
    """One line per parity stage, on standard error."""
    for stage in stages:
        agreement = f", same token {100 * stage.agreement:.0f} %" if stage.agreement is not None else ""
        verdict = "ok" if stage.passed else "FAILED"
        print(f"parity {stage.stage:8} {stage.error:.3g} of {stage.tolerance:.3g} allowed{agreement}  {verdict}", file=sys.stderr)
