"""Shared parts of the engine caches on disk: location, size limit, and a check that a
folder's files are the ones that were written.

Each engine made for this machine lies in a folder named by a fingerprint of its sources
and its machine. A metadata file in the folder identifies the engine's files. Folders
are built under a staging name and then renamed. When space is needed, the least
recently used engine is removed first.
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
    "METADATA",
    "ROOTS",
    "engine_cache_bytes",
    "identity",
    "make_room",
    "read_mark",
    "staging_of",
]

METADATA = "engine.json"
ROOTS = ("engines", "engines-tensorrt")
"""Cache folders that hold engines; one size limit applies to all of them together."""

_DEFAULT_GB, _MOST_GB = 16.0, 1e6
_MAX_MARK = 1 << 16
_STAGING = ".making"


def engine_cache_bytes() -> int:
    """Returns the size limit of the caches in bytes: $INFMLLM_ENGINE_CACHE_GB (0: no
    cache), by default 16 GB.
    """
    text = os.environ.get("INFMLLM_ENGINE_CACHE_GB", "")
    try:
        return max(0, int(min(float(text or _DEFAULT_GB), _MOST_GB) * 1e9))
    except ValueError:
        raise UsageError(
            f"INFMLLM_ENGINE_CACHE_GB is {text!r:.40}, expected a number of gigabytes (0: no "
            f"engine cache)"
        ) from None


def staging_of(ready: Path) -> Path:
    """Returns the staging folder that is renamed to `ready` once it is complete."""
    return ready.parent / f".{ready.name}{_STAGING}"


def identity(path: Path) -> list[int]:
    """Returns a file's inode, size and modification time, which change when the file is
    modified or replaced.
    """
    info = path.stat()
    return [info.st_ino, info.st_size, info.st_mtime_ns]


def read_mark(folder: Path) -> dict[str, Any]:
    """Returns the metadata stored with a folder's files; empty if the metadata file is
    missing or invalid.
    """
    try:
        if (folder / METADATA).stat().st_size > _MAX_MARK:
            return {}
        mark = json.loads((folder / METADATA).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return mark if isinstance(mark, dict) else {}


def make_room(root: Path, limit: int, wanted: int) -> None:
    """Removes the least recently used engines, of all kinds, until `wanted` bytes fit.
    Raises `OSError` if the disk still has too little free space.
    """
    engines = []
    for folder in _engines(root):
        with contextlib.suppress(OSError):
            size = sum(file.stat().st_size for file in folder.iterdir())
            engines.append(((folder / METADATA).stat().st_mtime_ns, size, folder))
    total = sum(size for _, size, _ in engines)
    for _, size, folder in sorted(engines):
        if total + wanted <= limit:
            break
        shutil.rmtree(
            folder, ignore_errors=True
        )  # a process that has mapped the files can use them until it ends
        total -= size
    if shutil.disk_usage(root).free < wanted:
        raise OSError(f"{wanted >> 20} MiB of disk are needed at {root}")


def _engines(root: Path) -> list[Path]:
    """Returns the engine folders of all caches beside `root`. Also removes staging
    folders that killed processes left behind.
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
