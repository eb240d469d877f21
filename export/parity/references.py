"""Implements the parity gate: makes golden results with PyTorch, and decides whether a
compiled bundle reproduces them and answers questions as well.

The uncached PyTorch model makes the golden results in fp32, block by block. So a
cached, quantised, lowered bundle is compared with the simplest form of the same model,
whatever its size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from calibration.blocks import StreamedModel, Trace
from calibration.parts import FRESH, QUESTIONS
from calibration.samples import Case, draw_cases, draw_examples
from export.parity.finding import Finding
from export.planning.limits import WHOLE_MODEL
from runtime.contract.bundle import Bundle
from runtime.contract.errors import BundleError
from runtime.contract.goldens import Golden
from runtime.data.bad_rows import Faults
from runtime.evaluation.cli import BundleAnswerer
from runtime.evaluation.evaluate import Answerer, evaluate
from runtime.parity import StageError
from runtime.session import Session
from trainer.checkpoint import StoredCheckpoint, load_checkpoint
from trainer.evaluate import CheckpointAnswerer

__all__ = [
    "MetricCheck",
    "check_origin",
    "compare_with_checkpoint",
    "draw_fresh",
    "goldens_of",
    "measure_answers",
    "verdict_json",
]

_WEAK = 60.0  # accuracy in percent below which blank images are tried too
_BETTER = 5.0  # points by which a model that uses its images beats blank ones
_FLIPS = 2  # answers of a small sample that any change of rounding may change


@dataclass(frozen=True)
class MetricCheck:
    """Scores per task in percent (PyTorch's, the bundle's) on the same questions.

    Attributes:
        scores: (PyTorch's, the bundle's) accuracy by task.
        count: How many questions were asked.
        allowed: How many points the bundle may lose on the mean over tasks.
        skipped: Why nothing was asked, or why the scores prove nothing.
        intervals: The 95 % interval of the bundle's accuracy by task.
        left_out: Questions that could not be asked, such as prompts that are too long.
        broken: Questions that PyTorch answers and the bundle does not.
        blind: The bundle's accuracy by task on blank images, where it was measured.
    """

    scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    count: int = 0
    allowed: float = 0.0
    skipped: str = ""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    left_out: int = 0
    broken: int = 0
    blind: dict[str, float] = field(default_factory=dict)

    @property
    def drop(self) -> float:
        """Points lost on the mean over tasks (negative: points gained)."""
        return sum(torch - found for torch, found in self.scores.values()) / max(
            1, len(self.scores)
        )

    @property
    def passed(self) -> bool:
        """True when the drop is within what is allowed, or nothing was measured. A question
        that only PyTorch answers is a failure.
        """
        return not self.broken and (bool(self.skipped) or self.drop <= self.allowed)

    @property
    def weakness(self) -> str:
        """Says that the model itself answers little right; empty if it does not."""
        if not self.blind:
            return ""
        lost = [
            task for task, value in self.blind.items() if self.scores[task][0] <= value + _BETTER
        ]
        if not lost:
            return ""
        shown = ", ".join(
            f"{task} {self.scores[task][0]:.0f} % (blank images: {self.blind[task]:.0f} %)"
            for task in lost
        )
        return (
            f"the model itself answers hardly better than without the image: {shown}; train it "
            f"longer, or on more data"
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        if not self.scores:
            return {"skipped": self.skipped or "not yet measured", "broken": self.broken}
        tasks = {
            task: {"pytorch": torch, "bundle": found}
            for task, (torch, found) in self.scores.items()
        }
        for task, interval in self.intervals.items():
            tasks[task]["interval"] = list(interval)  # type: ignore[assignment]
        for task, value in self.blind.items():
            tasks[task]["blank"] = value
        figures = {"tasks": tasks, "count": self.count, "drop": self.drop, "allowed": self.allowed}
        figures |= {"left_out": self.left_out, "broken": self.broken, "weakness": self.weakness}
        return figures | ({"skipped": self.skipped} if self.skipped else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> MetricCheck:
        """Reads what `to_json` wrote, also in older bundles."""
        tasks = data.get("tasks", {})
        return cls(
            {task: (row["pytorch"], row["bundle"]) for task, row in tasks.items()},
            data.get("count", 0),
            data.get("allowed", 0.0),
            data.get("skipped", ""),
            {task: tuple(row["interval"]) for task, row in tasks.items() if "interval" in row},
            data.get("left_out", 0),
            data.get("broken", 0),
            {task: row["blank"] for task, row in tasks.items() if "blank" in row},
        )


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


def check_origin(bundle: Bundle, checkpoint: StoredCheckpoint) -> None:
    """Raises `BundleError` if a bundle says that it was built from another checkpoint."""
    built_from = bundle.provenance.get("checkpoint_sha256")
    if built_from != checkpoint.sha256:
        raise BundleError(
            f"{bundle.path} was built from checkpoint {str(built_from)[:12]}…, but "
            f"{checkpoint.path} is {checkpoint.sha256[:12]}…; give the checkpoint it was built from"
        )


def draw_fresh(checkpoint: StoredCheckpoint, cases: int, source: str) -> list[Case]:
    """Returns cases that no build of this checkpoint has used."""
    examples = draw_examples(source, cases, FRESH)
    return draw_cases(examples, checkpoint.spec, checkpoint.tokenizer, FRESH.seed)


def compare_with_checkpoint(
    session: Session, checkpoint: StoredCheckpoint, cases: Sequence[Case]
) -> list[StageError]:
    """Returns the errors of a bundle against its checkpoint on the given cases."""
    goldens = goldens_of(StreamedModel(checkpoint.spec, checkpoint.read).run_blockwise(cases))
    return session.replay(goldens, session.bundle.tolerance)


def measure_answers(
    session: Session,
    checkpoint: StoredCheckpoint,
    source: str,
    images: int,
    allowed: float,
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
    examples = draw_examples(source, images, QUESTIONS)
    reference = CheckpointAnswerer(checkpoint.path, load_checkpoint(checkpoint.path))
    answerer = BundleAnswerer(session)
    answerers: tuple[Answerer, Answerer] = (reference, answerer)
    left_out = [Faults(True), Faults(True)]
    boards = [
        evaluate(one, examples, faults=faults)[0]
        for one, faults in zip(answerers, left_out, strict=True)
    ]
    figures = [board.figures() for board in boards]
    broken = max(0, left_out[1].count - left_out[0].count)
    if not figures[0]:
        return MetricCheck(skipped="no question fits the model's context", broken=broken)
    scores = {
        task: (row["accuracy"], figures[1].get(task, {"accuracy": 0.0})["accuracy"])
        for task, row in figures[0].items()
    }
    count = int(sum(row["count"] for row in figures[0].values()))
    fewest = min(row["count"] for row in figures[0].values())
    found = MetricCheck(
        scores,
        count,
        max(allowed, 100.0 * _FLIPS / (fewest * len(scores))),
        "" if any(torch for torch, _ in scores.values()) else "PyTorch itself answers none right",
        {task: (row["low"], row["high"]) for task, row in figures[1].items()},
        left_out[0].count,
        broken,
    )
    if min(torch for torch, _ in scores.values()) >= _WEAK:
        return found
    blank = evaluate(answerer, examples, blank=True, faults=Faults(True))[0].figures()
    return replace(found, blind={task: blank[task]["accuracy"] for task in scores if task in blank})


def verdict_json(
    verdict: str,
    findings: Sequence[Finding],
    stages: Sequence[StageError],
    metrics: MetricCheck,
    tolerance: dict[str, float],
) -> dict[str, Any]:
    """Returns the manifest's parity entry."""
    return {
        "verdict": verdict,
        "proof": [finding.to_json() for finding in findings],
        "tolerance": tolerance,
        "stages": [asdict(stage) for stage in stages],
        "metrics": metrics.to_json(),
    }
