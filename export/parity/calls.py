"""Replays the calls that users' questions make of an engine: prompts in segments, single
steps, the verification of drafts, several sequences side by side, beams that change
places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.contract.pooling import pool_matrix
from runtime.contract.spec import ModelSpec
from runtime.engines import Engine
from runtime.generation.token_embeddings import embed_tokens

__all__ = ["CallResult", "Conversation", "replay_calls"]

Array = NDArray[np.float32]
_DRAFTS = 3


@dataclass(frozen=True)
class Conversation:
    """One sequence: pixels [1,3,S,S], a pool size, the ids around the image, and the ids
    that follow. `image_embeds` [T, H] are given, so that all engines continue alike.
    """

    pixels: Array
    pool_size: int
    before: tuple[int, ...]
    after: tuple[int, ...]
    answer: tuple[int, ...]
    image_embeds: Array


@dataclass(frozen=True)
class CallResult:
    """What a call returned: the kind of call, the sequence, the position whose logits
    these are (-1: image embeddings), and the values [V] or [T, H].
    """

    call: str
    sequence: int
    position: int
    values: Array


def replay_calls(
    engine: Engine,
    table: NDArray[np.floating],
    spec: ModelSpec,
    cases: Sequence[Conversation],
    batches: bool,
) -> list[CallResult]:
    """Runs every kind of call on the sequences. `batches` tells whether the engine decodes
    several sequences side by side. The engine's cache is overwritten.
    """
    results: list[CallResult] = []
    for index, case in enumerate(cases):
        pool = pool_matrix(spec.vision.grid, case.pool_size)
        embeds = engine.embed_image(case.pixels, pool)[0]
        results.append(CallResult("image", index, -1, np.array(embeds, np.float32)))
        start = _prefill(engine, table, case, index, results)
        if engine.verifies and len(case.answer) > 1:
            drafts = case.answer[:_DRAFTS]
            logits = engine.verify(embed_tokens(table, list(drafts)), start)
            results += [
                CallResult("drafts", index, start + step, row.copy())
                for step, row in enumerate(logits)
            ]
        for step, token in enumerate(case.answer):  # overwrites the rows of the drafts
            row = engine.forward(embed_tokens(table, [token]), start + step)
            results.append(CallResult("steps", index, start + step, row.copy()))
    if batches and len(cases) > 1:
        results += _side_by_side(engine, table, cases[:2])
    return results


def _prefill(
    engine: Engine,
    table: NDArray[np.floating],
    case: Conversation,
    index: int,
    results: list[CallResult],
) -> int:
    """Computes a prompt in the segments of a session. Returns the number of its rows."""
    first = [embed_tokens(table, list(case.before))] if case.before else []
    first.append(case.image_embeds[None].astype(np.float32))
    start = 0
    for segment in (np.concatenate(first, axis=1), embed_tokens(table, list(case.after))):
        if segment.shape[1]:
            row = engine.forward(segment, start).copy()
            start += segment.shape[1]
            results.append(CallResult("segments", index, start - 1, row))
    return start


def _side_by_side(
    engine: Engine, table: NDArray[np.floating], cases: Sequence[Conversation]
) -> list[CallResult]:
    """Decodes two sequences of different lengths side by side, then exchanges them as a
    beam search does, and continues each in the other's place.
    """
    results: list[CallResult] = []
    steps = min(len(case.answer) for case in cases)
    lengths = [len(c.before) + len(c.image_embeds) + len(c.after) for c in cases]
    batch = engine.batch(len(cases), max(lengths) + steps)
    for slot, case in enumerate(cases):
        _prefill(engine, table, case, slot, [])
        batch.fill(slot, lengths[slot])
    order = [0, 1]
    for step in range(steps):
        if step == max(1, steps // 2):
            order = [1, 0]
            batch.copy(order, 0, max(lengths) + step)
        tokens = [cases[which].answer[step] for which in order]
        starts = np.array([lengths[which] + step for which in order], np.int32)
        embeds = embed_tokens(table, tokens).transpose(1, 0, 2)
        logits = batch.step(np.ascontiguousarray(embeds), starts)
        results += [
            CallResult(
                "batch" if order == [0, 1] else "beams",
                which,
                int(starts[slot]),
                logits[slot].copy(),
            )
            for slot, which in enumerate(order)
        ]
    return results
