"""The training loop: a recipe of stages over a stream of batches, resumable to the bit.

Batches are a function of (seed, step), the optimiser state is saved with the step, so a killed run continued with `resume` ends with the weights
of one that was never stopped. Progress shows loss, speed and time left.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader

from runtime.contract.errors import CheckpointError, UsageError
from runtime.contract.files import sync_file
from runtime.contract.tokenizer import Tokenizer
from trainer.batch import IGNORE, Batch, block_mask
from trainer.config import STAGES, Stage, StageRun
from trainer.datasets.draw import ExampleSource
from trainer.datasets.source import BatchStream
from trainer.distributed import World
from trainer.loss import AnswerLoss, DenseHead
from trainer.model import InfMLLM

__all__ = ["TrainOptions", "train"]

_BETAS = (0.9, 0.98)
_CLIP = 1.0
_LOG_EVERY = 10


@dataclass(frozen=True)
class TrainOptions:
    """Where and how often to save, the seed, and whether to go on from a saved state."""

    state_dir: Path
    seed: int = 0
    data: str = ""  # what identifies the data, so that a resumed run has the same
    resume: bool = False
    save_seconds: float = 120.0
    stop_after: int | None = None  # total optimiser steps in this process, for tests of resuming
    workers: int = 1


def learning_rate(run: StageRun, step: int) -> float:
    """Linear warm-up from 0, then half a cosine down to the floor: (1-r)*f + r."""
    if step < run.warmup:
        return run.lr * (step + 1) / run.warmup
    progress = (step - run.warmup) / max(1, run.steps - run.warmup)
    return run.lr * ((1 - run.floor) * 0.5 * (1 + math.cos(math.pi * progress)) + run.floor)


class _Trainer:
    """Model, read-out head and losses of one run."""

    def __init__(self, model: InfMLLM, tokenizer: Tokenizer, world: World, classes: Sequence[int], seed: int) -> None:
        self.model, self.tokenizer, self.world = model, tokenizer, world
        self.head = DenseHead(model.spec.vision.width, classes, torch.Generator().manual_seed(seed))
        self.answer_loss = AnswerLoss(tokenizer, model.spec.decoder.vocab_size)

    def loss(self, batch: Batch, stage: Stage) -> tuple[Tensor, dict[str, float]]:
        """The stage's objective on one batch, and figures to show."""
        model, shown = self.model, dict[str, float]()
        with torch.set_grad_enabled(stage.tower > 0):
            patches, early = model.vision_tower.with_early_features(batch.pixels)
        total = torch.zeros(())
        if batch.dense is not None and (stage.objective == "dense" or stage.dense_weight):
            dense, accuracy = self.head.loss(patches, early, batch.dense)
            total = total + dense * (stage.dense_weight or 1.0)
            shown |= {"dense": dense.item(), "patch accuracy": accuracy.item()}
        if stage.objective == "language":
            answer = self._answer_loss(batch, patches)
            total = total + answer
            shown["answer"] = answer.item()
        return total, shown

    def _answer_loss(self, batch: Batch, patches: Tensor) -> Tensor:
        model = self.model
        images = model.pool_adapter(patches, model.pool_tensor(batch.p))
        embeds = model.decoder.embed_tokens(batch.ids.clamp_min(0))
        embeds = embeds.masked_scatter(batch.image_slots[..., None], images)
        hidden, _ = model.decoder(embeds, batch.positions, block_mask(batch.segments))
        answers = batch.labels != IGNORE
        return self.answer_loss(model.decoder.lm_head(hidden[answers]), batch.labels[answers], batch.weights[answers])

    def optimiser(self, run: StageRun) -> torch.optim.AdamW:
        """AdamW over what the stage trains; each group keeps its learning-rate factor."""
        stage = STAGES[run.stage]
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, parameter in self.model.named_parameters():
            factor = stage.factor(name)
            parameter.requires_grad_(factor > 0)
            if factor > 0:
                decay = run.weight_decay if parameter.ndim > 1 and "embed" not in name else 0.0
                groups.setdefault((factor, decay), []).append(parameter)
        if stage.objective == "dense" or stage.dense_weight:
            groups.setdefault((1.0, 0.0), []).extend(self.head.parameters())
        rows = [{"params": tensors, "factor": factor, "weight_decay": decay} for (factor, decay), tensors in groups.items()]
        return torch.optim.AdamW(rows, lr=run.lr, betas=_BETAS, fused=True)

    def step(self, batch: Batch, run: StageRun, optimiser: torch.optim.AdamW, index: int) -> dict[str, float]:
        """One optimiser step."""
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(run, index) * group["factor"]
        optimiser.zero_grad(set_to_none=True)
        total, shown = self.loss(batch, STAGES[run.stage])
        total.backward()
        trained = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
        self.world.average(p.grad for p in trained)
        torch.nn.utils.clip_grad_norm_(trained, _CLIP)
        optimiser.step()
        return shown


