"""What counts as a right answer, for each task. Trainer, compiler and runtime all score with these, so their figures compare."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from runtime.contract.boxes import Box, iou, parse_box

__all__ = ["IOU_HIT", "METRIC_NAMES", "Scoreboard", "Scored", "caption_right", "score", "vqa_right"]

IOU_HIT = 0.5
"""A predicted box counts when its IoU with the true one reaches this (RefCOCO convention)."""

_SPACES = re.compile(r"\s+")
_LIST = re.compile(r",\s*|\s+and\s+")


def _plain(text: str) -> str:
    return _SPACES.sub(" ", text).strip().rstrip(".").lower()


def vqa_right(answer: str, expected: str) -> bool:
    """Equal after lower-casing, folding spaces and dropping a final full stop."""
    return _plain(answer) == _plain(expected)


def caption_right(answer: str, expected: str) -> bool:
    """Names the same things with the same attributes: equal lists of phrases, in any order."""
    return Counter(_LIST.split(_plain(answer))) == Counter(_LIST.split(_plain(expected)))


@dataclass(frozen=True)
class Scored:
    """One scored answer: `right`, and for grounding its IoU."""

    right: bool
    iou: float | None = None


def score(task: str, answer: str, expected: str, box: Box | None = None) -> Scored:
    """Scores one answer. Grounding compares boxes in [0, 1]; an unreadable box has IoU 0."""
    if task == "ground":
        truth, found = box or parse_box(expected), parse_box(answer)
        overlap = iou(found, truth) if found and truth else 0.0
        return Scored(overlap >= IOU_HIT, overlap)
    if task == "caption":
        return Scored(caption_right(answer, expected))
    return Scored(vqa_right(answer, expected))


@dataclass
class Scoreboard:
    """Collects scores per task."""

    scores: dict[str, list[Scored]] = field(default_factory=dict)

    def add(self, task: str, scored: Scored) -> None:
        """Adds one answer's score."""
        self.scores.setdefault(task, []).append(scored)

    def figures(self) -> dict[str, dict[str, float]]:
        """Per task: count, accuracy in percent, and mean IoU where boxes were scored."""
        return {task: _figures(rows) for task, rows in self.scores.items()}


def _figures(rows: Iterable[Scored]) -> dict[str, float]:
    rows = list(rows)
    figures: dict[str, float] = {"count": len(rows), "accuracy": 100.0 * sum(row.right for row in rows) / len(rows)}
    overlaps = [row.iou for row in rows if row.iou is not None]
    if overlaps:
        figures["mean_iou"] = sum(overlaps) / len(overlaps)
    return figures


METRIC_NAMES: Mapping[str, str] = {
    "caption": "captions with every attribute right",
    "vqa": "answers right",
    "ground": "boxes with IoU of 0.5 or more",
    "chat": "answers equal to the reference",
}
