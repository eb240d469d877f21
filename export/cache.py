"""Keeps the finished intermediate files of a build until the bundle is in place, so
that an interrupted build resumes where it stopped.

Files are stored under a hash of everything that determines the result, including this
project's own source files. So a stale file can never be mistaken for a fresh one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import calibration
import export
import runtime
import trainer
from runtime.contract.bundle import cache_folder
from runtime.contract.errors import BuildError, BusyError
from runtime.contract.files import locked, sha256_file

__all__ = ["build_key", "source_digest", "workspace"]

_KEEP_SECONDS = 7 * 24 * 3600  # age at which files of an abandoned build are removed


def source_digest() -> str:
    """Returns the SHA-256 of this project's own source files, so that any change to
    them invalidates earlier results.
    """
    digest = hashlib.sha256()
    for package in (runtime, trainer, calibration, export):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root)}:{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def build_key(parts: Mapping[str, Any]) -> str:
    """Returns the SHA-256 of everything that determines a result, including the
    compiler's source.
    """
    return hashlib.sha256(
        json.dumps({**parts, "source": source_digest()}, sort_keys=True, default=str).encode()
    ).hexdigest()


@contextlib.contextmanager
def workspace(key: str) -> Iterator[Path]:
    """Opens the folder for this build's intermediate files. It is removed after a clean
    exit and kept otherwise.

    A second process that runs the same build at the same time gets a temporary folder
    of its own.
    """
    root = cache_folder() / "builds"
    folder = root / key[:32]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise BuildError(
            f"cannot write the build cache {root} ({error.strerror}); set INFMLLM_CACHE to a "
            f"writable folder"
        ) from None
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(folder))
        except BusyError:
            yield Path(held.enter_context(tempfile.TemporaryDirectory(prefix="busy-", dir=root)))
            return
        folder.mkdir(exist_ok=True)
        for old in root.iterdir():
            if old != folder and old.is_dir() and time.time() - old.stat().st_mtime > _KEEP_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
        os.utime(folder)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
