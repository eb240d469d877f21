"""Known version requirements of drivers, CUDA, TensorRT and JetPack. Each number has a
source.
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
"""The minimum in `pyproject.toml`; the TensorRT-RTX plugin has the same minimum
(https://nvidia.github.io/TensorRT-RTX-EP-ABI/installation.html).
"""

OLDEST_TENSORRT = (10, 3)
"""The oldest version whose parser accepts the plain decoder. JetPack 6.1 and 6.2 have
it.
"""

FUSED_TENSORRT = (10, 15)
"""The first version with `IKVCacheUpdateLayer`, which the fused decoder needs (the
class reference; TensorRT 10.15.1 release notes).
"""

LEAST_CAPABILITY = (7, 5)
"""Turing: the oldest GPU that TensorRT 11 and the support matrices of TensorRT-RTX
list.
"""

RTX_CAPABILITIES = frozenset({(8, 6), (8, 9), (12, 0), (12, 1)})
"""The GPUs in TensorRT-RTX 1.5's support matrix, except Turing, because the plugin
requires Ampere or later.
"""


@dataclass(frozen=True)
class Jetpack:
    """A JetPack release with the versions of its Jetson Linux (L4T), CUDA, TensorRT and
    system Python.
    """

    name: str
    l4t: str
    cuda: str
    tensorrt: str
    python: str


# The row with the longest `l4t` that is a prefix of the machine's version is used. docs/jetson.md
# names the sources of the rows from 6.1 on.
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
    """Returns the leading numbers of a version: "10.3.0.26" gives (10, 3, 0, 26),
    "1.31.1+cu13" gives (1, 31, 1), and text without them gives ().
    """
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def release(version: str) -> tuple[int, ...]:
    """Returns the major and minor number, by which library releases are compared."""
    return numbers(version)[:2]


def find_jetpack(l4t: str) -> Jetpack | None:
    """Returns the JetPack of a Jetson Linux version such as "36.4.3"; None if unknown."""
    fits = [row for row in JETPACKS if numbers(l4t)[: len(numbers(row.l4t))] == numbers(row.l4t)]
    return max(fits, key=lambda row: len(numbers(row.l4t)), default=None)
