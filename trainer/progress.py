"""What a person sees while training: a bar with speed and time left, `log.jsonl`, and curves and pictures for TensorBoard."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor

from trainer.config import StageRun

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["LOG_EVERY", "Progress"]

LOG_EVERY = 10


class Progress:
    """Collects the figures of a stage's steps; every few steps their means over steps and processes are shown and written."""

    def __init__(self, accelerator: Accelerator, folder: Path, images_per_step: int, steps_before: int) -> None:
        self._accelerator, self._folder, self._images, self._before = accelerator, folder, images_per_step, steps_before
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
        self.bar = Bar(*columns, disable=not accelerator.is_main_process)
        self._writer: Any = None
        if accelerator.is_main_process:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"))
        self._sums, self._count, self._waited, self._began = dict[str, Tensor](), 0, 0.0, time.monotonic()

    def close(self) -> None:
        """Flushes the curves."""
        if self._writer is not None:
            self._writer.close()

    def add(self, run: StageRun, step: int, rate: float, shown: dict[str, Tensor], waited: float) -> None:
        """One step's figures; `waited` is the time in seconds this process waited for data. Call it on all processes."""
        self._count += 1
        self._waited += waited
        for key, value in shown.items():
            self._sums[key] = self._sums.get(key, torch.zeros((), device=value.device)) + value
        if self._count < LOG_EVERY:
            return
        means = {key: self._accelerator.reduce(value / self._count, "mean").item() for key, value in sorted(self._sums.items())}
        seconds = time.monotonic() - self._began
        means |= {"lr": rate, "images/s": self._count * self._images / seconds, "waiting for data %": 100 * self._waited / seconds}
        self._sums, self._count, self._waited, self._began = {}, 0, 0.0, time.monotonic()
        if self._writer is None:
            return
        with (self._folder / "log.jsonl").open("a") as file:
            file.write(json.dumps({"stage": run.stage, "step": step + 1, **{key: float(f"{value:.5g}") for key, value in means.items()}}) + "\n")
        for key, value in means.items():
            self._writer.add_scalar(key, value, self._before + step + 1)
        short = "  ".join(f"{key} {value:.3g}" for key, value in means.items() if key != "lr")
        self.bar.update(self.bar.task_ids[-1], figures=short)

    def picture(self, image: Image.Image, run: StageRun, step: int) -> None:
        """A sheet of samples, to a file and to TensorBoard."""
        folder = self._folder / "samples"
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{run.stage}-{step + 1:06d}.png")
        if self._writer is not None:
            self._writer.add_image("samples", np.asarray(image), self._before + step + 1, dataformats="HWC")
