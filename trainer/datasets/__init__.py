"""Data sets, one module each. `DATASETS` lists the readers; each of them yields
`Sample`s. Needs numpy and Pillow only.

A data argument is `NAME:PATH,option=value,...` or the path of a .jsonl file. Several
data arguments are mixed by their `weight` option.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.contract.errors import DataError, UsageError
from runtime.data.bad_rows import Faults
from runtime.data.data_argument import DataSource, parse_source
from runtime.data.jsonl import read_jsonl
from runtime.data.sample import Example
from runtime.output.console import note
from trainer.datasets import coco, held_out, llava, refcoco, scene_text, voc, vqav2
from trainer.datasets.augment import Augmentation, find_augmentation
from trainer.datasets.draw import ExampleSource, ListedSource, Mixture

__all__ = ["DATASETS", "DataSet", "open_source", "read_examples"]

Reader = Callable[[DataSource, Faults], list[Example]]
_COMMON = ("weight", "augment")


@dataclass(frozen=True)
class DataSet:
    """How one kind of data is read. `read` lists the examples in file order. `source`,
    if set, makes the training source where a plain list of examples is not enough.

    `listing` returns the file whose hash identifies the data on a card.
    """

    read: Reader
    options: tuple[str, ...] = ()
    augment: str = "none"
    source: Callable[[DataSource, Faults, Augmentation], ExampleSource] | None = None
    listing: Callable[[DataSource], Path] = lambda source: source.path


DATASETS: dict[str, DataSet] = {
    "jsonl": DataSet(lambda source, faults: read_jsonl(source.path, faults)),
    "coco": DataSet(coco.read, ("images",), "crop"),
    "vqav2": DataSet(vqav2.read, ("images", "answers"), "crop"),
    "refcoco": DataSet(refcoco.read, ("images",), "crop"),
    "llava": DataSet(llava.read, ("images",)),
    "voc": DataSet(voc.read, ("split", "names", "scene"), "photo", voc.open_source, voc.listing),
    "synthetic": DataSet(
        held_out.read, source=lambda source, faults, augment: scene_text.SceneSource()
    ),
}


def _parse(text: str) -> tuple[DataSource, DataSet]:
    source = parse_source(text, DATASETS)
    row = DATASETS[source.name]
    source.check_options((*row.options, *_COMMON))
    return source, row


def read_examples(text: str, skip_bad: bool = False) -> list[Example]:
    """Returns all examples of one data argument, for evaluation. Raises `DataError` or
    `UsageError`.
    """
    source, row = _parse(text)
    faults = Faults(skip_bad)
    examples = row.read(source, faults)
    _tell(text, faults)
    if not examples:
        raise DataError(f"data {text!r} has no samples left; check the file and its format")
    return examples


def _tell(text: str, faults: Faults) -> None:
    """Reports the skipped rows once, no matter how many processes read the data."""
    if (summary := faults.summary()) and os.environ.get("RANK", "0") == "0":
        note(f"{text}: {summary}")


def _weight(source: DataSource) -> float:
    text = source.options.get("weight", "1")
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise UsageError(f"data {source.text!r}: weight is {text!r}, expected a positive number")
    return value


def open_source(texts: Sequence[str], skip_bad: bool = False) -> ExampleSource:
    """Opens the training source: one data set, or several mixed by weight. Raises
    `DataError` or `UsageError`.
    """
    sources: list[ExampleSource] = []
    weights: list[float] = []
    for text in texts:
        source, row = _parse(text)
        augment, faults = (
            find_augmentation(source.options.get("augment", row.augment)),
            Faults(skip_bad),
        )
        made = (
            row.source(source, faults, augment)
            if row.source
            else ListedSource(row.read(source, faults), augment, text, skip_bad)
        )
        _tell(text, faults)
        sources.append(made)
        weights.append(_weight(source))
    if len(sources) == 1:
        return sources[0]
    return Mixture(sources, weights)
