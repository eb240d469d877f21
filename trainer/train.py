"""The training loop: runs a recipe of stages over a stream of batches, with bit-exact
resume.

Batches depend only on the seed and the step, and the optimiser's state is saved with
the step. A run that is killed and continued with `resume` thus ends with the same
weights as an uninterrupted one. Two processes take the same steps as one process with
twice the `accumulate`.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader

from runtime.contract.errors import CheckpointError, DataError, UsageError
from runtime.contract.files import sync_file
from runtime.contract.tokenizer import Tokenizer
from runtime.data.sample import Example
from runtime.output.console import note
from trainer.batch import Batch
from trainer.config import STAGES, Stage, StageRun
from trainer.datasets.draw import ExampleSource
from trainer.datasets.source import BadBatch, BatchStream
from trainer.model import InfMLLM
from trainer.objective import Objective, make_optimiser
from trainer.processes import (
    full_state,
    gather_object,
    gathered_weights,
    load_full_state,
    make_accelerator,
)
from trainer.progress import Progress, check_finite, clear_log
from trainer.schedule import learning_rate
from trainer.watch import sample_sheet

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["TrainOptions", "Trained", "train"]

_CLIP = 1.0
STATE = "state.pt"


@dataclass(frozen=True)
class TrainOptions:
    """Options of a run: where and how often to save, how to compute, and whether to
    resume from a saved state.
    """

    state_dir: Path
    seed: int = 0
    identity: str = (
        ""  # identifies data and starting weights, which must match when a run is resumed
    )
    resume: bool = False
    save_seconds: float = 120.0
    stop_after: int | None = None  # stop after this many optimiser steps, for tests of resuming
    workers: int = 1
    skip_bad: bool = False
    precision: str = "auto"
    recompute: bool = False  # gradient checkpointing
    sample_every: int = 0  # optimiser steps between sheets of samples; 0 for none
    samples: Sequence[Example] = ()


@dataclass
class _State:
    """The saved state: everything a run needs to continue. `weights` are those of the
    objective, including the dense head.
    """

    stage: int
    step: int
    seconds: float
    run: dict[str, Any]
    weights: dict[str, Tensor]
    optimiser: dict[str, Any]


def _save(path: Path, state: _State) -> None:
    temporary = path.with_suffix(".part")
    torch.save(vars(state), temporary)
    sync_file(temporary)
    os.replace(temporary, path)


def _load(path: Path, run: dict[str, Any]) -> _State:
    try:
        state = _State(**torch.load(path, weights_only=True, map_location="cpu"))
    except (
        OSError,
        EOFError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        raise CheckpointError(
            f"training state {path} cannot be read ({error}); start again without --resume"
        ) from None
    if state.run != run:
        differs = ", ".join(key for key in run if state.run.get(key) != run[key])
        raise CheckpointError(
            f"training state {path} belongs to another run ({differs}); use the same options or "
            f"start again without --resume"
        )
    return state


@dataclass(frozen=True)
class Trained:
    """The result of a run: the model on the CPU, and the seconds spent, including
    earlier sessions of a resumed run. If weights were sharded, the model is complete
    only on the main process.
    """

    model: InfMLLM
    seconds: float
    is_main: bool
    processes: int


def train(
    model: InfMLLM,
    tokenizer: Tokenizer,
    source: ExampleSource,
    recipe: Sequence[StageRun],
    options: TrainOptions,
) -> Trained:
    """Runs the recipe and returns the result. Trains `model` in place unless weights
    are sharded. Saves state to `options.state_dir`. Raises `DataError` or `UsageError`.
    """
    classes = (
        source.dense_classes if model.spec.image_mode == "stretch" else ()
    )  # per-patch labels do not account for padding of the image
    dense = [run.stage for run in recipe if STAGES[run.stage].objective == "dense"]
    if dense and not classes:
        raise UsageError(
            f"stage {dense[0]} needs labels per patch, which only synthetic and voc data with "
            f"image mode stretch have; choose another --stage"
        )
    accelerator = make_accelerator(options.precision)
    options.state_dir.mkdir(parents=True, exist_ok=True)
    trainer = _Trainer(
        accelerator,
        Objective(model, tokenizer, classes, options.seed),
        source,
        tokenizer,
        recipe,
        options,
    )
    model.vision_tower.recompute = model.decoder.recompute = options.recompute
    trained = trainer.run()
    trained.model.vision_tower.recompute = trained.model.decoder.recompute = False
    return trained


class _Trainer:
    """One run over all stages."""

    def __init__(
        self,
        accelerator: Accelerator,
        objective: Objective,
        source: ExampleSource,
        tokenizer: Tokenizer,
        recipe: Sequence[StageRun],
        options: TrainOptions,
    ) -> None:
        self.accelerator, self.objective, self.source, self.tokenizer = (
            accelerator,
            objective,
            source,
            tokenizer,
        )
        self.recipe, self.options = recipe, options
        self.identity = {
            "recipe": [asdict(run) for run in recipe],
            "seed": options.seed,
            "data and start": options.identity,
            "processes": accelerator.num_processes,
            "precision": accelerator.mixed_precision,
            "spec": objective.model.spec.to_json(),
        }
        self.path = options.state_dir / STATE
        self.start = (
            _load(self.path, self.identity) if options.resume and self.path.exists() else None
        )
        self._check_start()
        self.began = time.monotonic() - (self.start.seconds if self.start else 0.0)
        self.left = options.stop_after

    def _check_start(self) -> None:
        """Checks that all processes start from the same state, even on machines without
        a shared disk. Removes log entries after the saved step.
        """
        here = (self.start.stage, self.start.step) if self.start else None
        everywhere = gather_object([here]) if self.accelerator.num_processes > 1 else [here]
        if any(there != here for there in everywhere):
            raise CheckpointError(
                f"training state {self.path} differs between processes ({everywhere}); copy it "
                f"from the main machine to all others"
            )
        if self.start is None:
            if self.options.resume and self.accelerator.is_main_process:
                note(f"--resume: no saved state at {self.path}; starting from the beginning")
            if self.accelerator.is_main_process:
                clear_log(self.options.state_dir)
        elif self.accelerator.is_main_process:
            clear_log(
                self.options.state_dir,
                sum(run.steps for run in self.recipe[: self.start.stage]) + self.start.step,
            )

    def run(self) -> Trained:
        """Runs all stages from the start or from the saved state."""
        before = 0
        for index, run in enumerate(self.recipe):
            if not (self.start and index < self.start.stage) and not self._stage(
                index, run, before
            ):
                break
            before += run.steps
        self.accelerator.wait_for_everyone()
        model, weights = self.objective.model, gathered_weights(self.objective)
        if weights is not None:
            model = InfMLLM(model.spec)
            model.load_state_dict(
                {
                    name.removeprefix("model."): w
                    for name, w in weights.items()
                    if name.startswith("model.")
                },
                strict=bool(weights),
            )
        return Trained(
            model.cpu(),
            time.monotonic() - self.began,
            self.accelerator.is_main_process,
            self.accelerator.num_processes,
        )

    def _stage(self, index: int, run: StageRun, before: int) -> bool:
        """Runs one stage. Returns False if `stop_after` ended it early."""
        accelerator, stage = self.accelerator, STAGES[run.stage]
        optimiser = make_optimiser(self.objective, run, fused=not accelerator.is_fsdp2)
        module, optimiser = accelerator.prepare(self.objective, optimiser)
        first = 0
        if self.start and index == self.start.stage:
            load_full_state(
                accelerator, module, optimiser, self.start.weights, self.start.optimiser
            )
            first, self.start = self.start.step, None
        progress = Progress(
            accelerator,
            self.options.state_dir,
            run.batch * run.accumulate * accelerator.num_processes,
            before,
            before + first + 1,
        )
        batches, saved, stop = self._batches(run, index, first), time.monotonic(), False
        with progress.bar as bar:
            task = bar.add_task(run.stage, total=run.steps, completed=first, figures="")
            for step in range(first, run.steps):
                rate = learning_rate(run, step)
                for group in optimiser.param_groups:
                    group["lr"] = rate * group["factor"]
                shown, waited = self._step(module, optimiser, run, stage, batches)
                progress.add(run, step, rate, shown, waited)
                bar.update(task, completed=step + 1)
                self.left = self.left - 1 if self.left is not None else None
                stop = self.left == 0
                if self._together(
                    stop
                    or step + 1 == run.steps
                    or time.monotonic() - saved > self.options.save_seconds
                ):
                    saved = time.monotonic()
                    check_finite(shown, run.stage, step)
                    self._keep(index, step + 1, module, optimiser)
                if self.options.sample_every and (step + 1) % self.options.sample_every == 0:
                    self._show(progress, run, step)
                if stop:
                    break
        progress.close()
        accelerator.free_memory()
        return not stop

    def _step(
        self,
        module: torch.nn.Module,
        optimiser: torch.optim.Optimizer,
        run: StageRun,
        stage: Stage,
        batches: Iterator[Batch],
    ) -> tuple[dict[str, Tensor], float]:
        """Runs one optimiser step. Returns the mean figures of its micro-batches and
        the seconds spent waiting for data.
        """
        accelerator, figures, waited = self.accelerator, dict[str, Tensor](), 0.0
        optimiser.zero_grad(set_to_none=True)
        for part in range(run.accumulate):
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            with accelerator.no_sync(module) if part + 1 < run.accumulate else nullcontext():
                with accelerator.autocast():
                    loss, shown = module(batch.to(accelerator.device), stage)
                accelerator.backward(loss / run.accumulate)
            for key, value in shown.items():
                figures[key] = (
                    figures.get(key, torch.zeros((), device=value.device)) + value / run.accumulate
                )
        accelerator.clip_grad_norm_(
            [p for group in optimiser.param_groups for p in group["params"]], _CLIP
        )
        optimiser.step()
        return figures, waited

    def _batches(self, run: StageRun, index: int, first: int) -> Iterator[Batch]:
        """Yields this process's micro-batches from step `first` to the end of the
        stage. Raises `DataError`.
        """
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        parts = run.accumulate * world
        spec, seed, workers = (
            self.objective.model.spec,
            self.options.seed * 1000 + index,
            self.options.workers,
        )
        stream = BatchStream(
            self.source,
            spec,
            self.tokenizer,
            run.batch,
            seed,
            run.chat_share,
            parts,
            self.options.skip_bad,
        )
        draws = range(first * parts + rank, run.steps * parts, world)
        loader = DataLoader(
            stream,
            batch_size=None,
            sampler=draws,
            num_workers=workers,
            prefetch_factor=3 if workers else None,
        )
        for batch in loader:
            if isinstance(batch, BadBatch):
                raise DataError(batch.message)
            yield batch

    def _together(self, wanted: bool) -> bool:
        """Returns the main process's decision in all processes."""
        if self.accelerator.num_processes == 1:
            return wanted
        decision = torch.tensor(int(wanted), device=self.accelerator.device)
        torch.distributed.broadcast(decision, 0)
        return bool(decision.item())

    def _keep(
        self, index: int, step: int, module: torch.nn.Module, optimiser: torch.optim.Optimizer
    ) -> None:
        weights, moments = full_state(self.accelerator, module, optimiser)
        if self.accelerator.is_main_process:
            _save(
                self.path,
                _State(index, step, time.monotonic() - self.began, self.identity, weights, moments),
            )

    def _show(self, progress: Progress, run: StageRun, step: int) -> None:
        """Writes a sheet of sample answers on the main process. Skipped if weights are
        sharded, because they are not gathered for it.
        """
        if (
            self.accelerator.is_main_process
            and self.options.samples
            and not isinstance(self.objective, FSDPModule)
        ):
            progress.picture(
                sample_sheet(self.objective.model, self.tokenizer, self.options.samples), run, step
            )
