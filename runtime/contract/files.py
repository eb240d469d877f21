"""Writes folders atomically: files are staged in a folder beside the target, flushed to
disk, and then swapped in by renaming.

A reader never sees a half-written folder. If the process is killed at any point, the
previous content survives, and the next writer removes the abandoned staging folder.
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

__all__ = ["check_target", "locked", "sha256_file", "staged_folder", "sync_file"]

_CHUNK = 1 << 20
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def sha256_file(path: Path) -> str:
    """Returns the hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Flushes a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staged_folder(target: Path, marker: str) -> Iterator[Path]:
    """Yields an empty folder beside `target`. On a clean exit it becomes `target`; on
    an error `target` is unchanged.

    An existing `target` is replaced only if it is empty or holds the file `marker`,
    which shows that this toolchain wrote it. A symbolic link is followed. Raises
    `BusyError` when another process stages the same target. Raises `BuildError` when
    the target holds other files or the disk refuses the write (full, read-only).
    """
    target = Path(os.path.realpath(target))
    staging = target.parent / f".{target.name}.staging"
    swapped = False
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target):
            _restore(target)
            check_target(target, marker)
            _remove(staging)
            staging.mkdir()
            try:
                yield staging
                for path in staging.iterdir():
                    sync_file(path)
                sync_file(staging)
                _swap(staging, target)
                swapped = True
                sync_file(target.parent)
            finally:
                _remove(staging)
    except OSError as error:
        state = (
            "the new content is in place, but was not flushed to disk"
            if swapped
            else "the previous content is unchanged"
        )
        reason = error.strerror or str(error)
        raise BuildError(
            f"cannot write {target}: {reason}; {state}. Free space, or choose another output folder"
        ) from None


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Holds the lock file `.NAME.lock` beside the target, or raises `BusyError`.

    The lock file is deleted on release. A process that had opened it earlier notices
    this, because the path is then missing or has another inode.
    """
    path = target.parent / f".{target.name}.lock"
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            current = path.stat().st_ino == os.fstat(lock).st_ino
        except OSError:
            current = False
        if not current:
            raise BusyError(
                f"another process is building {target}; wait for it, or choose another output "
                f"folder"
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(lock)


def check_target(target: Path, marker: str) -> None:
    """Raises `BuildError` if `target` exists, unless it is an empty folder or one that
    holds the file `marker`.
    """
    if target.exists() and not target.is_dir():
        raise BuildError(f"{target} exists and is not a folder; choose another output folder")
    if target.is_dir() and not (target / marker).is_file() and any(target.iterdir()):
        raise BuildError(
            f"{target} holds other files (no {marker} among them) and is not replaced; choose "
            f"another output folder"
        )


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}.previous"


def _restore(target: Path) -> None:
    """Restores a folder that a killed writer had moved aside. This happens only where
    the system cannot exchange two names in one step.
    """
    if _aside(target).is_dir() and not target.exists():
        os.rename(_aside(target), target)


def _swap(staging: Path, target: Path) -> None:
    """Renames `staging` to `target`. A previous `target` is exchanged with it in one
    atomic step, or moved aside and removed where the system cannot exchange names.
    """
    if not target.exists():
        os.rename(staging, target)
    elif not _exchange(staging, target):
        _remove(_aside(target))
        os.rename(target, _aside(target))
        try:
            os.rename(staging, target)
        except BaseException:
            os.rename(_aside(target), target)
            raise
        _remove(_aside(target))


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two names with renameat2(2). Returns False if the system or the file system
    does not support it.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))
