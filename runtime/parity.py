"""Replays golden cases, PyTorch's results stored in the bundle, through an engine and
compares them stage by stage, without torch.

The build uses this as its parity gate. `infmllm-run --self-test` repeats it on the
device, where kernels differ, and an engine compiled on the device must pass it before
it answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.contract.bundle import GOLDENS, VERIFIED, Bundle
from runtime.contract.errors import ContextError
from runtime.contract.goldens import Golden, check_golden, read_goldens
from runtime.contract.pooling import pool_matrix
from runtime.contract.spec import ModelSpec
from runtime.engines import Engine
from runtime.generation.kv_cache import CacheBudget
from runtime.generation.token_embeddings import embed_prompt, embed_tokens
from runtime.output.console import note

__all__ = [
    "StageError",
    "read_checked_goldens",
    "replay_goldens",
    "stage_errors",
    "validate_engine",
]

Array = NDArray[np.float32]


@dataclass(frozen=True)
class StageError:
    """The largest relative RMS error of a stage over all cases (decoding: all steps of
    a case in one), and its bound.

    `agreement` is how often the most likely token was the same (decoder stages).
    """

    stage: str
    error: float
    tolerance: float
    agreement: float | None = None

    @property
    def passed(self) -> bool:
        """True when the error is a number within its bound."""
        return self.error <= self.tolerance


def relative_error(found: Array, expected: Array) -> float:
    """Norm of the difference over the norm of the reference; infinity when anything is
    not finite or shapes differ.
    """
    if (
        found.shape != expected.shape
        or not np.isfinite(found).all()
        or not np.isfinite(expected).all()
    ):
        return float("inf")
    return float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-12))


def read_checked_goldens(bundle: Bundle) -> list[Golden]:
    """Reads a bundle's golden cases. Raises `BundleError` if one does not fit the
    model.
    """
    path = bundle.file(GOLDENS)
    goldens = read_goldens(path)
    for golden in goldens:
        check_golden(golden, bundle.spec, path)
    return goldens


def validate_engine(bundle: Bundle, engine: Engine, table: NDArray[np.floating]) -> None:
    """Replays the golden cases through an engine that was compiled on this machine,
    until one of its graph variants passes.

    Raises `EngineError` if none does. Two cases leave nothing to compare with, and
    print a notice instead: a bundle that was not equal to PyTorch when it was built,
    and a cache too short for the cases.
    """
    while (validation := engine.validation) is not None:
        if bundle.verdict != VERIFIED:
            note(f"{bundle.path} is {bundle.verdict}: its engines answer without validation")
            return
        goldens = read_checked_goldens(bundle)
        try:
            stages = replay_goldens(engine, table, bundle.spec, goldens, bundle.tolerance)
        except ContextError as error:
            note(f"the engines of {bundle.path} answer without validation: {error}")
            return
        validation.conclude(
            {
                s.stage: f"{s.stage} error {s.error:.3g}, allowed {s.tolerance:.3g}"
                for s in stages
                if not s.passed
            }
        )


def replay_goldens(
    engine: Engine,
    table: NDArray[np.floating],
    spec: ModelSpec,
    goldens: Sequence[Golden],
    tolerance: Mapping[str, float],
) -> list[StageError]:
    """Runs golden cases through an engine, each stage fed with PyTorch's inputs, and
    returns the errors of vision, prefill and decode. The engine's cache is overwritten.
    """
    results = []
    for golden in goldens:
        pool = pool_matrix(spec.vision.grid, golden.pool_size)
        embeds = engine.embed_image(golden.pixels, pool)[0]
        text = len(golden.before) + len(golden.after)
        CacheBudget(engine.capacity, text + len(golden.tokens), golden.pool_size**2).allow(1)
        before, after = golden.before.tolist(), golden.after.tolist()
        inputs = embed_prompt(table, before, golden.image_embeds, after)
        prefill = engine.forward(inputs, 0).copy()
        steps = np.empty_like(golden.steps)
        for index, token in enumerate(golden.tokens.tolist()):
            embedded = embed_tokens(table, [token])
            steps[index] = engine.forward(embedded, inputs.shape[1] + index)
        results.append((embeds, prefill, steps))
    return stage_errors(goldens, results, tolerance)


def stage_errors(
    goldens: Sequence[Golden],
    found: Sequence[tuple[Array, Array, Array]],
    tolerance: Mapping[str, float],
) -> list[StageError]:
    """The errors of results (image embeddings, prefill logits, logits of every step)
    against golden ones.
    """
    rows: dict[str, list[tuple[Array, Array]]] = {"vision": [], "prefill": [], "decode": []}
    for golden, results in zip(goldens, found, strict=True):
        for stage, result, expected in zip(
            rows, results, (golden.image_embeds, golden.prefill, golden.steps), strict=True
        ):
            rows[stage].append((result, expected))
    errors = []
    for stage, pairs in rows.items():
        same = np.concatenate(
            [np.atleast_1d(result.argmax(-1) == expected.argmax(-1)) for result, expected in pairs]
        )
        worst = max(relative_error(result, expected) for result, expected in pairs)
        errors.append(
            StageError(
                stage,
                worst,
                float(tolerance.get(stage, 0.0)),
                None if stage == "vision" else float(same.mean()),
            )
        )
    return errors
