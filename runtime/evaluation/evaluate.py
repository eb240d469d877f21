"""Scores answers over examples, and finds the answerers and data sets that other
packages register.

Synthetic data and checkpoints come from packages that the runtime must not import.
These packages register entry points, which are found by name.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol

from PIL import Image

from runtime.contract.errors import UsageError
from runtime.contract.image import MEAN_COLOUR
from runtime.data.bad_rows import Faults
from runtime.data.sample import Example, Sample
from runtime.evaluation.metrics import Scoreboard, Scored, score
from runtime.output.draw_boxes import draw_boxes, truth_and_found

__all__ = [
    "ANSWERERS",
    "DATASETS",
    "AnswerRow",
    "Answerer",
    "evaluate",
    "find_plugin",
    "open_examples",
]

ANSWERERS, DATASETS = "infmllm.answerers", "infmllm.datasets"
_THUMBNAIL, _RIGHT_PICTURED = 256, 400


class Answerer(Protocol):
    """Answers samples; bundles and checkpoints both have an implementation."""

    def answer(self, image: Image.Image, sample: Sample, visual_tokens: int | None) -> str:
        """Returns the text of the greedy answer."""
        ...


def find_plugin(group: str, name: str) -> Any:
    """Loads the object that an installed package registered. Raises `UsageError` if it,
    or a package it needs, is not installed.
    """
    for entry in entry_points(group=group, name=name):
        try:
            return entry.load()
        except ImportError as error:
            raise UsageError(
                f"{name} needs {error.name}, which is not installed; run: pip install "
                f"'infmllm-edge[train]'"
            ) from None
    raise UsageError(
        f"{name} is not available in this installation; run: pip install 'infmllm-edge[train]'"
    )


def open_examples(data: str, skip_bad: bool = False) -> list[Example]:
    """Reads the examples of a data argument (see `runtime.data.data_argument`) with the
    readers that another package registered. Raises `DataError` or `UsageError`.
    """
    examples: list[Example] = find_plugin(DATASETS, "readers")(data, skip_bad)
    return examples


@dataclass(frozen=True)
class AnswerRow:
    """One scored answer with the data that a report shows. `thumbnail` is a JPEG with
    the reference box and the predicted box; it is empty if none was made.
    """

    name: str
    sample: Sample
    answer: str
    scored: Scored
    thumbnail: bytes = b""

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON-ready dict."""
        row: dict[str, Any] = {
            "name": self.name,
            "task": self.sample.task,
            "kind": self.sample.kind,
            "text": self.sample.text,
            "answer": self.answer,
        }
        row |= {
            "expected": self.sample.answer,
            "value": self.scored.value,
            "right": self.scored.value >= 0.5,
        }
        return row | ({"iou": self.scored.iou} if self.scored.iou is not None else {})


def evaluate(
    answerer: Answerer,
    examples: Iterable[Example],
    visual_tokens: int | None = None,
    blank: bool = False,
    thumbnails: bool = False,
    faults: Faults | None = None,
) -> tuple[Scoreboard, Scoreboard, list[AnswerRow]]:
    """Returns scores by task, scores by kind within a task ("vqa/colour"), and one row
    per answer.

    With `blank`, the model sees a plain image of the mean colour, so the score shows
    how much the questions alone reveal. `thumbnails` are made for all answers that are
    not fully right and for the first fully right ones, up to a limit. An unusable image
    or a prompt that is too long is reported to `faults`, which by default raises an
    error.
    """
    tasks, kinds, rows = Scoreboard(), Scoreboard(), list[AnswerRow]()
    faults, right = faults or Faults(), 0
    for example in examples:
        found: list[AnswerRow] = []
        with faults.row(example.name):
            image, samples = example.load()
            shown = Image.new("RGB", image.size, MEAN_COLOUR) if blank else image
            for sample in samples:
                text = answerer.answer(shown, sample, visual_tokens)
                scored = score(sample, text)
                right += scored.value == 1
                pictured = thumbnails and (scored.value < 1 or right <= _RIGHT_PICTURED)
                found.append(
                    AnswerRow(
                        example.name,
                        sample,
                        text,
                        scored,
                        _thumbnail(shown, sample, scored) if pictured else b"",
                    )
                )
        for row in found:
            tasks.add(row.sample.task, row.scored)
            if row.sample.kind and row.sample.kind != row.sample.task:
                kinds.add(f"{row.sample.task}/{row.sample.kind}", row.scored)
        rows += found
    return tasks, kinds, rows


def _thumbnail(image: Image.Image, sample: Sample, scored: Scored) -> bytes:
    small = image.copy()
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    data = io.BytesIO()
    draw_boxes(small, truth_and_found(small.size, sample.box, scored.found)).save(
        data, "JPEG", quality=80, subsampling=0
    )
    return data.getvalue()
