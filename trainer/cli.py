"""`infmllm-train`: trains a preset on a data source and writes a checkpoint with its
card.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from runtime.contract.errors import BuildError, UsageError
from runtime.contract.files import check_target
from runtime.evaluation.evaluate import open_examples
from runtime.output.console import command_app, note, run_command

__all__ = ["main"]

T = TypeVar("T")

app = command_app("Train a compact InfMLLM checkpoint.")
_DATA_HELP = (
    "synthetic, a .jsonl file, or NAME:PATH,option=value with NAME one of: coco, vqav2, "
    "refcoco, llava, voc."
)
_EXAMPLES = """
Examples:

    infmllm-train --out checkpoints/demo

    infmllm-train --data train.jsonl --start-from trainer/demo --stage joint --out checkpoints/mine

    torchrun --nproc-per-node 2 -m trainer.cli --batch 16 --out checkpoints/demo
"""


@app.command(epilog=_EXAMPLES)
def run(
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")] = Path(
        "checkpoints/nano"
    ),
    preset: Annotated[str, typer.Option(help="Model size: nano, edge or 7b.")] = "nano",
    data: Annotated[
        list[str] | None, typer.Option(help=f"{_DATA_HELP} Repeat to mix. Default: synthetic.")
    ] = None,
    val: Annotated[
        str, typer.Option(help="Validation data for the scores, written like --data.")
    ] = "synthetic:500",
    stage: Annotated[
        str,
        typer.Option(
            help="all (the preset's recipe), adapt, published, or stages separated by commas."
        ),
    ] = "all",
    start_from: Annotated[
        Path | None, typer.Option(help="Checkpoint whose weights and tokenizer to start from.")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --start-from: new image side in pixels; resizes position embeddings."
        ),
    ] = None,
    new_words: Annotated[
        bool,
        typer.Option(
            "--new-words", help="With --start-from: add the words of the data to the tokenizer."
        ),
    ] = False,
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad", help="Skip and count invalid rows instead of stopping at the first."
        ),
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Optimiser steps of each stage. Default: set by the recipe."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, help="Images per batch and process. Default: set by the recipe."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for weights and data.")] = 0,
    lr: Annotated[
        float | None,
        typer.Option(min=0, help="Peak learning rate of each stage. Default: set by the recipe."),
    ] = None,
    decay: Annotated[
        str | None,
        typer.Option(help="Learning-rate decay: cosine or linear. Default: set by the recipe."),
    ] = None,
    accumulate: Annotated[
        int | None,
        typer.Option(min=1, help="Batches per optimiser step. Default: set by the recipe."),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="auto (bf16 if the hardware supports it, else fp32), bf16 or fp32.")
    ] = "auto",
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing", help="Recompute activations: less memory, but slower."
        ),
    ] = False,
    sample_every: Annotated[
        int,
        typer.Option(min=0, help="Save an image of sample answers every N steps; 0: never."),
    ] = 250,
    workers: Annotated[
        int, typer.Option(min=0, help="Data-loading processes per training process.")
    ] = 1,
    save_minutes: Annotated[float, typer.Option(min=0, help="Minutes between saves.")] = 2.0,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="CPU threads per process. Default: the cores divided among processes."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue a stopped run; the options must be the same."),
    ] = False,
) -> None:
    """Trains a model, then scores the saved checkpoint and adds the scores to its card."""
    from trainer.card import data_card, save_scored, time_card
    from trainer.checkpoint import CONFIG
    from trainer.config import changed, find_preset, find_recipe
    from trainer.datasets import open_source
    from trainer.processes import leave_processes, set_threads
    from trainer.start import begin
    from trainer.train import TrainOptions, train
    from trainer.watch import SHEET_EXAMPLES

    chosen = find_preset(preset)
    recipe = changed(
        find_recipe(chosen, stage),
        {"steps": steps, "batch": batch, "accumulate": accumulate, "lr": lr, "decay": decay},
    )
    source = open_source(data or ["synthetic"], skip_bad)
    set_threads(threads)
    check_target(out, CONFIG)
    start = begin(chosen.spec, seed, start_from, image_size, source.texts() if new_words else ())
    described = data_card(data or ["synthetic"])
    examples = open_examples(val, skip_bad)
    options = TrainOptions(
        state_dir=out.parent / f".{out.name}.training",
        seed=seed,
        identity=json.dumps([described, start.identity]),
        resume=resume,
        save_seconds=60 * save_minutes,
        workers=workers,
        skip_bad=skip_bad,
        precision=precision,
        recompute=gradient_checkpointing,
        sample_every=sample_every,
        samples=examples[:SHEET_EXAMPLES],
    )
    trained = _explain(
        lambda: train(start.model, start.tokenizer, source, recipe, options), options.state_dir
    )
    leave_processes()  # so that other processes do not wait while the main one scores
    if trained.is_main:
        card = {
            "preset": preset,
            "data": described,
            "seed": seed,
            "processes": trained.processes,
            "recipe": [asdict(r) for r in recipe],
        }
        card |= time_card(trained.seconds / 60, start_from, start.card) | {
            "val": data_card([val])[0]["name"]
        }
        save_scored(out, trained.model, start.tokenizer_json, card, examples, skip_bad)
        note(f"wrote {out}; curves: tensorboard --logdir {options.state_dir}")


def _explain(run: Callable[[], T], state_dir: Path) -> T:
    """Calls `run` and returns its result. Turns out-of-memory and write errors into
    one-line errors that suggest a fix.
    """
    import torch

    try:
        return run()
    except torch.OutOfMemoryError:
        raise UsageError(
            "the GPU does not have enough memory; use a smaller --batch with --accumulate, or "
            "--gradient-checkpointing"
        ) from None
    except OSError as error:
        reason = error.strerror or error
        raise BuildError(
            f"cannot write to {state_dir} ({reason}); the last saved state is kept, continue with "
            f"--resume"
        ) from None


def main() -> None:
    """Entry point of `infmllm-train`."""
    run_command(app)


if __name__ == "__main__":
    main()
