"""Implements the parity gate: makes golden results with PyTorch, and decides whether a
compiled bundle reproduces them and answers questions as well.

The uncached PyTorch model makes the golden results in fp32, block by block. So a
cached, quantised, lowered bundle is compared with the simplest form of the same model,
whatever its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from calibration.blocks import StreamedModel, Trace
from calibration.samples import Case, draw_cases, draw_examples
from export.planning.limits import WHOLE_MODEL
from runtime.contract.bundle import UNVERIFIED, VERIFIED
from runtime.contract.errors import BundleError
from runtime.contract.goldens import Golden
from runtime.data.bad_rows import Faults
from runtime.evaluation.cli import BundleAnswerer
from runtime.evaluation.evaluate import evaluate
from runtime.parity import StageError
from runtime.session import Session
from trainer.checkpoint import StoredCheckpoint, load_checkpoint
from trainer.evaluate import CheckpointAnswerer

__all__ = [
    "METRIC_SEED",
    "MetricCheck",
    "compare_with_checkpoint",
    "goldens_of",
    "measure_answers",
    "verdict_json",
]

_FRESH_SEED, METRIC_SEED = 20232, 20233
_FLIPS = 2  # answers of a small sample that any change of rounding may change


@dataclass(frozen=True)
class MetricCheck:
    """Scores per task in percent (PyTorch's, the bundle's) on the same questions. If
    there are no scores, `skipped` gives the reason.
    """

    scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    count: int = 0
    allowed: float = 0.0
    skipped: str = ""

    @property
    def drop(self) -> float:
        """Points lost on the mean over tasks (negative: points gained)."""
        return sum(torch - found for torch, found in self.scores.values()) / max(
            1, len(self.scores)
        )

    @property
    def passed(self) -> bool:
        """True when the drop is within what is allowed, or nothing was measured."""
        return bool(self.skipped) or self.drop <= self.allowed

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        if not self.scores:
            return {"skipped": self.skipped or "not yet measured"}
        tasks = {
            task: {"pytorch": torch, "bundle": found}
            for task, (torch, found) in self.scores.items()
        }
        return {"tasks": tasks, "count": self.count, "drop": self.drop, "allowed": self.allowed}


def goldens_of(traces: Sequence[Trace]) -> list[Golden]:
    """Makes golden cases from the traces of `StreamedModel.run_blockwise`. The answer's tokens
    are fed one by one, and every step's logits are compared.
    """
    goldens = []
    for trace in traces:
        case, logits, embeds = trace.case, trace.logits, trace.image_embeds
        assert logits is not None and embeds is not None, "a finished walk has results"
        ids = [np.asarray(part, np.int64) for part in (case.before, case.after, case.answer)]
        goldens.append(
            Golden(
                case.pixels, case.pool_size, ids[0], ids[1], embeds, logits[0], ids[2], logits[1:]
            )
        )
    return goldens


def compare_with_checkpoint(
    session: Session, checkpoint: StoredCheckpoint, cases: int, source: str
) -> list[StageError]:
    """Returns the errors of a bundle against its checkpoint, on cases that the bundle
    does not contain. Raises `BundleError` if it was built from another checkpoint.
    """
    built_from = session.bundle.provenance.get("checkpoint_sha256")
    if built_from != checkpoint.sha256:
        raise BundleError(
            f"{session.bundle.path} was built from checkpoint {str(built_from)[:12]}…, but "
            f"{checkpoint.path} is {checkpoint.sha256[:12]}…; give the checkpoint it was built from"
        )
    fresh: list[Case] = draw_cases(
        draw_examples(source, cases, _FRESH_SEED),
        checkpoint.spec,
        checkpoint.tokenizer,
        _FRESH_SEED,
    )
    goldens = goldens_of(StreamedModel(checkpoint.spec, checkpoint.read).run_blockwise(fresh))
    return session.replay(goldens, session.bundle.tolerance)


def measure_answers(
    session: Session,
    checkpoint: StoredCheckpoint,
    source: str,
    images: int,
    allowed: float,
    seed: int = METRIC_SEED,
) -> MetricCheck:
    """Asks PyTorch and the bundle the same questions. The bundle may lose `allowed`
    points, and always at least two answers.
    """
    if images == 0:
        return MetricCheck(skipped="--questions is 0")
    if checkpoint.spec.parameters > WHOLE_MODEL:
        return MetricCheck(
            {},
            skipped=f"a model of {checkpoint.spec.parameters / 1e9:.1f} billion parameters is too "
            f"large for this check; run infmllm-eval on a machine with enough memory",
        )
    examples = draw_examples(source, images, seed)
    reference = CheckpointAnswerer(checkpoint.path, load_checkpoint(checkpoint.path))
    figures = [
        evaluate(answerer, examples, faults=Faults(True))[0].figures()
        for answerer in (reference, BundleAnswerer(session))
    ]
    if not figures[0] or set(figures[0]) != set(figures[1]):
        return MetricCheck(skipped="no question fits the model's context")
    scores = {
        task: (figures[0][task]["accuracy"], figures[1][task]["accuracy"]) for task in figures[0]
    }
    count = int(sum(row["count"] for row in figures[0].values()))
    fewest = min(row["count"] for row in figures[0].values())
    return MetricCheck(scores, count, max(allowed, 100.0 * _FLIPS / (fewest * len(scores))))


def verdict_json(
    stages: Sequence[StageError], metrics: MetricCheck, tolerance: dict[str, float]
) -> dict[str, Any]:
    """Returns the manifest's parity entry."""
    rows = [
        {"stage": s.stage, "error": s.error, "tolerance": s.tolerance, "agreement": s.agreement}
        for s in stages
    ]
    verdict = (
        VERIFIED
        if stages and all(stage.passed for stage in stages) and metrics.passed
        else UNVERIFIED
    )
    return {
        "verdict": verdict,
        "tolerance": tolerance,
        "stages": rows,
        "metrics": metrics.to_json(),
    }
