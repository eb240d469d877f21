"""Golden cases: inputs with the results PyTorch computed for them, stored in the bundle
as a plain .npz file.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.contract.errors import BundleError
from runtime.contract.spec import ModelSpec

__all__ = ["Golden", "check_golden", "read_goldens", "write_goldens"]


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
    import zipfile  # slow to import, and only a replay needs it

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
        raise BundleError(f"{path} contains no golden cases; re-export the bundle")
    return goldens


def check_golden(golden: Golden, spec: ModelSpec, where: Path) -> None:
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
