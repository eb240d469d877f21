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
    "centred",
    "read_checked_goldens",
    "replay_goldens",
    "stage_errors",
    "validate_engine",
]

Array = NDArray[np.float32]
_ROUNDING = 1e-9  # nats; what float64 sums of float32 logits leave
_SURE = 3.0  # margins beyond this many tolerances are more than rounding explains


@dataclass(frozen=True)
class StageError:
    """The largest relative RMS error of a stage over all cases (decoding: all steps of
    a case in one), and its bound. Logits are compared without their common offset, which
    softmax ignores.

    Attributes:
        stage: vision, prefill or decode.
        error: The largest error of a case.
        tolerance: The bound of the error.
        agreement: How often the most likely token was the same (decoder stages).
        flips: Rows whose most likely token differs although PyTorch prefers its own by more
            than the tolerance explains. None is allowed.
        divergence: Mean KL divergence of the token probabilities from PyTorch's, in nats.
        allowed_divergence: Its bound: what noise as large as the tolerance makes when it is
            spread evenly over the vocabulary. An error on the likely tokens alone exceeds it.
    """

    stage: str
    error: float
    tolerance: float
    agreement: float | None = None
    flips: int = 0
    divergence: float | None = None
    allowed_divergence: float | None = None

    @property
    def passed(self) -> bool:
        """True when the error is a number within its bound, no sure token changed, and the
        probabilities diverge no more than the bound explains.
        """
        return self.error <= self.tolerance and not self.flips and not self.diverges

    @property
    def fault(self) -> str:
        """Says what is beyond its bound; empty if nothing is."""
        if not self.error <= self.tolerance:
            return (
                f"{self.stage} differs from PyTorch by {self.error:.3g} (relative RMS), allowed "
                f"{self.tolerance:.3g}"
            )
        if self.diverges:
            return (
                f"the token probabilities of {self.stage} diverge from PyTorch's by "
                f"{self.divergence:.3g} nats, allowed {self.allowed_divergence:.3g}"
            )
        if self.flips:
            return (
                f"{self.stage} prefers another token in {self.flips} places where PyTorch is sure"
            )
        return ""

    @property
    def diverges(self) -> bool:
        """True when the probabilities are further from PyTorch's than the bound explains."""
        if self.divergence is None or self.allowed_divergence is None:
            return False
        return not self.divergence <= self.allowed_divergence + _ROUNDING


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


def centred(logits: Array) -> Array:
    """Returns logits without the common offset of each row, which softmax ignores."""
    result: Array = logits - logits.mean(-1, keepdims=True)
    return result


def _compare_rows(
    found: Array, expected: Array, tolerance: float
) -> tuple[Array, int, Array, Array]:
    """Compares centred logits [n, V]. Returns which rows have the same best token, how many
    differ although PyTorch is sure, and the divergence of each row in nats with its bound:
    half the variance of the noise, which is the divergence to the second order.
    """
    same = found.argmax(-1) == expected.argmax(-1)
    best = np.partition(expected, -2, axis=-1)[:, -2:]
    margin = best[:, 1] - best[:, 0]
    sure = margin > _SURE * tolerance * expected.std(-1)
    wide = [rows.astype(np.float64) for rows in (expected, found)]
    logs = [
        rows
        - np.log(np.exp(rows - rows.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - rows.max(-1, keepdims=True)
        for rows in wide
    ]
    divergence = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)
    allowed = 0.5 * (tolerance * expected.std(-1)) ** 2
    return same, int((sure & ~same).sum()), divergence, allowed


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
        validation.conclude({stage.stage: stage.fault for stage in stages if not stage.passed})


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
    return [
        _stage_error(stage, pairs, float(tolerance.get(stage, 0.0)))
        for stage, pairs in rows.items()
    ]


def _stage_error(stage: str, pairs: Sequence[tuple[Array, Array]], tolerance: float) -> StageError:
    if stage == "vision":
        return StageError(stage, max(relative_error(*pair) for pair in pairs), tolerance)
    worst, compared = 0.0, []
    for result, expected in pairs:
        found, reference = (centred(np.atleast_2d(array)) for array in (result, expected))
        worst = max(worst, relative_error(found, reference))
        if np.isfinite(worst):
            compared.append(_compare_rows(found, reference, tolerance))
    if not compared:
        return StageError(stage, worst, tolerance, 0.0)
    same, flips, divergence, spread = zip(*compared, strict=True)
    return StageError(
        stage,
        worst,
        tolerance,
        float(np.concatenate(same).mean()),
        sum(flips),
        float(np.concatenate(divergence).mean()),
        float(np.concatenate(spread).mean()),
    )
