"""Defines a right answer for each task, and the confidence interval of each figure.
Trainer, compiler and runtime all score with these functions.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from runtime.contract.boxes import Box, iou, parse_box
from runtime.data.sample import Sample
from runtime.evaluation.cider import cider
from runtime.evaluation.vqa_accuracy import vqa_accuracy

__all__ = ["IOU_HIT", "METRIC_NAMES", "Scoreboard", "Scored", "caption_right", "score"]

IOU_HIT = 0.5
"""The least IoU with the reference box at which a predicted box counts as right
(RefCOCO convention).
"""

_SPACES = re.compile(r"\s+")
_LIST = re.compile(r",\s*|\s+and\s+|\s+with\s+")
_Z = 1.959964  # two-sided 95 % quantile of the normal distribution


def _plain(text: str) -> str:
    return _SPACES.sub(" ", text).strip().rstrip(".").lower()


def caption_right(answer: str, expected: str) -> bool:
    """Checks whether two captions name the same things with the same attributes: equal
    lists of phrases, in any order.
    """
    return Counter(_LIST.split(_plain(answer))) == Counter(_LIST.split(_plain(expected)))


@dataclass(frozen=True)
class Scored:
    """One scored answer. `value` is in [0, 1]. For grounding, `iou` and `found` hold
    the IoU and the predicted box. For captions and chat, `answer` and `references` hold
    the texts that CIDEr-D compares.
    """

    value: float
    iou: float | None = None
    found: Box | None = None
    answer: str = ""
    references: tuple[str, ...] = ()


def score(sample: Sample, answer: str) -> Scored:
    """Scores one answer. Grounding compares boxes in [0, 1]; an unreadable box gets IoU
    0.
    """
    references = sample.references or (sample.answer,)
    if sample.task == "ground":
        truth, found = sample.box or parse_box(sample.answer), parse_box(answer)
        overlap = iou(found, truth) if found and truth else 0.0
        return Scored(float(overlap >= IOU_HIT), overlap, found)
    if sample.task == "vqa":
        return Scored(vqa_accuracy(answer, references))
    if sample.task == "caption":
        return Scored(
            float(any(caption_right(answer, text) for text in references)),
            answer=answer,
            references=references,
        )
    return Scored(
        float(_plain(answer) == _plain(sample.answer)), answer=answer, references=references
    )


@dataclass
class Scoreboard:
    """Collects scores by name, such as a task name."""

    scores: dict[str, list[Scored]] = field(default_factory=dict)

    def add(self, name: str, scored: Scored) -> None:
        """Adds one answer's score."""
        self.scores.setdefault(name, []).append(scored)

    def figures(self) -> dict[str, dict[str, float]]:
        """Returns figures per name: the count and the accuracy in percent with its 95 %
        interval. Boxes add the mean IoU with its interval; captions and chat add
        CIDEr-D.
        """
        return {name: _figures(rows) for name, rows in self.scores.items()}


def _figures(rows: Sequence[Scored]) -> dict[str, float]:
    values = [row.value for row in rows]
    low, high = proportion_interval(values)
    figures = {
        "count": len(rows),
        "accuracy": 100 * sum(values) / len(values),
        "low": 100 * low,
        "high": 100 * high,
    }
    overlaps = [row.iou for row in rows if row.iou is not None]
    if overlaps:
        low, high = mean_interval(overlaps)
        figures |= {"mean_iou": sum(overlaps) / len(overlaps), "iou_low": low, "iou_high": high}
    texts = [row for row in rows if row.references]
    if texts:
        scores = cider([row.answer for row in texts], [row.references for row in texts])
        figures["cider"] = 100 * sum(scores) / len(scores)  # the scale of papers; at most 1000
    return figures


def proportion_interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the 95 % interval of the mean of values in [0, 1]: Wilson's interval if
    all are zeros and ones, else the normal approximation.
    """
    if any(value not in (0.0, 1.0) for value in values):
        return mean_interval(values)
    n, share = len(values), sum(values) / len(values)
    centre, spread = (
        share + _Z**2 / (2 * n),
        _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)),
    )
    return max(0.0, (centre - spread) / (1 + _Z**2 / n)), min(
        1.0, (centre + spread) / (1 + _Z**2 / n)
    )


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the 95 % interval of the mean of values in [0, 1] (normal approximation)."""
    n = len(values)
    mean = sum(values) / n
    spread = _Z * math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, n - 1) / n)
    return max(0.0, mean - spread), min(1.0, mean + spread)


METRIC_NAMES: Mapping[str, str] = {
    "caption": "captions with every attribute right",
    "vqa": "answers right",
    "ground": "boxes with IoU of 0.5 or more",
    "chat": "answers equal to the reference",
}
