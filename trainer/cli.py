"""`infmllm-train`: trains a preset on a data source and writes a checkpoint with its card."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from runtime.contract.console import command_app, note, run_command
from runtime.contract.errors import UsageError
from runtime.contract.files import sha256_file

__all__ = ["main"]

app = command_app("Train a compact InfMLLM checkpoint.")
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
    data: Annotated[str, typer.Option(help="synthetic, or a .jsonl file.")] = "synthetic",
    val: Annotated[str, typer.Option(help="Data for the card's figures: synthetic[:COUNT] or a .jsonl file.")] = "synthetic:500",
    stage: Annotated[str, typer.Option(help="all (the preset's recipe) or one stage by name.")] = "all",
    start_from: Annotated[Path | None, typer.Option(help="Checkpoint to continue from, with its tokenizer.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps of every stage. Default: the recipe's.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images per step and process. Default: the recipe's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and data.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads per process. Default: the cores divided among processes.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped; same options, same result.")] = False,
) -> None:
    """Runs the recipe, then scores the saved checkpoint and writes its card."""
    import os

    import torch

    from trainer.checkpoint import WEIGHTS, load_checkpoint, save_checkpoint
    from trainer.config import STAGES, StageRun, find_preset
    from trainer.datasets import open_source
    from trainer.distributed import World
    from trainer.train import TrainOptions, train

    chosen = find_preset(preset)
    if stage != "all" and stage not in STAGES:
        raise UsageError(f"unknown stage {stage!r}; choose all or one of: {', '.join(STAGES)}")
    recipe = chosen.recipe if stage == "all" else tuple(r for r in chosen.recipe if r.stage == stage) or (StageRun(stage, 500, 16, 3e-4),)
    if not recipe:
        raise UsageError(f"preset {preset} has no recipe of its own; name a --stage and a checkpoint to --start-from")
    recipe = tuple(replace(r, steps=steps or r.steps, batch=batch or r.batch) for r in recipe)
    source, world = open_source(data), World()
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // world.size))
    model, tokenizer, tokenizer_json = _start(chosen.spec, start_from, seed)
    options = TrainOptions(out.parent / f".{out.name}.training", seed, json.dumps(_data_card(data)), resume)
    seconds = train(model, tokenizer, source, recipe, options)
    if world.is_main:
        recipe_card = {"preset": preset, "data": _data_card(data), "seed": seed, "processes": world.size, "recipe": [asdict(r) for r in recipe]}
        card = recipe_card | {"training_minutes": round(seconds / 60, 1), "start_from": start_from.name if start_from else None, "val": val}
        save_checkpoint(out, model, tokenizer_json, card)
        scored = load_checkpoint(out)
        measured = {"weights_sha256": sha256_file(out / WEIGHTS), "metrics": _metrics(out, val)}
        save_checkpoint(out, scored.model, tokenizer_json, card | measured)
        note(f"wrote {out}")
    world.wait()


def _start(spec: Any, start_from: Path | None, seed: int) -> tuple[Any, Any, str]:
    """(model, tokenizer, tokenizer.json text): new from the seed, or a checkpoint's."""
    import torch

    from runtime.contract.tokenizer import Tokenizer
    from trainer.checkpoint import TOKENIZER, load_checkpoint
    from trainer.datasets.scene_text import corpus
    from trainer.model import InfMLLM
    from trainer.tokenize import build_tokenizer

    if start_from:
        checkpoint = load_checkpoint(start_from)
        checkpoint.model.train()
        return checkpoint.model, checkpoint.tokenizer, (start_from / TOKENIZER).read_text()
    inner = build_tokenizer(corpus())
    return InfMLLM(spec, torch.Generator().manual_seed(seed)), Tokenizer(inner, spec), inner.to_str()


def _data_card(data: str) -> dict[str, str]:
    path = Path(data)
    return {"name": data} if not path.is_file() else {"name": path.name, "sha256": sha256_file(path)}


def _metrics(out: Path, val: str) -> dict[str, Any]:
    """Figures of the saved checkpoint for every number of visual tokens it serves."""
    from runtime.contract.console import track
    from runtime.contract.evaluation import evaluate, open_examples
    from trainer.evaluate import CheckpointAnswerer

    answerer, examples = CheckpointAnswerer(out), open_examples(val)
    figures = {}
    for p in answerer.checkpoint.model.spec.pool_sizes:
        tasks, kinds, _ = evaluate(answerer, track(examples, len(examples), f"scoring {p * p} visual tokens"), p * p)
        figures[str(p * p)] = {"tasks": tasks.figures(), "kinds": kinds.figures()}
    return figures


def main() -> None:
    """Entry point of `infmllm-train`."""
    run_command(app)


if __name__ == "__main__":
    main()
