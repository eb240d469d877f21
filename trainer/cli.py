"""`infmllm-train`: trains a preset on a data source and writes a checkpoint with its card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from runtime.contract.console import command_app, note, run_command
from runtime.contract.data_source import parse_source
from runtime.contract.errors import UsageError
from runtime.contract.evaluation import open_examples
from runtime.contract.faults import Faults
from runtime.contract.files import check_target, sha256_file
from runtime.contract.sample import Example
from trainer.config import StageRun
from trainer.datasets import DATASETS

__all__ = ["main"]

app = command_app("Train a compact InfMLLM checkpoint.")
_DATA_HELP = "synthetic, a .jsonl file, or NAME:PATH,option=value with NAME one of: coco, vqav2, refcoco, llava, voc."
_EXAMPLES = """
Examples:

    infmllm-train --out checkpoints/demo

    infmllm-train --data train.jsonl --start-from checkpoints/demo --stage instruction --out checkpoints/mine

    torchrun --nproc-per-node 2 -m trainer.cli --batch 16 --out checkpoints/demo
"""


@app.command(epilog=_EXAMPLES)
def run(
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")] = Path("checkpoints/nano"),
    preset: Annotated[str, typer.Option(help="Model shape and recipe.")] = "nano",
    data: Annotated[list[str] | None, typer.Option(help=f"{_DATA_HELP} Repeat to mix. Default: synthetic.")] = None,
    val: Annotated[str, typer.Option(help="Data for the card's figures, named likewise.")] = "synthetic:500",
    stage: Annotated[str, typer.Option(help="all (the preset's recipe), adapt, published, or stages separated by commas.")] = "all",
    start_from: Annotated[Path | None, typer.Option(help="Checkpoint to continue from, with its tokenizer.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="With --start-from: side of the square picture; positions are resized.")] = None,
    new_words: Annotated[bool, typer.Option("--new-words", help="With --start-from: let the tokenizer learn the data's words.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out bad rows and count them, instead of stopping.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps of every stage. Default: the recipe's.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images per step and process. Default: the recipe's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and data.")] = 0,
    accumulate: Annotated[int | None, typer.Option(min=1, help="Batches per optimiser step. Default: the recipe's.")] = None,
    precision: Annotated[str, typer.Option(help="auto (bf16 where the hardware multiplies it), bf16 or fp32.")] = "auto",
    gradient_checkpointing: Annotated[bool, typer.Option("--gradient-checkpointing", help="Recompute activations: less memory, more time.")] = False,
    sample_every: Annotated[int, typer.Option(min=0, help="Optimiser steps between sheets of sample answers; 0 for none.")] = 250,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read pictures, per training process.")] = 1,
    save_minutes: Annotated[float, typer.Option(min=0, help="Minutes between saved states.")] = 2.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads per process. Default: the cores divided among processes.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped; same options, same result.")] = False,
) -> None:
    """Runs the recipe, then scores the saved checkpoint and writes its card."""
    import torch

    from trainer.checkpoint import CONFIG, WEIGHTS, load_checkpoint, save_checkpoint
    from trainer.config import find_preset, find_recipe
    from trainer.datasets import open_source
    from trainer.processes import leave_processes, set_threads
    from trainer.start import new_start, start_from_checkpoint
    from trainer.train import TrainOptions, train
    from trainer.watch import SHEET_EXAMPLES

    chosen = find_preset(preset)
    if start_from is None and (image_size or new_words):
        raise UsageError("--image-size and --new-words change a checkpoint; name one with --start-from")
    recipe = tuple(_shortened(replace(r, batch=batch or r.batch), steps) for r in find_recipe(chosen, stage))
    if accumulate:
        recipe = tuple(replace(r, accumulate=accumulate) for r in recipe)
    source = open_source(data or ["synthetic"], skip_bad)
    set_threads(threads)
    check_target(out, CONFIG)
    start = start_from_checkpoint(start_from, image_size, source.texts() if new_words else ()) if start_from else new_start(chosen.spec, seed)
    data_card = _data_card(data or ["synthetic"])
    examples = open_examples(val, skip_bad)
    options = TrainOptions(
        state_dir=out.parent / f".{out.name}.training",
        seed=seed,
        identity=json.dumps([data_card, start.identity]),
        resume=resume,
        save_seconds=60 * save_minutes,
        workers=workers,
        skip_bad=skip_bad,
        precision=precision,
        recompute=gradient_checkpointing,
        sample_every=sample_every,
        samples=examples[:SHEET_EXAMPLES],
    )
    try:
        trained = train(start.model, start.tokenizer, source, recipe, options)
    except torch.OutOfMemoryError:
        raise UsageError("the GPU has not enough memory; use a smaller --batch with --accumulate, or --gradient-checkpointing") from None
    leave_processes()  # the others need not wait for the scores
    if trained.is_main:
        card = {"preset": preset, "data": data_card, "seed": seed, "processes": trained.processes, "recipe": [asdict(r) for r in recipe]}
        card |= _time_card(trained.seconds / 60, start_from, start.card) | {"val": _data_card([val])[0]["name"]}
        save_checkpoint(out, trained.model, start.tokenizer_json, card)
        scored = load_checkpoint(out)
        measured = {"weights_sha256": sha256_file(out / WEIGHTS), "metrics": _metrics(out, examples, skip_bad)}
        save_checkpoint(out, scored.model, start.tokenizer_json, card | measured)
        note(f"wrote {out}; curves: tensorboard --logdir {options.state_dir}")


def _shortened(run: StageRun, steps: int | None) -> StageRun:
    """The run with other steps, of which at most a fifth warm up."""
    return replace(run, steps=steps, warmup=min(run.warmup, max(1, steps // 5))) if steps else run


def _time_card(minutes: float, start_from: Path | None, start_card: Mapping[str, Any]) -> dict[str, Any]:
    """Minutes of this run, and with those of the checkpoint it started from."""
    row: dict[str, Any] = {"training_minutes": round(minutes, 1), "total_minutes": round(minutes, 1), "start_from": None}
    if start_from:
        before = start_card.get("total_minutes", start_card.get("training_minutes", 0.0))
        row["start_from"] = {"name": start_from.name, "weights_sha256": start_card.get("weights_sha256"), "total_minutes": before}
        row["total_minutes"] = round(minutes + before, 1)
    return row


def _data_card(texts: Sequence[str]) -> list[dict[str, str]]:
    """Each data argument with folders left out, and the hash of the file it names (of a VOC split's listing)."""
    rows = []
    for text in texts:
        source = parse_source(text, DATASETS)
        options = ",".join(f"{key}={Path(value).name}" for key, value in source.options.items())
        row = {"name": ":".join(part for part in (source.name, source.path.name) if part) + (f",{options}" if options else "")}
        listing = source.path / "ImageSets" / "Main" / f"{source.options.get('split', 'train')}.txt"
        for path in (source.path, listing):
            if path.is_file():
                row["sha256"] = sha256_file(path)
        rows.append(row)
    return rows


def _metrics(out: Path, examples: Sequence[Example], skip_bad: bool) -> dict[str, Any]:
    """Figures of the saved checkpoint for every number of visual tokens it serves."""
    from runtime.contract.console import track
    from runtime.contract.evaluation import evaluate
    from trainer.evaluate import CheckpointAnswerer

    answerer = CheckpointAnswerer(out)
    figures = {}
    for p in answerer.checkpoint.model.spec.pool_sizes:
        tasks, kinds, _ = evaluate(answerer, track(examples, len(examples), f"scoring {p * p} visual tokens"), p * p, faults=Faults(skip_bad))
        figures[str(p * p)] = {"tasks": tasks.figures(), "kinds": kinds.figures()}
    return figures


def main() -> None:
    """Entry point of `infmllm-train`."""
    run_command(app)


if __name__ == "__main__":
    main()
