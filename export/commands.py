"""Runs the commands `build` and `plan` and reports to the user. A build shows a
progress bar with the time left, then parity results or one JSON object.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from calibration.samples import default_source
from export.gate import PROOF_CASES
from export.mixed_precision import Budget, choose_mixture
from export.parity.cpu_reference import open_session
from export.parity.proof import prove
from export.parity.references import (
    MetricCheck,
    check_origin,
    compare_with_checkpoint,
    draw_fresh,
    measure_answers,
    verdict_json,
)
from export.pipeline import STEPS, build
from export.planning.devices import find_device
from export.planning.plan import make_plan
from export.report import print_answers, print_findings, print_stages
from export.schemes import TARGET_SCHEMES, choose_scheme
from export.state import Build, BuildOptions
from export.targets import find_lowering
from runtime.contract.bundle import VERIFIED, read_bundle, verdict_text
from runtime.contract.errors import EngineError, ParityError, UsageError
from runtime.output.console import note, peak_memory_mib, step_bar
from runtime.parity import StageError
from runtime.session import load
from trainer.checkpoint import DEMO, open_checkpoint, read_spec
from trainer.config import find_preset

__all__ = ["ParityOptions", "run_auto", "run_build", "run_parity", "run_plan"]


@dataclass(frozen=True)
class ParityOptions:
    """Options of `infmllm-export parity`: new inputs, questions and their data (empty: the
    training mix), and how many points of accuracy may be lost.
    """

    cases: int = 8
    questions: int = 16
    calib: str = ""
    drop: float = 0.5
    as_json: bool = False


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
        result = build(options, bar.step, bar.detail, note)
    seconds, peak = time.monotonic() - started, peak_memory_mib()
    size = sum(file.stat().st_size for file in options.out.iterdir())
    engines = _engines(options)
    if as_json:
        data: dict[str, Any] = {
            "bundle": str(options.out),
            "verdict": result.verdict,
            "proof": [finding.to_json() for finding in result.findings],
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
    if result.overlap:
        note(f"warning: {result.overlap}")
    print_findings(result.findings)
    print_stages(result.stages)
    print_answers(result.metrics)
    already = (
        ", unchanged: this build already existed"
        if result.reused
        else f", {seconds:.0f} s, at most {peak:.0f} MiB of memory"
    )
    shown = verdict_text(result.verdict, result.metrics.skipped)
    print(f"{shown}: {options.out} ({size / 1e6:.1f} MB{already})")
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


def run_parity(bundle: Path, checkpoint: Path, options: ParityOptions) -> None:
    """Proves a finished bundle equal to its checkpoint and prints every comparison. Raises
    `ParityError` that names the place of a fault.
    """
    stored, parsed = open_checkpoint(checkpoint), read_bundle(bundle)
    parsed.verify()
    check_origin(parsed, stored)
    source = default_source(stored.card, options.calib)
    fresh = draw_fresh(stored, options.cases, source)
    with step_bar(1) as bar:
        bar.step("proving the bundle")
        findings = prove(parsed, stored, fresh[:PROOF_CASES], bar.detail)
    stages: list[StageError] = []
    metrics = MetricCheck(skipped="the proof failed")
    if all(finding.passed for finding in findings):
        session = open_session(bundle)
        stages = compare_with_checkpoint(session, stored, fresh)
        metrics = measure_answers(session, stored, source, options.questions, options.drop)
    if options.as_json:
        data = verdict_json("", findings, stages, metrics, dict(parsed.tolerance))
        print(json.dumps({name: value for name, value in data.items() if name != "verdict"}))
    else:
        print_findings(findings)
        print_stages(stages)
        print_answers(metrics)
    wrong = [str(finding) for finding in findings if not finding.passed]
    wrong += [f"{stage.stage} out of tolerance" for stage in stages if not stage.passed]
    wrong += [] if metrics.passed else [f"accuracy fell by {metrics.drop:.1f} points"]
    if wrong:
        raise ParityError(f"{bundle} is not {checkpoint}'s: {wrong[0]}; build it again")
    if not options.as_json:
        print(f"{verdict_text(VERIFIED, metrics.skipped)}: {bundle} is {checkpoint}'s")


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
