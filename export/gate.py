"""The parity gate of a build: proves the packed bundle equal to PyTorch, measures what its
rounding costs, and if it fails says where, and what to try.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from export.parity.calibration_check import Origin
from export.parity.cpu_reference import reference_session, replay_forms
from export.parity.drift import find_drift
from export.parity.finding import Finding
from export.parity.proof import prove
from export.parity.references import MetricCheck, measure_answers
from export.parity.subgraphs import replay_in_pieces
from export.planning.limits import LARGE_BYTES
from export.state import Build
from export.targets import find_lowering
from runtime.contract.bundle import EMBEDDINGS, GOLDENS, read_bundle
from runtime.contract.goldens import read_goldens
from runtime.parity import StageError
from runtime.session import load

__all__ = ["PROOF_CASES", "Comparison", "compare", "describe_failure"]

PROOF_CASES = 3  # golden cases that the proof runs block by block


@dataclass(frozen=True)
class Comparison:
    """What the gate found: the proof's comparisons, the cost of rounding by stage, and the
    answers.
    """

    findings: Sequence[Finding]
    stages: Sequence[StageError]
    metrics: MetricCheck

    @property
    def passed(self) -> bool:
        """True if nothing that was compared failed, and the golden cases were compared."""
        return (
            all(finding.passed for finding in self.findings)
            and bool(self.stages)
            and all(stage.passed for stage in self.stages)
            and self.metrics.passed
        )


def compare(build: Build) -> Comparison:
    """Proves the packed bundle, then measures the cost of its rounding and its answers. A
    bundle that fails the proof is not asked.
    """
    findings = prove(
        read_bundle(build.folder),
        build.checkpoint,
        build.goldens[:PROOF_CASES],
        lambda done, total, text: build.detail(done, total, f"proof: {text}"),
        None if build.calibrated is None else Origin(build.calibrated, build.options.scheme),
    )
    if not all(finding.passed for finding in findings):
        return Comparison(findings, [], MetricCheck(skipped="the proof failed"))
    stages, metrics = _cost_of_rounding(build)
    return Comparison(findings, stages, metrics)


def _cost_of_rounding(build: Build) -> tuple[list[StageError], MetricCheck]:
    """Measures golden cases and answers. Graphs too large to load beside PyTorch are
    replayed part by part, and their answers are not compared.
    """
    options, tolerance = build.options, dict(build.options.scheme.tolerance)
    if find_lowering(options.target).compare_on_cpu:
        bundle = read_bundle(build.folder)
        asked = measure_answers(
            reference_session(bundle),
            build.checkpoint,
            build.source,
            options.questions,
            options.scheme.drop,
        )
        return replay_forms(bundle, tolerance), asked
    weights = sum(file.stat().st_size for file in build.folder.glob("*.weights"))
    if weights > LARGE_BYTES:
        table = np.load(build.folder / EMBEDDINGS, mmap_mode="r")
        stages = replay_in_pieces(
            build.folder,
            build.checkpoint.spec,
            table,
            read_goldens(build.folder / GOLDENS),
            tolerance,
        )
        return stages, MetricCheck(
            skipped=f"{weights / 1e9:.1f} GB of weights are too large for this check; run "
            f"infmllm-eval on a machine with enough memory"
        )
    session = load(build.folder, engine_cache=False)
    return session.replay(tolerance=tolerance), measure_answers(
        session, build.checkpoint, build.source, options.questions, options.scheme.drop
    )


def describe_failure(build: Build, found: Comparison) -> str:
    """Describes what differs, where, and what to try."""
    wrong = next((finding for finding in found.findings if not finding.passed), None)
    if wrong is not None:
        remedy = _REMEDY if wrong.check == "rounding" else _REPORT
        return f"the bundle is not its checkpoint's: {wrong}; nothing was written. {remedy}"
    failed = [stage for stage in found.stages if not stage.passed]
    if not failed:
        metrics = found.metrics
        tasks = ", ".join(
            f"{task} {bundle:.1f} of {torch:.1f} %"
            for task, (torch, bundle) in metrics.scores.items()
        )
        worse = (
            f"accuracy fell by {metrics.drop:.1f} points on {metrics.count} questions, "
            f"{metrics.allowed:.1f} are allowed ({tasks})"
        )
        return f"{worse}; nothing was written. {_REMEDY}"
    worst = max(failed, key=lambda stage: stage.error / stage.tolerance)
    return f"{worst.fault}; nothing was written. {_find_drift_place(build, worst.stage)}. {_REMEDY}"


def _find_drift_place(build: Build, stage: str) -> str:
    """Describes where the worst golden case departs from PyTorch. Errors of the search
    become part of the text, because the user must still get the verdict.
    """
    tolerance = dict(build.options.scheme.tolerance)
    if sum(file.stat().st_size for file in build.folder.glob("*.weights")) > LARGE_BYTES:
        return "The graphs are too large to search for the block with the error"
    if find_lowering(build.options.target).compare_on_cpu:
        return "Build with --target cpu to see whether the same error occurs, and in which block"
    try:
        session, goldens = (
            load(build.folder, engine_cache=False),
            read_goldens(build.folder / GOLDENS),
        )
        errors = [
            next(row.error for row in session.replay([golden], tolerance) if row.stage == stage)
            for golden in goldens
        ]
        drift = find_drift(
            build.folder, build.checkpoint, build.goldens[int(np.argmax(errors))], tolerance
        )
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        return f"The block with the error was not found ({' '.join(str(error).split())[:120]})"
    return (
        str(drift)
        if drift
        else "Vision and prefill are within their tolerance; only the decode steps after them "
        "are not"
    )


_REPORT = (
    "This is a fault of this toolchain or of a library, not of your model: report it with the "
    "graphs that --dump FOLDER writes. "
    "--allow-unverified writes the bundle anyway, marked UNVERIFIED"
)
_REMEDY = (
    "Try --calib with images like the training data, --keep BLOCK=fp16 for that block, or a "
    "higher --precision. "
    "--allow-unverified writes the bundle anyway, marked UNVERIFIED"
)
