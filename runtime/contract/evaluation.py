"""Scoring answers over examples, and finding what other packages registered: things that answer, and data sets that can be made.

Synthetic data and checkpoints come from packages the runtime must not import; they register entry points and are found by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Any, Protocol

from PIL import Image

from runtime.contract.errors import UsageError
from runtime.contract.metrics import Scoreboard, score
from runtime.contract.sample import Example, Sample

__all__ = ["ANSWERERS", "DATASETS", "Answerer", "evaluate", "find_plugin", "open_examples"]

ANSWERERS, DATASETS = "infmllm.answerers", "infmllm.datasets"


class Answerer(Protocol):
    """Answers samples; both bundles and checkpoints do."""

    def answer(self, image: Image.Image, sample: Sample, visual_tokens: int | None) -> str:
        """The greedy answer's text."""
        ...


def find_plugin(group: str, name: str) -> Any:
    """Loads what an installed package registered; raises `UsageError` when it, or something it needs, is not installed."""
    for entry in entry_points(group=group, name=name):
        try:
            return entry.load()
        except ImportError as error:
            raise UsageError(f"{name} needs {error.name}, which is not installed; run: pip install 'infmllm-edge[train]'") from None
    raise UsageError(f"{name} is not available in this installation; run: pip install 'infmllm-edge[train]'")


def open_examples(data: str, skip_bad: bool = False) -> list[Example]:
    """Examples of a data argument (see `data_source`), read by whatever package registered readers. Raises `DataError` or `UsageError`."""
    examples: list[Example] = find_plugin(DATASETS, "readers")(data, skip_bad)
    return examples


def evaluate(
    answerer: Answerer, examples: Iterable[Example], visual_tokens: int | None = None
) -> tuple[Scoreboard, Scoreboard, list[dict[str, Any]]]:
    """Scores by task, scores of each kind within a task ("vqa/colour"), and one row per answer."""
    tasks, kinds, rows = Scoreboard(), Scoreboard(), []
    for example in examples:
        image, samples = example.load()
        for sample in samples:
            text = answerer.answer(image, sample, visual_tokens)
            scored = score(sample.task, text, sample.answer, sample.box)
            tasks.add(sample.task, scored)
            if sample.kind and sample.kind != sample.task:
                kinds.add(f"{sample.task}/{sample.kind}", scored)
            rows.append(
                {"name": example.name, "task": sample.task, "text": sample.text, "answer": text, "expected": sample.answer, "right": scored.right}
            )
    return tasks, kinds, rows
