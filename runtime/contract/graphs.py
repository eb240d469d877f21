"""Names, shapes and data types of the inputs and outputs of both graphs, shared by
exporter, engines and tests.
"""

from __future__ import annotations

__all__ = [
    "IMAGE_EMBEDS",
    "INPUTS_EMBEDS",
    "LOGITS",
    "LOGITS_MASS",
    "LOGITS_ROWS",
    "LOGITS_TO_KEEP",
    "NEXT_TOKEN",
    "PIXELS",
    "POOL",
    "POSITION_IDS",
    "SEQLENS_K",
    "TOTAL_LENGTH",
    "key_cache",
    "present",
    "value_cache",
]
PIXELS = "pixels"  # [N, 3, S, S] float32, normalised
POOL = "pool"  # [T, s*s] float32, rows sum to one
IMAGE_EMBEDS = "image_embeds"  # [N, T, H] float32
INPUTS_EMBEDS = "inputs_embeds"  # [B, L, H] float32
POSITION_IDS = "position_ids"  # [B, L] int64, also the cache rows that are written
SEQLENS_K = (
    "seqlens_k"  # [B] int32, cpu and cuda targets: cache rows filled after the call, minus one
)
TOTAL_LENGTH = "total_sequence_length"  # int32 scalar, likewise: cache rows filled after the call
LOGITS_TO_KEEP = (
    "logits_to_keep"  # [1] int64, cpu target: how many of the last positions get logits
)
LOGITS_ROWS = "logits_rows"  # [n] int64, targets on GPUs: positions along L that get logits
NEXT_TOKEN = "next_token"  # [n] int64, targets on GPUs: the most likely token of each such position


# [n] float32, targets on GPUs: the sum of |logits| and of |hidden rows| of the call, finite
# exactly if all are
LOGITS_MASS = "logits_mass"
LOGITS = "logits"  # [B, V] float32, of the last position; [B*n, V] where the last n are asked for


def key_cache(layer: int) -> str:
    """Name of the graph input holding one layer's keys, [B, KV heads, C, D]."""
    return f"key_cache.{layer}"


def value_cache(layer: int) -> str:
    """Name of the graph input holding one layer's values, [B, KV heads, C, D]."""
    return f"value_cache.{layer}"


def present(cache_name: str) -> str:
    """Name of the graph output that is the updated cache of the input `cache_name`."""
    return f"present.{cache_name}"
