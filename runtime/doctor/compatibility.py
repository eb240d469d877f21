"""What is known about versions that fit each other: drivers, CUDA, TensorRT and
JetPack. Every number names its source.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = [
    "DRIVER_FOR_CUDA",
    "FUSED_TENSORRT",
    "JETPACKS",
    "LEAST_CAPABILITY",
    "OLDEST_ONNXRUNTIME",
    "OLDEST_TENSORRT",
    "RTX_CAPABILITIES",
    "Jetpack",
    "find_jetpack",
    "numbers",
    "release",
]

DRIVER_FOR_CUDA = {11: "450", 12: "525", 13: "580"}
"""The oldest driver that runs every minor version of a CUDA major
(https://docs.nvidia.com/deploy/cuda-compatibility, table 1).
"""

OLDEST_ONNXRUNTIME = (1, 24)
"""As `pyproject.toml` asks; the TensorRT-RTX plugin asks the same
(https://nvidia.github.io/TensorRT-RTX-EP-ABI/installation.html).
"""

OLDEST_TENSORRT = (10, 3)
"""The oldest whose parser takes our plain decoder; JetPack 6.1 and 6.2 have it."""

FUSED_TENSORRT = (10, 15)
"""The first with `IKVCacheUpdateLayer` (its class reference; TensorRT 10.15.1 release
notes), which the fused decoder needs.
"""

LEAST_CAPABILITY = (7, 5)
"""Turing, the oldest GPU of TensorRT 11 and in the support matrices of TensorRT-RTX."""

RTX_CAPABILITIES = frozenset({(8, 6), (8, 9), (12, 0), (12, 1)})
"""GPUs of TensorRT-RTX 1.5's support matrix, without Turing: the plugin asks for Ampere
or later.
"""


@dataclass(frozen=True)
class Jetpack:
    """A JetPack release: its Jetson Linux (L4T), and the CUDA, TensorRT and system
    Python it has.
    """

    name: str
    l4t: str
    cuda: str
    tensorrt: str
    python: str


# The longest `l4t` that begins the machine's version counts. docs/jetson.md names the sources
# of the rows from 6.1 on.
JETPACKS = (
    Jetpack("4", "32", "10.2", "8.2", "3.6"),
    Jetpack("5", "35", "11.4", "8.5", "3.8"),
    Jetpack("6", "36", "12.2", "8.6", "3.10"),
    Jetpack("6.1", "36.4", "12.6", "10.3", "3.10"),
    Jetpack("6.2", "36.4.3", "12.6", "10.3", "3.10"),
    Jetpack("6.2.1", "36.4.4", "12.6", "10.3", "3.10"),
    Jetpack("6.2.1", "36.4.7", "12.6", "10.3", "3.10"),
    Jetpack("6.2.2", "36.5", "12.6", "10.3", "3.10"),
    Jetpack("7.0", "38.2", "13.0", "10.13", "3.12"),
    Jetpack("7.1", "38.4", "13.0", "10.13", "3.12"),
    Jetpack("7.2", "39", "13.2", "10.16", "3.12"),
    Jetpack("7.2", "39.2.0", "13.2", "10.16", "3.12"),
    Jetpack("7.2.1", "39.2.1", "13.2", "10.16", "3.12"),
)


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "10.3.0.26" to (10, 3, 0, 26), "1.31.1+cu13" to
    (1, 31, 1); () of anything else.
    """
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def release(version: str) -> tuple[int, ...]:
    """Major and minor number, by which libraries differ."""
    return numbers(version)[:2]


def find_jetpack(l4t: str) -> Jetpack | None:
    """The JetPack of a Jetson Linux version such as "36.4.3", None if it is not known."""
    fits = [row for row in JETPACKS if numbers(l4t)[: len(numbers(row.l4t))] == numbers(row.l4t)]
    return max(fits, key=lambda row: len(numbers(row.l4t)), default=None)
