"""The token table: embeddings of the vocabulary, mapped into memory, and input
embeddings of token ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.contract.bundle import EMBEDDINGS, Bundle
from runtime.contract.errors import BundleError

__all__ = ["embedded", "open_table"]


def open_table(bundle: Bundle) -> NDArray[np.floating]:
    """A bundle's token embeddings [V, H]. Raises `BundleError`."""
    path, spec = bundle.file(EMBEDDINGS), bundle.spec.decoder
    try:
        table: NDArray[np.floating] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BundleError(f"{path} is no readable array ({error}); re-export the bundle") from None
    if table.shape != (spec.vocab_size, spec.hidden) or table.dtype not in (np.float32, np.float16):
        raise BundleError(
            f"{path} is {table.dtype} {table.shape}, expected ({spec.vocab_size}, {spec.hidden}) "
            f"of float; re-export the bundle"
        )
    return np.asarray(
        table
    )  # a plain view of the map: indexing numpy's own class for maps costs microseconds a token


def embedded(table: NDArray[np.floating], ids: Sequence[int]) -> NDArray[np.float32]:
    """Input embeddings [1, L, H] of token ids."""
    return np.asarray(table[list(ids)], np.float32)[None]
