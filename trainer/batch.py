"""Packs several question-answer pairs about one image into one training row.

Each pair attends only to the image prefix and to itself: positions restart for every
pair and a block mask keeps the pairs apart. A packed row is therefore exactly
equivalent to single-turn training, but the image prefix is computed only once.

The loss covers the answer tokens and the end-of-sequence id. An answer of n tokens has
a total weight of n^0.5 (square averaging, InternVL 2.5, arXiv 2412.05271), so that
captions do not drown out one-word answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.contract.errors import DataError
from runtime.contract.prompt import TASKS
from runtime.contract.tokenizer import Tokenizer
from runtime.data.sample import Sample

__all__ = ["IGNORE", "Batch", "PackedRow", "block_mask", "collate", "pack", "positions"]

IGNORE = -100
_SLOT = -1
_PAD_SEGMENT = -1
_MAX_ROW = 1024


@dataclass(frozen=True)
class PackedRow:
    """One row before padding, as lists of equal length. Ids are -1 at the positions of
    visual embeddings; segment 0 is the shared prefix.
    """

    ids: list[int]
    labels: list[int]
    weights: list[float]
    segments: list[int]
    positions: list[int]


@dataclass(frozen=True)
class Batch:
    """Tensors of one micro-batch: pixels [B,3,S,S]; ids, labels, weights, segments and
    positions [B,L]; the pool size p; optional per-patch labels `dense` [B,s*s,D].
    """

    pixels: Tensor
    ids: Tensor
    labels: Tensor
    weights: Tensor
    segments: Tensor
    positions: Tensor
    p: int
    dense: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """Returns the batch with all tensors moved to a device."""
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)

    @property
    def image_slots(self) -> Tensor:
        """Returns a mask [B, L] (bool) that is True at the positions of visual
        embeddings.
        """
        return self.ids == _SLOT


def answer_ids(tokenizer: Tokenizer, sample: Sample) -> list[int]:
    """Returns the token ids of a sample's answer, including the end-of-sequence id."""
    return [*tokenizer.encode(TASKS[sample.task].answer_prefix + sample.answer), tokenizer.eos_id]


def positions(samples: Sequence[Sample], tokenizer: Tokenizer, visual_tokens: int) -> int:
    """Returns the number of positions that the samples take when packed behind one
    image.
    """
    before = len(tokenizer.encode_prompt(samples[0].prompt())[0]) + visual_tokens
    return before + sum(
        len(tokenizer.encode_prompt(sample.prompt())[1]) + len(answer_ids(tokenizer, sample)) - 1
        for sample in samples
    )


def pack(
    samples: Sequence[Sample],
    tokenizer: Tokenizer,
    visual_tokens: int,
    context: int,
    where: str = "data",
) -> PackedRow:
    """Packs samples that share one image and one text before the image. `where` names
    them in error messages.

    Samples after the first are dropped once the row would exceed the model's context or
    1024 positions, whichever is larger. This bounds memory for long conversations.
    Raises `DataError` for a sample that alone exceeds the context.
    """
    prompts = [sample.prompt() for sample in samples]
    assert len({prompt.before for prompt in prompts}) == 1, (
        "packed samples must share the text before the image"
    )
    prefix = [*tokenizer.encode_prompt(prompts[0])[0], *[_SLOT] * visual_tokens]
    size = len(prefix)
    ids, labels, weights, segments, places = (
        list(prefix),
        [IGNORE] * size,
        [0.0] * size,
        [0] * size,
        list(range(size)),
    )
    for index, (sample, prompt) in enumerate(zip(samples, prompts, strict=True), 1):
        question, answer = tokenizer.encode_prompt(prompt)[1], answer_ids(tokenizer, sample)
        inputs = [*question, *answer[:-1]]
        if len(prefix) + len(inputs) > context:
            total = len(prefix) + len(inputs)
            raise DataError(
                f"{where}: {sample.text!r:.40} with its answer takes {total} positions, the "
                f"model's context has {context}; shorten it"
            )
        if index > 1 and len(ids) + len(inputs) > max(context, _MAX_ROW):
            break
        ids += inputs
        labels += [IGNORE] * (len(question) - 1) + answer
        weights += [0.0] * (len(question) - 1) + [len(answer) ** -0.5] * len(answer)
        segments += [index] * len(inputs)
        places += range(len(prefix), len(prefix) + len(inputs))
    return PackedRow(ids, labels, weights, segments, places)


def collate(
    rows: Sequence[PackedRow],
    pixels: Sequence[np.ndarray],
    p: int,
    dense: Sequence[np.ndarray] | None = None,
) -> Batch:
    """Pads rows on the right to the longest and stacks them."""
    length = max(len(row.ids) for row in rows)

    def stack(lists: Sequence[list[int]], fill: int) -> Tensor:
        return torch.tensor(
            [values + [fill] * (length - len(values)) for values in lists], dtype=torch.long
        )

    return Batch(
        pixels=torch.from_numpy(np.concatenate(pixels)),
        ids=stack([row.ids for row in rows], 0),
        labels=stack([row.labels for row in rows], IGNORE),
        weights=torch.tensor([row.weights + [0.0] * (length - len(row.weights)) for row in rows]),
        segments=stack([row.segments for row in rows], _PAD_SEGMENT),
        positions=stack([row.positions for row in rows], 0),
        p=p,
        dense=torch.from_numpy(np.stack(dense)) if dense is not None else None,
    )


def block_mask(segments_BL: Tensor) -> Tensor:
    """Returns the attention mask [B, 1, L, L] (bool): causal, and limited to the
    query's own segment and the shared prefix. Padding attends to itself, so that no
    mask row is empty.
    """
    length = segments_BL.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments_BL.device).tril()
    query, key = segments_BL[:, :, None], segments_BL[:, None, :]
    return (causal & ((key == 0) | (key == query)))[:, None]
