"""Runs the commands `build` and `plan` and reports to the user. A build shows a
progress bar with the time left, then parity results or one JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from export.mixed_precision import Budget, choose_mixture
from export.pipeline import STEPS, build
from export.planning.devices import find_device
from export.planning.plan import make_plan
from export.schemes import TARGET_SCHEMES, choose_scheme
from export.state import Build, BuildOptions
from export.targets import find_lowering
from runtime.contract.errors import EngineError, UsageError
from runtime.output.console import note, peak_memory_mib, step_bar
from runtime.parity import StageError
from runtime.session import load
from trainer.checkpoint import DEMO, read_spec
from trainer.config import find_preset

__all__ = ["print_stages", "run_auto", "run_build", "run_plan"]


def run_auto(options: BuildOptions, budget: Budget, as_json: bool) -> Build:
    """Finds the cheapest mixture within a budget, prints the measured mixtures, and
    builds the chosen one.
    """
    with step_bar(1) as bar:
        bar.step("choosing a precision for each block")
        scheme, rows = choose_mixture(options, budget, bar.detail)
    note("measured mixtures (*: chosen; nats: predicted divergence from PyTorch's answers)")
    for row in rows:
        nats = f"{row.predicted:.2e}" if row.predicted is not None else "-"
        scores = "  ".join(f"{task} {value:.1f}" for task, value in (row.scores or {}).items())
        note(
            f"{'*' if row.chosen else ' '} {row.name:40} {row.bytes / 1e6:8.2f} MB  predicted "
            f"{nats:>9} nats  {scores}  points lost {row.drop:+.2f}"
        )
    notes = {
        "auto": {
            "max_drop": budget.max_drop,
            "metric": budget.metric,
            "table": [row.to_json() for row in rows],
        }
    }
    return run_build(replace(options, scheme=scheme, notes=notes), as_json)


def run_build(options: BuildOptions, as_json: bool) -> Build:
    """Builds a bundle, shows progress on standard error, and prints the verdict."""
    started = time.monotonic()
    with step_bar(len(STEPS)) as bar:
        result = build(options, bar.step, bar.detail)
    seconds, peak = time.monotonic() - started, peak_memory_mib()
    size = sum(file.stat().st_size for file in options.out.iterdir())
    engines = _engines(options)
    if as_json:
        data: dict[str, Any] = {
            "bundle": str(options.out),
            "verdict": result.verdict,
            "stages": [asdict(stage) for stage in result.stages],
        }
        data |= {
            "metrics": result.metrics.to_json(),
            "bytes": size,
            "seconds": round(seconds, 1),
            "peak_mib": round(peak),
            "reused": result.reused,
            "engines": engines,
        }
        print(json.dumps(data))
        return result
    for graph, step, outcome in result.counts:
        note(
            f"  {graph:8} {step:22} changed {outcome.modified}"
            + "".join(f"; {reason}" for reason in outcome.refused)
        )
    print_stages(result.stages)
    if result.metrics.skipped and not result.reused:
        note(f"answers not compared: {result.metrics.skipped}")
    for task, (torch, found) in result.metrics.scores.items():
        note(f"answers {task:8} PyTorch {torch:.1f} %, bundle {found:.1f} %")
    already = (
        ", unchanged: this build already existed"
        if result.reused
        else f", {seconds:.0f} s, at most {peak:.0f} MiB of memory"
    )
    print(f"{result.verdict}: {options.out} ({size / 1e6:.1f} MB{already})")
    return result


def _engines(options: BuildOptions) -> str:
    """Tries to load a bundle whose engine is built or run on the device, and returns
    the outcome as text. Returns an empty string for other targets.
    """
    if not find_lowering(options.target).compare_on_cpu:
        return ""
    try:
        load(options.out)
        text = "engines for this machine were built and agree with PyTorch"
    except EngineError as error:
        text = f"no engine was built here ({error}); the first infmllm-run on the device builds it"
    note(text)
    return text


def print_stages(stages: Iterable[StageError]) -> None:
    """Prints one line per parity stage on standard error."""
    for stage in stages:
        agreement = (
            f", same token {100 * stage.agreement:.0f} %" if stage.agreement is not None else ""
        )
        verdict = "ok" if stage.passed else "FAILED"
        print(
            f"parity {stage.stage:8} error {stage.error:.3g} (allowed {stage.tolerance:.3g})"
            f"{agreement}  {verdict}",
            file=sys.stderr,
        )


def run_plan(
    checkpoint: Path | None,
    preset: str | None,
    precision: str,
    target: str,
    device: str | None,
    block: int | None,
    kv: str | None,
    context: int | None,
    samples: int,
    as_json: bool,
) -> None:
    """Prints the full plan of one scheme, or a table of all schemes. Raises
    `UsageError` for unknown names.
    """
    find_lowering(target)
    spec = find_preset(preset).spec if preset else read_spec(checkpoint or DEMO)
    chosen = find_device(device)
    names = [precision] if precision else list(TARGET_SCHEMES[target].schemes)
    if not precision and block:
        raise UsageError("--block needs a --precision with 4-bit weights, for example int4")
    plans = {
        name: make_plan(
            spec, choose_scheme(name, block, None, kv, target=target), chosen, context, samples
        )
        for name in names
    }
    if as_json:
        print(json.dumps({name: plan.to_json() for name, plan in plans.items()}))
        return
    print(
        f"{spec.name} ({spec.parameters / 1e6:.1f} M parameters), visual tokens "
        f"{', '.join(str(p * p) for p in spec.pool_sizes)}, on {chosen.name}"
    )
    print(
        f"{'precision':14} {'disk MB':>9} {'build MB':>9} {'run MB':>9} {'first token ms':>15} "
        f"{'tokens/s':>9}  fits"
    )
    for name, plan in plans.items():
        times = plan.latency
        figures = (
            f"{plan.disk_bytes / 1e6:>9.1f} {plan.build_peak / 1e6:>9.0f} "
            f"{plan.run_bytes / 1e6:>9.0f}"
        )
        print(
            f"{name:14} {figures} {times['first_token_ms']:>15.1f} "
            f"{times['tokens_per_second']:>9.1f}  {'yes' if plan.fits else 'NO'}"
        )
        for line in plan.advice:
            print(f"{'':14} {line}")
        if precision:
            for title, parts in (("disk", plan.disk), ("running", plan.run)):
                print(
                    f"  {title}: "
                    + ", ".join(f"{part} {size / 1e6:.1f}" for part, size in parts.items())
                    + " MB"
                )
            print(
                "  at best: "
                + ", ".join(
                    f"{stage.replace('_', ' ')} {value:.1f}" for stage, value in times.items()
                )
            )
