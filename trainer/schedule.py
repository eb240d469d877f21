"""Learning rate over a stage."""

from __future__ import annotations

import math

from trainer.config import StageRun

__all__ = ["learning_rate"]


def learning_rate(run: StageRun, step: int) -> float:
    """Linear warm-up from 0, then half a cosine or a line f from 1 to 0, lifted to the
    floor r: (1-r)*f + r (as published).
    """
    if step < run.warmup:
        return run.lr * (step + 1) / run.warmup
    progress = (step - run.warmup) / max(1, run.steps - run.warmup)
    share = 1 - progress if run.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return run.lr * ((1 - run.floor) * share + run.floor)
