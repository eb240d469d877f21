"""Writing folders so that a reader never sees half of one: stage beside the target, flush to disk, then swap names in one step.

A process killed at any point leaves the previous folder exactly as it was; what it left behind in the staging folder is cleared by the next writer.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from runtime.contract.errors import BuildError, BusyError

__all__ = ["sha256_file", "staged_folder", "sync_file"]

_CHUNK = 1 << 20
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Flushes a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target`; on a clean exit it becomes `target`, on an error `target` is untouched.

    Raises `BusyError` when another process stages the same target, `BuildError` when the disk refuses (full, read-only).
    """
    target = Path(os.path.abspath(target))
    staging = target.parent / f".{target.name}.staging"
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"cannot write to {target.parent}: {error.strerror}; choose another output folder") from None
    lock = os.open(staging, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BusyError(f"another process is building {target}; wait for it, or choose another output folder") from None
        _clear(staging)
        try:
            yield staging
            for path in staging.iterdir():
                sync_file(path)
            sync_file(staging)
            _swap(staging, target)
            sync_file(target.parent)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
                raise BuildError(f"cannot write {target}: {os.strerror(error.errno)}; the previous content is unchanged") from None
            raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    finally:
        os.close(lock)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _swap(staging: Path, target: Path) -> None:
    """Gives `staging` the name `target`; a previous `target` takes the staging name. One atomic step where the file system can."""
    if not target.exists():
        os.rename(staging, target)
    elif not target.is_dir():
        raise BuildError(f"{target} exists and is not a folder; choose another output folder")
    elif not _exchange(staging, target):
        aside = target.parent / f".{target.name}.previous"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(target, aside)
        try:
            os.rename(staging, target)
        except BaseException:
            os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two names with renameat2(2); False where the system or file system has no such call."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))
