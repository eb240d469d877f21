"""Golden inputs and outputs: PyTorch's results stored in the bundle, replayed through
the engine, compared stage by stage. Torch-free.

The build uses this as its parity gate; `infmllm-run --self-test` repeats it on the
device, where kernels differ.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.contract.bundle import GOLDENS, VERIFIED
from runtime.contract.errors import BundleError, ContextError
from runtime.contract.pooling import pool_matrix
from runtime.contract.spec import ModelSpec
from runtime.generation.kv_cache import CacheBudget
from runtime.output.console import note
from runtime.session import Session

__all__ = [
    "Golden",
    "StageError",
    "read_goldens",
    "replay",
    "replay_goldens",
    "stage_errors",
    "try_engine",
    "write_goldens",
]

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Golden:
    """One case: pixels [1,3,S,S], pool size, ids around the image, and PyTorch's
    results.

    `image_embeds` [T,H]; `prefill` logits [V]; `tokens` [n] fed one by one; `steps`
    logits [n,V] after each.
    """

    pixels: Array
    pool_size: int
    before: NDArray[np.int64]
    after: NDArray[np.int64]
    image_embeds: Array
    prefill: Array
    tokens: NDArray[np.int64]
    steps: Array


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


def write_goldens(path: Path, goldens: Sequence[Golden]) -> None:
    """Stores cases as a plain .npz."""
    arrays = {
        f"{index}.{name}": np.asarray(value)
        for index, golden in enumerate(goldens)
        for name, value in vars(golden).items()
    }
    np.savez(path, **arrays)  # type: ignore[arg-type]


def read_goldens(path: Path) -> list[Golden]:
    """Reads cases; raises `BundleError` if the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as data:
            count = len({name.split(".")[0] for name in data.files})
            cases = [
                {name: data[f"{i}.{name}"] for name in Golden.__dataclass_fields__}
                for i in range(count)
            ]
            goldens = [Golden(**case | {"pool_size": int(case["pool_size"])}) for case in cases]
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        TypeError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
    ) as error:
        raise BundleError(f"{path} is damaged ({error}); re-export the bundle") from None
    if not goldens:
        raise BundleError(f"{path} holds no golden cases; re-export the bundle")
    return goldens


def _check(golden: Golden, spec: ModelSpec, where: Path) -> None:
    """Raises `BundleError` unless a case fits the model and holds at least one decoding
    step.
    """
    size, hidden, vocabulary = spec.vision.image_size, spec.decoder.hidden, spec.decoder.vocab_size
    steps, p = len(np.atleast_1d(golden.tokens)), golden.pool_size
    shapes = {
        "pixels": (1, 3, size, size),
        "image_embeds": (p * p, hidden),
        "prefill": (vocabulary,),
        "steps": (steps, vocabulary),
        "tokens": (steps,),
    }
    wrong = [name for name, shape in shapes.items() if getattr(golden, name).shape != shape]
    wrong += [
        name
        for name in ("pixels", "image_embeds", "prefill", "steps")
        if getattr(golden, name).dtype != np.float32
    ]
    for name in ("before", "after", "tokens"):
        ids = getattr(golden, name)
        if (
            ids.ndim != 1
            or ids.dtype != np.int64
            or (ids.size and not 0 <= ids.min() <= ids.max() < vocabulary)
        ):
            wrong.append(name)
    if wrong or p not in spec.pool_sizes or steps == 0:
        raise BundleError(
            f"{where}: golden case does not fit the model "
            f"({', '.join(wrong) or 'pool size or steps'}); re-export the bundle"
        )


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


def replay(session: Session, tolerance: Mapping[str, float]) -> list[StageError]:
    """Replays the bundle's own golden cases; see `replay_goldens`."""
    path = session.bundle.file(GOLDENS)
    goldens = read_goldens(path)
    for golden in goldens:
        _check(golden, session.spec, path)
    return replay_goldens(session, goldens, tolerance)


def try_engine(session: Session) -> None:
    """Replays the goldens through an engine that is on trial, until it has passed.
    Raises `EngineError` if no form of it does.

    A bundle that drifted from PyTorch when it was built, and a cache too short for the
    goldens, leave nothing to try: a notice says so.
    """
    bundle, engine = session.bundle, session.engine
    while (trial := engine.trial) is not None:
        if bundle.verdict != VERIFIED:
            note(f"{bundle.path} is {bundle.verdict}: its engines answer untried")
            return
        try:
            stages = replay(session, bundle.tolerance)
        except ContextError as error:
            note(f"the engines of {bundle.path} answer untried: {error}")
            return
        trial.judge(
            {
                s.stage: f"{s.stage} error {s.error:.3g}, allowed {s.tolerance:.3g}"
                for s in stages
                if not s.passed
            }
        )


def replay_goldens(
    session: Session, goldens: Sequence[Golden], tolerance: Mapping[str, float]
) -> list[StageError]:
    """Runs golden cases through the engine, each stage fed PyTorch's inputs, and
    returns the errors of vision, prefill and decode.
    """
    found = []
    session.forget()  # its cache rows are about to be others'
    for golden in goldens:
        embeds = session.engine.embed_image(
            golden.pixels, pool_matrix(session.spec.vision.grid, golden.pool_size)
        )[0]
        text = len(golden.before) + len(golden.after)
        CacheBudget(session.engine.capacity, text + len(golden.tokens), golden.pool_size**2).allow(
            1
        )
        inputs = session.embed_prompt(
            golden.before.tolist(), golden.image_embeds, golden.after.tolist()
        )
        prefill = session.engine.forward(inputs, 0).copy()
        steps = np.empty_like(golden.steps)
        for index, token in enumerate(golden.tokens.tolist()):
            steps[index] = session.engine.forward(
                session.embed_prompt([token], golden.image_embeds[:0], []), inputs.shape[1] + index
            )
        found.append((embeds, prefill, steps))
    return stage_errors(goldens, found, tolerance)


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
