"""What the engine caches share: where they are, how large they may grow, and how a
folder of theirs is known to be the one its maker wrote.

Each engine made for this machine lies in a folder named by a fingerprint of what it was
made from and for, beside a mark that identifies its files. Folders are made under a
staging name and renamed; the one used longest ago goes first when room is needed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from runtime.contract.errors import BusyError, UsageError
from runtime.contract.files import locked

__all__ = [
    "MARK",
    "ROOTS",
    "engine_cache_bytes",
    "identity",
    "make_room",
    "read_mark",
    "staging_of",
]

MARK = "engine.json"
ROOTS = ("engines", "engines-tensorrt")
"""Folders of the cache that hold engines; one bound holds for all of them."""

_DEFAULT_GB, _MOST_GB = 16.0, 1e6
_MAX_MARK = 1 << 16
_STAGING = ".making"


def engine_cache_bytes() -> int:
    """How large the caches may grow: $INFMLLM_ENGINE_CACHE_GB (0: none), by default 16
    GB.
    """
    text = os.environ.get("INFMLLM_ENGINE_CACHE_GB", "")
    try:
        return max(0, int(min(float(text or _DEFAULT_GB), _MOST_GB) * 1e9))
    except ValueError:
        raise UsageError(
            f"INFMLLM_ENGINE_CACHE_GB is {text!r:.40}, expected a number of gigabytes, 0 for no "
            f"engine cache"
        ) from None


def staging_of(ready: Path) -> Path:
    """Where a folder is made before it gets its name."""
    return ready.parent / f".{ready.name}{_STAGING}"


def identity(path: Path) -> list[int]:
    """Inode, size and time of a file: they change with whatever is done to it."""
    info = path.stat()
    return [info.st_ino, info.st_size, info.st_mtime_ns]


def read_mark(folder: Path) -> dict[str, Any]:
    """What the folder's maker noted; empty if there is no such note, or none of ours."""
    try:
        if (folder / MARK).stat().st_size > _MAX_MARK:
            return {}
        mark = json.loads((folder / MARK).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return mark if isinstance(mark, dict) else {}


def make_room(root: Path, limit: int, wanted: int) -> None:
    """Removes engines used longest ago, of all kinds, until `wanted` bytes fit; raises
    `OSError` if the disk has no room even so.
    """
    engines = []
    for folder in _engines(root):
        with contextlib.suppress(OSError):
            size = sum(file.stat().st_size for file in folder.iterdir())
            engines.append(((folder / MARK).stat().st_mtime_ns, size, folder))
    total = sum(size for _, size, _ in engines)
    for _, size, folder in sorted(engines):
        if total + wanted <= limit:
            break
        shutil.rmtree(
            folder, ignore_errors=True
        )  # a process that has it mapped keeps it until it ends
        total -= size
    if shutil.disk_usage(root).free < wanted:
        raise OSError(f"{wanted >> 20} MiB of disk are needed at {root}")


def _engines(root: Path) -> list[Path]:
    """The folders of all caches beside `root`; what killed processes left of unfinished
    ones is removed.
    """
    found = []
    for cache in (root.parent / name for name in ROOTS):
        if not cache.is_dir():
            continue
        for left in cache.glob(f".*{_STAGING}"):
            with (
                contextlib.suppress(BusyError, OSError),
                locked(cache / left.name[1:].removesuffix(_STAGING)),
            ):
                shutil.rmtree(left, ignore_errors=True)
        found += [
            folder
            for folder in cache.iterdir()
            if folder.is_dir() and not folder.name.startswith(".")
        ]
    return found
