"""The learning-rate schedule of a stage."""

from __future__ import annotations

import math

from trainer.config import StageRun

__all__ = ["learning_rate"]


def learning_rate(run: StageRun, step: int) -> float:
    """Returns the learning rate of a step: linear warm-up from 0, then a decay.

    The decay factor f falls from 1 to 0 as half a cosine or a line. The floor r lifts
    it to (1-r)*f + r, as published.
    """
    if step < run.warmup:
        return run.lr * (step + 1) / run.warmup
    progress = (step - run.warmup) / max(1, run.steps - run.warmup)
    share = 1 - progress if run.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return run.lr * ((1 - run.floor) * share + run.floor)
