"""Keeps engines on disk under a fingerprint of everything they depend on. Records for
each whether it passed validation here, or why it is not used.

Only the exact file that this machine wrote is opened again: the metadata file beside it
holds its inode, size, time and SHA-256. Deserialising an engine executes its content,
so no other file is ever deserialised.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from runtime.contract.bundle import Bundle, cache_folder
from runtime.contract.errors import BusyError
from runtime.contract.files import locked, sync_file
from runtime.contract.onnx_guard import external_locations
from runtime.engines.disk_cache import (
    METADATA,
    ROOTS,
    engine_cache_bytes,
    identity,
    make_room,
    read_mark,
    staging_of,
)
from runtime.engines.tensorrt.graph_variants import GraphVariant
from runtime.engines.tensorrt.trt import Machine
from runtime.output.console import note

__all__ = ["EngineCache", "fingerprint"]

_RECIPE = 1  # part of the fingerprint: increase it when the built engines change
_ENGINE, _SHA256, _PASSED, _REFUSED = "engine.trt", "sha256", "passed", "refused"
_POLL_SECONDS = 0.2
_MAX_TIMINGS = 4


def fingerprint(bundle: Bundle, machine: Machine, form: GraphVariant) -> str:
    """Returns the name of the engine built for and on this machine from one variant of
    a graph.
    """
    files = [form.file, *sorted(external_locations(bundle.file(form.file)))]
    sizes = form.profiles(form.rows or bundle.spec.decoder.context)
    parts = [
        _RECIPE,
        *(bundle.files[name][1] for name in files),
        form.rows,
        sizes,
        *machine.fingerprint,
    ]
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


class EngineCache:
    """The folder of cached engines. If `keep` is false or the cache limit is zero, it
    keeps no files and remembers validation results and rejections only in memory.
    """

    def __init__(self, keep: bool) -> None:
        self._limit = engine_cache_bytes() if keep else 0
        self._root = cache_folder() / ROOTS[1]
        self._marks: dict[str, dict[str, Any]] = {}

    @property
    def keeps(self) -> bool:
        """True if engines are kept for other processes."""
        return self._limit > 0

    def folder(self, name: str) -> Path:
        """Returns the folder of the engine with that name."""
        return self._root / name

    def timings(self, machine: Machine) -> Path | None:
        """Returns the file in which builds on this machine keep their measured timings,
        or None if nothing is kept. Removes all but the latest such files.
        """
        if not self.keeps:
            return None
        with contextlib.suppress(OSError):
            self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
            for old in sorted(self._root.glob("timing-*"), key=lambda path: path.stat().st_mtime)[
                :-_MAX_TIMINGS
            ]:
                old.unlink()
        return (
            self._root / f"timing-{hashlib.sha256(repr(machine.fingerprint).encode()).hexdigest()}"
        )

    def read(self, name: str) -> mmap.mmap | None:
        """Returns the engine, memory-mapped. Returns None if there is none, or if it is
        not the file that was written.
        """
        path, mark = self.folder(name) / _ENGINE, self._mark(name)
        try:
            if not self.keeps or mark.get(_ENGINE) != identity(path):
                return None
            with path.open("rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            os.utime(self.folder(name) / METADATA)
        except (OSError, ValueError):
            return None
        return content if hashlib.sha256(content).hexdigest() == mark.get(_SHA256) else None

    def write(self, name: str, content: Any) -> None:
        """Stores an engine, completely or not at all; the caller holds `making`. If it
        cannot be stored, a note is printed and the next start builds it again.
        """
        if not self.keeps:
            return
        ready, view = self.folder(name), memoryview(content)
        staging = staging_of(ready)
        try:
            if view.nbytes > self._limit:
                raise OSError(f"{view.nbytes >> 20} MiB exceed INFMLLM_ENGINE_CACHE_GB")
            make_room(self._root, self._limit, view.nbytes)
            shutil.rmtree(ready, ignore_errors=True)
            staging.mkdir(mode=0o700, exist_ok=True)
            (staging / _ENGINE).write_bytes(view)
            sync_file(staging / _ENGINE)
            mark = {_ENGINE: identity(staging / _ENGINE), _SHA256: hashlib.sha256(view).hexdigest()}
            (staging / METADATA).write_text(json.dumps(mark))
            sync_file(staging / METADATA)
            os.rename(staging, ready)
            sync_file(self._root)
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            note(
                f"the engine could not be saved ({' '.join(str(error).split()):.160}); it will be "
                f"built again at the next start"
            )

    def drop(self, name: str) -> None:
        """Removes an engine."""
        shutil.rmtree(self.folder(name), ignore_errors=True)
        self._marks.pop(name, None)

    def passed(self, name: str, trial: str) -> bool:
        """Checks whether an engine has passed a validation, identified by a hash of its
        goldens and tolerances.
        """
        return bool(self._mark(name).get(_PASSED) == trial)

    def refused(self, name: str) -> str:
        """Returns why an engine is not used here; empty if it was not rejected."""
        return str(self._mark(name).get(_REFUSED, ""))

    def accept(self, name: str, trial: str) -> None:
        """Records that an engine has passed a validation."""
        self._remember(name, {_PASSED: trial})

    def refuse(self, name: str, reason: str) -> None:
        """Records why an engine is not used, and deletes its file."""
        with contextlib.suppress(OSError):
            (self.folder(name) / _ENGINE).unlink(missing_ok=True)
        self._remember(name, {_REFUSED: reason})

    def _mark(self, name: str) -> dict[str, Any]:
        kept = read_mark(self.folder(name)) if self.keeps else {}
        return kept | self._marks.get(name, {})

    def _remember(self, name: str, what: dict[str, Any]) -> None:
        self._marks[name] = self._marks.get(name, {}) | what
        if not self.keeps:
            return
        folder = self.folder(name)
        part = folder / f".{METADATA}.{os.getpid()}"
        with contextlib.suppress(OSError):  # with a read-only home, the next start validates again
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            part.write_text(json.dumps(read_mark(folder) | what))
            sync_file(part)
            os.replace(part, folder / METADATA)

    @contextlib.contextmanager
    def making(self, name: str) -> Iterator[None]:
        """Holds the lock for building an engine, after waiting for any process that has
        it. Prints a note if the last build was killed, since the cause may recur.
        """
        if self.keeps:
            with contextlib.suppress(OSError):
                self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not os.access(self._root, os.W_OK):
                note(
                    f"engines cannot be saved, because {self._root} cannot be written; set "
                    f"INFMLLM_CACHE to a writable folder"
                )
                self._limit = 0
        if not self.keeps:
            yield
            return
        with self._turn(name):
            staging = staging_of(self.folder(name))
            if staging.exists():
                note(
                    "the last build of this engine was killed; if memory ran out, close other "
                    "programs or set INFMLLM_WORKSPACE_MB"
                )
                shutil.rmtree(staging, ignore_errors=True)
            with contextlib.suppress(OSError):
                staging.mkdir(mode=0o700)
            try:
                yield
            finally:
                shutil.rmtree(staging, ignore_errors=True)

    @contextlib.contextmanager
    def _turn(self, name: str) -> Iterator[None]:
        told = False
        while True:
            with contextlib.ExitStack() as stack:
                try:
                    stack.enter_context(locked(self.folder(name)))
                except BusyError:
                    if not told:
                        note("another process is building this engine; waiting for it")
                    told = True
                else:
                    yield
                    return
            time.sleep(_POLL_SECONDS)
