"""Training on our own jsonl files: lines about the same picture are packed behind one image."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from runtime.contract.jsonl import read_jsonl
from runtime.contract.sample import Example, Sample

__all__ = ["JsonlSource"]

_MAX_PACKED = 8


class JsonlSource:
    """Draws pictures of a jsonl file uniformly, each with up to 8 of its samples. Raises `DataError` on creation for bad lines."""

    has_dense_labels = False

    def __init__(self, path: Path) -> None:
        grouped: dict[Path, list[Sample]] = defaultdict(list)
        for example in read_jsonl(path):
            assert isinstance(example.picture, Path), "jsonl examples refer to files"
            grouped[example.picture].extend(example.samples)
        self._short = self._groups(grouped, chat=False)
        self._chat = self._groups(grouped, chat=True)

    @staticmethod
    def _groups(grouped: dict[Path, list[Sample]], chat: bool) -> list[tuple[Path, list[Sample]]]:
        kept = ((path, [s for s in samples if (s.task == "chat") == chat]) for path, samples in grouped.items())
        return [(path, samples) for path, samples in kept if samples]

    def draw(self, rng: np.random.Generator, chat: bool, grid: int) -> Example:
        """See `ExampleSource.draw`; falls back to the other kind when the file has only one."""
        groups = (self._chat if chat else self._short) or self._short or self._chat
        path, samples = groups[int(rng.integers(len(groups)))]
        chosen = rng.permutation(len(samples))[:_MAX_PACKED]
        return Example(path, tuple(samples[int(i)] for i in chosen), name=str(path))
