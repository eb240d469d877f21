"""Measures the parts of a training step: images per second when only batches are made,
and when each stage trains on batches that were made before.

python benchmarks/training.py [--data synthetic] [--batch 16] [--steps 8] [--threads 1]
[--precision auto]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from trainer.batch import Batch
from trainer.config import STAGES, StageRun, find_preset
from trainer.datasets import open_source
from trainer.datasets.source import BatchStream
from trainer.objective import Objective, make_optimiser
from trainer.processes import make_accelerator
from trainer.start import new_start


def main() -> None:
    """Prints one line per stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="synthetic")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="auto")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    start, source = new_start(find_preset("nano").spec, 0), open_source([given.data], skip_bad=True)
    stream = BatchStream(source, start.model.spec, start.tokenizer, given.batch, 0)
    batches, making, pairs = [], [], 0
    for index in range(given.steps):
        began = time.perf_counter()
        batch = stream[index]
        making.append(time.perf_counter() - began)
        assert isinstance(batch, Batch), batch
        batches.append(batch)
        pairs += sum(len(set(row.tolist()) - {-1, 0}) for row in batch.segments)
    rate, share = given.batch / statistics.median(making), pairs / given.batch / given.steps
    print(
        f"{share:.1f} question-answer pairs an image; making batches: {rate:.0f} images/s in one "
        f"process"
    )
    accelerator = make_accelerator(given.precision)
    for name in ("dense", "scratch", "joint"):
        objective = Objective(start.model, start.tokenizer, source.dense_classes, 0)
        module, optimiser = accelerator.prepare(
            objective, make_optimiser(objective, StageRun(name, 1, given.batch, 1e-4))
        )
        times: list[float] = []
        for batch in batches:
            began = time.perf_counter()
            optimiser.zero_grad()
            with accelerator.autocast():
                loss, _ = module(batch.to(accelerator.device), STAGES[name])
            accelerator.backward(loss)
            optimiser.step()
            loss.item()  # waits for a GPU
            times.append(time.perf_counter() - began)
        print(
            f"{name:8} {given.batch / statistics.mean(times[1:]):6.1f} images/s "
            f"({accelerator.mixed_precision}, {given.threads} threads)"
        )
        accelerator.free_memory()


if __name__ == "__main__":
    main()
