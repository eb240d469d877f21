"""The parity gate of a build: compares the packed bundle with PyTorch, and if it drifts says
where the drift begins and what to try.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from export.parity.cpu_reference import reference_session, replay_forms
from export.parity.drift import find_drift
from export.parity.references import MetricCheck, measure_answers
from export.parity.subgraphs import replay_in_pieces
from export.planning.limits import LARGE_BYTES
from export.state import Build
from export.targets import find_lowering
from runtime.contract.bundle import EMBEDDINGS, GOLDENS, read_bundle
from runtime.contract.goldens import read_goldens
from runtime.parity import StageError
from runtime.session import load

__all__ = ["compare", "describe_failure"]


def compare(build: Build) -> tuple[list[StageError], MetricCheck]:
    """Measures parity and answers of the packed bundle. Graphs too large to load beside
    PyTorch are replayed part by part, and their answers are not compared.
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


def describe_failure(build: Build, stages: Sequence[StageError], metrics: MetricCheck) -> str:
    """Describes what drifted, where the drift begins, and what to try."""
    failed = [stage for stage in stages if not stage.passed]
    if not failed:
        tasks = ", ".join(
            f"{task} {found:.1f} of {torch:.1f} %"
            for task, (torch, found) in metrics.scores.items()
        )
        worse = (
            f"accuracy fell by {metrics.drop:.1f} points on {metrics.count} questions, "
            f"{metrics.allowed:.1f} are allowed ({tasks})"
        )
        return f"{worse}; nothing was written. {_REMEDY}"
    worst = max(failed, key=lambda stage: stage.error / stage.tolerance)
    differs = (
        f"{worst.stage} differs from PyTorch by {worst.error:.3g} (relative RMS), the "
        f"scheme allows {worst.tolerance:.3g}; nothing was written. "
    )
    return f"{differs}{_find_drift_place(build, worst.stage)}. {_REMEDY}"


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


_REMEDY = (
    "Try --calib with images like the training data, --keep BLOCK=fp16 for that block, or a "
    "higher --precision. "
    "--allow-unverified writes the bundle anyway, marked UNVERIFIED"
)