@dataclass
class _State:
    """What is saved: everything a run needs to continue."""

    stage: int
    step: int
    seconds: float
    run: dict[str, Any]
    model: dict[str, Tensor]
    head: dict[str, Tensor]
    optimiser: dict[str, Any]


def _save(path: Path, state: _State) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    torch.save(vars(state), temporary)
    sync_file(temporary)
    os.replace(temporary, path)


def _load(path: Path, run: dict[str, Any]) -> _State:
    try:
        state = _State(**torch.load(path, weights_only=True))
    except (OSError, EOFError, LookupError, RuntimeError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"training state {path} cannot be read ({error}); start again without --resume") from None
    if state.run != run:
        differs = ", ".join(key for key in run if state.run.get(key) != run[key])
        raise CheckpointError(f"training state {path} belongs to another run ({differs}); use the same options or start again without --resume")
    return state


class _Log:
    """A progress bar on the terminal and one JSON line every few steps in `log.jsonl`."""

    def __init__(self, world: World, path: Path, images: int) -> None:
        self.world, self.path, self.images = world, path, images
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
        self.bar = Progress(*columns, disable=not world.is_main)
        self.began, self.sums, self.count = time.monotonic(), dict[str, float](), 0

    def add(self, run: StageRun, step: int, shown: dict[str, float]) -> None:
        """Collects one step's figures; shows and writes their means every `_LOG_EVERY` steps."""
        self.count += 1
        for key, value in shown.items():
            self.sums[key] = self.sums.get(key, 0.0) + value
        if self.count < _LOG_EVERY or not self.world.is_main:
            return
        now = time.monotonic()
        means = {key: round(value / self.count, 4) for key, value in self.sums.items()}
        means["images/s"] = round(self.count * self.images / (now - self.began), 1)
        self.began, self.sums, self.count = now, {}, 0
        with self.path.open("a") as file:
            file.write(json.dumps({"stage": run.stage, "step": step + 1, **means}) + "\n")
        self.bar.update(self.bar.task_ids[-1], figures="  ".join(f"{key} {value:g}" for key, value in means.items()))


def train(model: InfMLLM, tokenizer: Tokenizer, source: ExampleSource, recipe: Sequence[StageRun], options: TrainOptions) -> float:
    """Runs the recipe on `model` in place; returns the seconds spent, earlier sittings included. State goes to `options.state_dir`."""
    world = World()
    dense = [run.stage for run in recipe if STAGES[run.stage].objective == "dense"]
    if dense and not source.dense_classes:
        raise UsageError(f"stage {dense[0]} needs labels per patch, which only scenes and voc data have; choose another --stage")
    trainer = _Trainer(model, tokenizer, world, source.dense_classes, options.seed)
    options.state_dir.mkdir(parents=True, exist_ok=True)
    path = options.state_dir / "state.pt"
    identity = {
        "recipe": [asdict(run) for run in recipe],
        "seed": options.seed,
        "data": options.data,
        "processes": world.size,
        "spec": model.spec.to_json(),
    }
    start = _load(path, identity) if options.resume and path.exists() else None
    if start:
        model.load_state_dict(start.model)
        trainer.head.load_state_dict(start.head)
    began = time.monotonic() - (start.seconds if start else 0.0)
    taken = 0
    for index, run in enumerate(recipe[start.stage if start else 0 :], start.stage if start else 0):
        optimiser, first = trainer.optimiser(run), 0
        if start and index == start.stage:
            optimiser.load_state_dict(start.optimiser)
            first = start.step
        log = _Log(world, options.state_dir / "log.jsonl", run.batch * world.size)
        saved = time.monotonic()
        with log.bar as bar:
            task = bar.add_task(run.stage, total=run.steps, completed=first, figures="")
            for step, batch in _batches(trainer, source, run, index, first, options):
                log.add(run, step, trainer.step(batch, run, optimiser, step))
                bar.update(task, completed=step + 1)
                taken += 1
                stop = taken == options.stop_after
                if world.is_main and (stop or step + 1 == run.steps or time.monotonic() - saved > options.save_seconds):
                    saved = time.monotonic()
                    state = _State(index, step + 1, saved - began, identity, model.state_dict(), trainer.head.state_dict(), optimiser.state_dict())
                    _save(path, state)
                if stop:
                    return time.monotonic() - began
    world.wait()
    return time.monotonic() - began


def _batches(trainer: _Trainer, source: ExampleSource, run: StageRun, index: int, first: int, options: TrainOptions) -> Iterator[tuple[int, Batch]]:
    """(step, batch) from `first` to the end of the stage; every process of a world draws its own batches."""
    world = trainer.world
    stream = BatchStream(source, trainer.model.spec, trainer.tokenizer, run.batch, options.seed * 1000 + index, run.chat_share, world.size)
    draws = range(first * world.size + world.rank, run.steps * world.size, world.size)
    loader = DataLoader(stream, batch_size=None, sampler=draws, num_workers=options.workers, prefetch_factor=3 if options.workers else None)
    yield from zip(range(first, run.steps), loader, strict=True)
