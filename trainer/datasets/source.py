"""Batches that depend only on the seed and the step. A resumed run, or one spread over
other processes, thus sees exactly the same data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Dataset

from runtime.contract.errors import DataError, InfMLLMError
from runtime.contract.image import to_pixels
from runtime.contract.spec import ModelSpec
from runtime.contract.tokenizer import Tokenizer
from runtime.data.sample import Example, Sample
from trainer.batch import Batch, PackedRow, collate, pack, positions
from trainer.datasets.draw import ExampleSource

__all__ = ["BadBatch", "BatchStream"]

_MAX_TRIES = 100


@dataclass(frozen=True)
class BadBatch:
    """The reason why a batch could not be made. A worker process returns it in place of
    the batch, so that the error stays a one-line message.
    """

    message: str


@dataclass
class BatchStream(Dataset[Batch | BadBatch]):
    """Maps the index of a micro-batch (step * parts + part) to the batch, for a
    `DataLoader` without its own batching.
    """

    source: ExampleSource
    spec: ModelSpec
    tokenizer: Tokenizer
    batch: int
    seed: int
    chat_share: float = 0.0
    parts: int = 1  # micro-batches of one optimiser step, over all processes
    skip_bad: bool = False

    def __getitem__(self, index: int) -> Batch | BadBatch:
        try:
            return self._batch(index)
        except InfMLLMError as error:
            return BadBatch(str(error))

    def _batch(self, index: int) -> Batch:
        # p and chat are drawn once per optimiser step. All processes then take equally long, and
        # short questions are not padded to the length of conversations.
        shared = np.random.default_rng((self.seed, 1 << 32, index // self.parts))
        p = self.spec.pool_sizes[int(shared.integers(len(self.spec.pool_sizes)))]
        chat = bool(shared.random() < self.chat_share)
        rng = np.random.default_rng((self.seed, index))
        drawn = [self._draw(rng, chat, p) for _ in range(self.batch)]
        dense = [example.dense for example, _, _ in drawn if isinstance(example.dense, np.ndarray)]
        return collate(
            [row for _, row, _ in drawn],
            [pixels for _, _, pixels in drawn],
            p,
            dense if len(dense) == self.batch else None,
        )

    def _draw(
        self, rng: np.random.Generator, chat: bool, p: int
    ) -> tuple[Example, PackedRow, np.ndarray]:
        """Draws an example and returns it with its packed samples and its pixels. If
        bad rows are skipped and all its samples are too long, draws again.
        """
        for _ in range(_MAX_TRIES):
            example = self.source.draw(rng, chat, self.spec)
            image, samples = example.load()
            samples = tuple(_same_opening(samples))
            if self.skip_bad:
                samples = tuple(
                    s
                    for s in samples
                    if positions([s], self.tokenizer, p * p) <= self.spec.decoder.context
                )
            if samples:
                row = pack(samples, self.tokenizer, p * p, self.spec.decoder.context, example.name)
                return example, row, to_pixels(image, self.spec)
        raise DataError(
            f"{_MAX_TRIES} examples in a row were too long for the model's context of "
            f"{self.spec.decoder.context} tokens; use data with shorter texts"
        )


def _same_opening(samples: Sequence[Sample]) -> list[Sample]:
    """Returns the samples whose text before the image equals that of the first sample.
    Chat and short tasks differ there.
    """
    opening = samples[0].prompt().before
    return [sample for sample in samples if sample.prompt().before == opening]
