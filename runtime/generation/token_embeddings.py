"""The token embedding table of a bundle, mapped into memory, and input embeddings of
token ids.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.contract.bundle import EMBEDDINGS, Bundle
from runtime.contract.errors import BundleError

__all__ = ["embed_prompt", "embed_tokens", "open_token_embeddings"]


def open_token_embeddings(bundle: Bundle) -> NDArray[np.floating]:
    """Maps a bundle's token embeddings [V, H] into memory. Raises `BundleError`."""
    path, spec = bundle.file(EMBEDDINGS), bundle.spec.decoder
    try:
        table: NDArray[np.floating] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BundleError(
            f"{path} is not a readable array ({error}); re-export the bundle"
        ) from None
    expected = (spec.vocab_size, spec.hidden)
    if table.shape != expected or table.dtype not in (np.float32, np.float16):
        raise BundleError(
            f"{path} is {table.dtype} {table.shape}, expected float {expected}; "
            "re-export the bundle"
        )
    # A plain array over the same memory: indexing numpy's memmap class costs microseconds.
    return np.asarray(table)


def embed_tokens(table_VH: NDArray[np.floating], ids: Sequence[int]) -> NDArray[np.float32]:
    """Input embeddings [1, L, H] of token ids."""
    return np.asarray(table_VH[list(ids)], np.float32)[None]


def embed_prompt(
    table_VH: NDArray[np.floating],
    before: Sequence[int],
    image_embeds_TH: NDArray[np.float32],
    after: Sequence[int],
) -> NDArray[np.float32]:
    """Input embeddings [1, L, H] of a prompt: text before, visual tokens, text after."""
    parts = [table_VH[list(before)], image_embeds_TH, table_VH[list(after)]]
    return np.concatenate(parts, dtype=np.float32)[None]
