"""Checks whether an engine is right: replays the bundle's goldens stage by stage,
compares its greedy tokens with its own logits, and records greedy answers.

Nothing here imports torch: the same functions check this project's engines and PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.contract.bundle import GOLDENS, Bundle
from runtime.contract.errors import EngineError, NonFiniteError
from runtime.contract.goldens import Golden, read_goldens
from runtime.contract.pooling import pool_matrix
from runtime.engines import Engine
from runtime.engines.logits import greedy
from runtime.generation.generate import Generation, Limits, SingleDecoder, decode
from runtime.generation.token_embeddings import embed_prompt
from runtime.parity import StageError
from runtime.session import Session

__all__ = ["answers", "prove", "stages_of"]

CHOICE = "choice"
# As a fraction of the largest logit. Within it, kernels that add in varying order may choose
# either token.
_TIE = 1e-3


def prove(bundle: Bundle, engine: Engine) -> dict[str, Any]:
    """Replays the goldens until the engine's validation is over. `stages` are those of
    the last replay; `notes` list the graph variants that failed before it.

    `fault` is the reason why the engine rejected itself, or an empty string.
    """
    session, notes, fault = Session(bundle, engine), [], ""
    while True:
        stages = stages_of(session)
        failed = {
            row[
                "stage"
            ]: f"{row['stage']} error {_show(row['error'])}, allowed {row['tolerance']:.3g}"
            for row in stages
            if not row["passed"]
        }
        trial = engine.validation
        if trial is None:
            break
        try:
            trial.conclude(failed)
        except EngineError as error:
            fault = str(error)
            break
        if failed:
            notes.append(
                f"a form of the graphs failed and another took its place: "
                f"{'; '.join(failed.values())}"
            )
    return {"stages": stages, "notes": notes, "fault": fault, "engine": engine.version}


def stages_of(session: Session) -> list[dict[str, Any]]:
    """Returns the errors of vision, prefill and decode on the goldens, and how often
    the device's greedy token disagrees with its logits.
    """
    rows = [_row(stage) for stage in session.replay()]
    return [*rows, _row(_choices(session, read_goldens(session.bundle.file(GOLDENS))))]


def _row(stage: StageError) -> dict[str, Any]:
    error = stage.error if math.isfinite(stage.error) else None
    return {
        "stage": stage.stage,
        "error": error,
        "tolerance": stage.tolerance,
        "agreement": stage.agreement,
        "passed": stage.passed,
    }


def _show(error: float | None) -> str:
    return "not finite" if error is None else f"{error:.3g}"


def _choices(session: Session, goldens: Sequence[Golden]) -> StageError:
    """Returns how often `greedy` chooses another token than the most likely one of
    `forward` at the same position. Near ties count as equal; the tolerance is 0.
    """
    engine, wrong, count = session.engine, 0, 0
    for golden in goldens:
        inputs = embed_prompt(
            session.table, golden.before.tolist(), golden.image_embeds, golden.after.tolist()
        )
        engine.forward(inputs, 0)
        for place, token in enumerate(golden.tokens.tolist(), inputs.shape[1]):
            row = embed_prompt(session.table, [token], golden.image_embeds[:0], [])
            logits = engine.forward(row, place).copy()
            try:
                chosen = engine.greedy(row, place)
            except NonFiniteError:
                chosen = -1
            near = chosen >= 0 and float(logits.max() - logits[chosen]) <= _TIE * float(
                np.abs(logits).max()
            )
            wrong, count = wrong + (not near), count + 1
    return StageError(CHOICE, wrong / count, 0.0)


def answers(session: Session, new_tokens: int) -> list[list[int]]:
    """Returns greedy answers to the images and prompts of the goldens. The engine
    computes everything itself.
    """
    found = []
    for golden in read_goldens(session.bundle.file(GOLDENS)):
        embeds = session.engine.embed_image(
            golden.pixels, pool_matrix(session.spec.vision.grid, golden.pool_size)
        )[0]
        inputs = embed_prompt(session.table, golden.before.tolist(), embeds, golden.after.tolist())
        limits = Limits(
            session.spec.eos_id,
            min(new_tokens, session.engine.capacity - inputs.shape[1]),
            inputs.shape[1],
        )
        logits = session.engine.forward(inputs, 0)
        decoder = SingleDecoder(session.engine, session.table, greedy)
        found.append([token for _, token in decode(decoder, [Generation(greedy, limits, logits)])])
    return found
