"""The engine cache: large graphs with their weights packed for this machine's kernels, on disk, so that loading is mapping them.

ONNX Runtime packs weights when it opens a graph, which costs seconds and a second copy in memory. The first process does that once and saves the
result under a fingerprint of graph, ONNX Runtime, CPU and settings; what the fingerprint does not name exactly is never loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import onnxruntime as ort

from runtime.contract.bundle import Bundle, cache_folder
from runtime.contract.console import note

__all__ = ["engine_cache_bytes", "stored"]

WORTH = 64 << 20
"""Bytes of weights from which a graph is kept."""

_DEFAULT_GB = 16.0
_RECIPE = 1  # part of the fingerprint: raise it when what is saved changes
_MODEL, _WEIGHTS, _MARK = "model.onnx", "model.bin", "engine.json"
_SPACE = 2.3  # disk taken, against a graph's weights
_MAX_MARK = 1 << 16


def engine_cache_bytes() -> int:
    """How large the cache may grow: $INFMLLM_ENGINE_CACHE_GB (0: none), by default 16 GB."""
    try:
        return int(float(os.environ.get("INFMLLM_ENGINE_CACHE_GB", _DEFAULT_GB)) * 1e9)
    except ValueError:
        return 0


def _cpu() -> str:
    """What packed weights depend on: the instruction sets of this CPU."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    found = sorted({line.strip() for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return "\n".join([platform.machine(), platform.processor(), *found])


def stored(bundle: Bundle, file: str, settings: Callable[[], ort.SessionOptions], note_of_settings: str) -> Path | None:
    """The prepared graph's path, made now if this is the first time; None where it is not worth it, impossible, or being made by another process."""
    weights, limit = bundle.files.get(file.replace(".onnx", ".weights")), engine_cache_bytes()
    if weights is None or weights[0] < WORTH or limit < _SPACE * weights[0]:
        return None
    parts = [str(_RECIPE), bundle.files[file][1], weights[1], ort.__version__, note_of_settings, _cpu()]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    root = cache_folder() / "engines"
    ready = root / name
    if _intact(ready):
        with contextlib.suppress(OSError):
            os.utime(ready / _MARK)
        return ready / _MODEL
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f".{name}.lock") as held:
            if held is None:
                return None
            _make_room(root, limit, int(_SPACE * weights[0]))
            _make(bundle.file(file), ready, root / f".{name}.making", settings())
    except OSError as error:
        note(f"weights are not kept packed for this CPU ({error.strerror or error}); loading takes longer")
        return None
    return ready / _MODEL if _intact(ready) else None


def _make(source: Path, ready: Path, staging: Path, settings: ort.SessionOptions) -> None:
    """Opens the graph once, which writes it and its packed weights, and puts the folder in place."""
    note(f"packing the weights of {source.name} for this CPU (once)")
    for folder in (ready, staging):
        shutil.rmtree(folder, ignore_errors=True)
    staging.mkdir()
    try:
        settings.optimized_model_filepath = str(staging / _MODEL)
        settings.add_session_config_entry("session.optimized_model_external_initializers_file_name", _WEIGHTS)
        settings.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        settings.add_session_config_entry("session.save_external_prepacked_constant_initializers", "1")
        ort.InferenceSession(str(source), settings, providers=["CPUExecutionProvider"])
        (staging / _MARK).write_text(json.dumps({path.name: _identity(path) for path in (staging / _MODEL, staging / _WEIGHTS)}))
        os.rename(staging, ready)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _identity(path: Path) -> list[int]:
    """Inode, size and time of a file: they change with whatever is done to it."""
    info = path.stat()
    return [info.st_ino, info.st_size, info.st_mtime_ns]


def _intact(folder: Path) -> bool:
    """True if the folder's files are the very ones its maker wrote."""
    mark = folder / _MARK
    try:
        if mark.stat().st_size > _MAX_MARK:
            return False
        wanted = json.loads(mark.read_text())
        return isinstance(wanted, dict) and all(wanted.get(name) == _identity(folder / name) for name in (_MODEL, _WEIGHTS))
    except (OSError, ValueError, RecursionError):
        return False


def _make_room(root: Path, limit: int, wanted: int) -> None:
    """Removes engines used longest ago until `wanted` bytes fit; raises `OSError` if the disk has no room even so."""
    engines = []
    for folder in root.iterdir():
        with contextlib.suppress(OSError):
            if folder.is_dir() and not folder.name.startswith("."):
                size = sum(file.stat().st_size for file in folder.iterdir())
                engines.append(((folder / _MARK).stat().st_mtime_ns, size, folder))
    total = sum(size for _, size, _ in engines)
    for _, size, folder in sorted(engines):
        if total + wanted <= limit:
            break
        shutil.rmtree(folder, ignore_errors=True)  # a process that has it mapped keeps it until it ends
        total -= size
    if shutil.disk_usage(root).free < wanted:
        raise OSError(f"{wanted >> 20} MiB of disk are needed at {root}")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[IO[bytes] | None]:
    """The open lock file, or None if another process holds it."""
    import fcntl

    with path.open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
            return
        yield file
        path.unlink(missing_ok=True)
