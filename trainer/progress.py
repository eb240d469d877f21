"""Progress output of training: a bar with speed and time left, `log.jsonl`, and curves
and sample images for TensorBoard.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch import Tensor

from runtime.contract.errors import NonFiniteError
from trainer.config import StageRun

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["LOG_EVERY", "Progress", "check_finite", "clear_log"]

LOG_EVERY = 10
LOG, CURVES, SAMPLES = "log.jsonl", "tensorboard", "samples"


def check_finite(figures: Mapping[str, Tensor | float], stage: str, step: int) -> None:
    """Raises `NonFiniteError` if a figure is not finite. Called before a state is
    saved, so that the last good state is kept.
    """
    bad = sorted(key for key, value in figures.items() if not math.isfinite(float(value)))
    if bad:
        raise NonFiniteError(
            f"{', '.join(bad)} is not finite at step {step + 1} of {stage}; lower --lr or "
            f"check the data. The last saved state is kept"
        )


def clear_log(folder: Path, keep_until: int = 0) -> None:
    """Removes log lines after step `keep_until`, counted over all stages. Without
    `keep_until`, also removes the curves and samples of earlier runs.
    """
    log = folder / LOG
    if log.exists():
        kept = [
            line
            for line in log.read_text().splitlines(keepends=True)
            if json.loads(line)["total_step"] <= keep_until
        ]
        log.write_text("".join(kept))
    if not keep_until:
        shutil.rmtree(folder / CURVES, ignore_errors=True)
        shutil.rmtree(folder / SAMPLES, ignore_errors=True)


class Progress:
    """Collects the figures of a stage's steps. Every few steps, it shows and logs their
    means over steps and processes.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        images_per_step: int,
        steps_before: int,
        purge_step: int | None = None,
    ) -> None:
        self._accelerator, self._folder, self._images, self._before = (
            accelerator,
            folder,
            images_per_step,
            steps_before,
        )
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        self.bar = Bar(
            *columns, console=Console(stderr=True), disable=not accelerator.is_main_process
        )
        self._writer: Any = None
        if accelerator.is_main_process:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / CURVES), purge_step=purge_step)
        self._sums, self._count, self._waited, self._began = (
            dict[str, Tensor](),
            0,
            0.0,
            time.monotonic(),
        )

    def close(self) -> None:
        """Closes the TensorBoard writer, which flushes the curves."""
        if self._writer is not None:
            self._writer.close()

    def add(
        self, run: StageRun, step: int, rate: float, shown: dict[str, Tensor], waited: float
    ) -> None:
        """Adds one step's figures. `waited` is the time in seconds this process waited
        for data. Call it on all processes.
        """
        self._count += 1
        self._waited += waited
        for key, value in shown.items():
            self._sums[key] = self._sums.get(key, torch.zeros((), device=value.device)) + value
        if self._count < LOG_EVERY:
            return
        means = {
            key: self._accelerator.reduce(value / self._count, "mean").item()
            for key, value in sorted(self._sums.items())
        }
        seconds = time.monotonic() - self._began
        check_finite(means, run.stage, step)
        means |= {
            "lr": rate,
            "images/s": self._count * self._images / seconds,
            "waiting for data %": 100 * self._waited / seconds,
        }
        self._sums, self._count, self._waited, self._began = {}, 0, 0.0, time.monotonic()
        if self._writer is None:
            return
        total = self._before + step + 1
        with (self._folder / LOG).open("a") as file:
            file.write(
                json.dumps(
                    {
                        "stage": run.stage,
                        "step": step + 1,
                        "total_step": total,
                        **{key: float(f"{value:.5g}") for key, value in means.items()},
                    }
                )
                + "\n"
            )
        for key, value in means.items():
            self._writer.add_scalar(key, value, total)
        short = "  ".join(f"{key} {value:.3g}" for key, value in means.items() if key != "lr")
        self.bar.update(self.bar.task_ids[-1], figures=short)

    def picture(self, image: Image.Image, run: StageRun, step: int) -> None:
        """Writes a sheet of sample answers to a file and to TensorBoard."""
        folder = self._folder / SAMPLES
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{run.stage}-{step + 1:06d}.png")
        if self._writer is not None:
            self._writer.add_image(
                "samples", np.asarray(image), self._before + step + 1, dataformats="HWC"
            )
