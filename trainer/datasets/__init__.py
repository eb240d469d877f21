"""Data sets for training. `DATASETS` names the sources; anything else given as data is a jsonl file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.datasets.source import ExampleSource

__all__ = ["DATASETS", "open_source"]


def _synthetic() -> ExampleSource:
    from trainer.datasets.scene_text import SceneSource

    return SceneSource()


DATASETS: dict[str, Callable[[], ExampleSource]] = {"synthetic": _synthetic}


def open_source(data: str) -> ExampleSource:
    """A named source, or the jsonl file at that path. Raises `DataError`."""
    if data in DATASETS:
        return DATASETS[data]()
    from trainer.datasets.own import JsonlSource

    return JsonlSource(Path(data))
