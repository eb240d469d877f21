"""The model card of a checkpoint: its training data, training time and scores. It is
saved together with the weights it describes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.contract.files import sha256_file
from runtime.data.bad_rows import Faults
from runtime.data.data_argument import parse_source
from runtime.data.sample import Example
from runtime.evaluation.evaluate import evaluate
from runtime.output.console import track
from trainer.checkpoint import WEIGHTS, load_checkpoint, save_checkpoint
from trainer.datasets import DATASETS
from trainer.evaluate import CheckpointAnswerer
from trainer.model import InfMLLM

__all__ = ["data_card", "save_scored", "time_card"]


def save_scored(
    out: Path,
    model: InfMLLM,
    tokenizer_json: str,
    card: Mapping[str, Any],
    examples: Sequence[Example],
    skip_bad: bool,
) -> None:
    """Saves the checkpoint, scores the saved weights for every number of visual tokens,
    and saves it again with the scores in its card.
    """
    save_checkpoint(out, model, tokenizer_json, card)
    checkpoint = load_checkpoint(out)
    answerer, figures = CheckpointAnswerer(out, checkpoint), {}
    for p in checkpoint.model.spec.pool_sizes:
        shown = track(examples, len(examples), f"scoring {p * p} visual tokens")
        tasks, kinds, _ = evaluate(answerer, shown, p * p, faults=Faults(skip_bad))
        figures[str(p * p)] = {"tasks": tasks.figures(), "kinds": kinds.figures()}
    measured = {"weights_sha256": sha256_file(out / WEIGHTS), "metrics": figures}
    save_checkpoint(out, checkpoint.model, tokenizer_json, {**card, **measured})


def time_card(
    minutes: float, start_from: Path | None, start_card: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns card entries for the training time in minutes: of this run, and in total
    with the checkpoint it started from.
    """
    row: dict[str, Any] = {
        "training_minutes": round(minutes, 1),
        "total_minutes": round(minutes, 1),
        "start_from": None,
    }
    if start_from:
        before = start_card.get("total_minutes", start_card.get("training_minutes", 0.0))
        row["start_from"] = {
            "name": start_from.name,
            "weights_sha256": start_card.get("weights_sha256"),
            "total_minutes": before,
        }
        row["total_minutes"] = round(minutes + before, 1)
    return row


def data_card(texts: Sequence[str]) -> list[dict[str, str]]:
    """Returns one card entry per data argument. Folders are left out of the name; the
    hash is that of the data file (for VOC, of the split's list).
    """
    rows = []
    for text in texts:
        source = parse_source(text, DATASETS)
        options = ",".join(f"{key}={Path(value).name}" for key, value in source.options.items())
        row = {
            "name": ":".join(part for part in (source.name, source.path.name) if part)
            + (f",{options}" if options else "")
        }
        listing = DATASETS[source.name].listing(source)
        if listing.is_file():
            row["sha256"] = sha256_file(listing)
        rows.append(row)
    return rows
