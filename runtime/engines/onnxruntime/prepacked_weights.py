"""The engine cache of ONNX Runtime on the CPU: large graphs on disk, with weights
packed for this machine's kernels, so that loading only maps them.

ONNX Runtime packs weights when it opens a graph, which costs seconds and a second copy
in memory. The first process does this once and saves the result under a fingerprint of
graph, ONNX Runtime, CPU and settings. A saved graph is loaded only if its fingerprint
matches exactly. It is opened once after saving and must give bit-identical results to
the session that saved it. ONNX Runtime 1.31 writes some packed 4-bit and blockwise
8-bit weights that do not.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from runtime.contract.bundle import Bundle, cache_folder
from runtime.contract.errors import BusyError, EngineError
from runtime.contract.files import locked
from runtime.contract.graphs import LOGITS_TO_KEEP, SEQLENS_K, TOTAL_LENGTH
from runtime.engines.disk_cache import (
    METADATA,
    engine_cache_bytes,
    identity,
    make_room,
    read_mark,
    staging_of,
)
from runtime.output.console import note

__all__ = ["open_stored", "stored"]

WORTH = 64 << 20
"""Smallest size of a graph's weights, in bytes, for which the graph is stored."""

_RECIPE = 1  # part of the fingerprint: increase it when the saved content changes
_MODEL, _WEIGHTS, _USABLE = "model.onnx", "model.bin", "usable"
_SPACE = 2.3  # disk space needed, relative to the size of a graph's weights
_MAX_INPUT = 1 << 28  # largest number of elements in a generated test input


def _cpu() -> str:
    """Describes this CPU's model and instruction sets, on which packed weights depend."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    found = sorted(
        {
            line.strip()
            for line in lines
            if line.startswith(("model name", "flags", "Features", "CPU part"))
        }
    )
    return "\n".join([platform.machine(), platform.processor(), *found])


def stored(
    bundle: Bundle, file: str, settings: Callable[[], ort.SessionOptions], note_of_settings: str
) -> Path | None:
    """Returns the path of the prepared graph, which is made on first use. Returns None
    if this is not worthwhile or not possible, or if another process is making it.
    """
    weights, limit = bundle.files.get(file.replace(".onnx", ".weights")), engine_cache_bytes()
    if weights is None or weights[0] < WORTH or limit < _SPACE * weights[0]:
        return None
    parts = [
        str(_RECIPE),
        bundle.files[file][1],
        weights[1],
        ort.__version__,
        note_of_settings,
        _cpu(),
    ]
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    root = cache_folder() / "engines"
    ready = root / name
    usable = _intact(ready)
    try:
        if usable is None:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            with locked(ready):
                if (usable := _intact(ready)) is None:  # another process may just have made it
                    make_room(root, limit, int(_SPACE * weights[0]))
                    usable = _make(bundle.file(file), ready, settings)
        os.utime(ready / METADATA)
    except BusyError:
        return None
    # ONNX Runtime's exceptions share no public base class. After any error the plain graph is
    # used.
    except Exception as error:
        note(
            f"the packed weights of {file} could not be saved "
            f"({' '.join(str(error).split()):.160}); each start packs them again and takes longer"
        )
        return None
    return ready / _MODEL if usable else None


def _make(source: Path, ready: Path, settings: Callable[[], ort.SessionOptions]) -> bool:
    """Opens the graph once, which writes it and its packed weights. Validates the
    written files and moves the folder into place. Returns False if they are unusable.
    """
    note(f"packing the weights of {source.name} for this CPU (once; later starts are faster)")
    staging = staging_of(ready)
    for folder in (ready, staging):
        shutil.rmtree(folder, ignore_errors=True)
    staging.mkdir(mode=0o700)
    try:
        saving = settings()
        saving.optimized_model_filepath = str(staging / _MODEL)
        saving.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", _WEIGHTS
        )
        saving.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", "1024"
        )
        saving.add_session_config_entry(
            "session.save_external_prepacked_constant_initializers", "1"
        )
        expected = _try(
            ort.InferenceSession(str(source), saving, providers=["CPUExecutionProvider"])
        )
        found = _try(open_stored(staging / _MODEL, settings()))
        usable = len(found) == len(expected) and all(
            np.isfinite(a).all() and np.array_equal(a, b)
            for a, b in zip(expected, found, strict=True)
        )
        if not usable:
            note(
                f"the packed weights of {source.name} gave wrong results and were discarded; each "
                f"start packs them again and takes longer"
            )
            for file in (staging / _MODEL, staging / _WEIGHTS):
                file.write_bytes(b"")
        mark = {path.name: identity(path) for path in (staging / _MODEL, staging / _WEIGHTS)}
        (staging / METADATA).write_text(json.dumps(mark | {_USABLE: usable}))
        os.rename(staging, ready)
        return usable
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def open_stored(path: Path, settings: ort.SessionOptions) -> ort.InferenceSession:
    """Opens a session of a prepared graph, without optimising it again."""
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])


def _try(session: ort.InferenceSession) -> list[NDArray[np.generic]]:
    """Runs generated inputs of one and of three positions. Returns the first output of
    each run.
    """
    rng, found = np.random.default_rng(0), []
    for length in (1, 3):
        feed: dict[str, NDArray[np.generic]] = {
            SEQLENS_K: np.array([length - 1], np.int32),
            TOTAL_LENGTH: np.array(length, np.int32),
            LOGITS_TO_KEEP: np.array([length], np.int64),
        }
        sizes = {"L": length, "C": length}
        for value in session.get_inputs():
            shape = [size if isinstance(size, int) else sizes.get(size, 1) for size in value.shape]
            if math.prod(shape) > _MAX_INPUT:
                raise EngineError(f"{value.name} is {shape}, too large to try")
            if value.name not in feed:
                feed[value.name] = (
                    np.zeros(shape, np.int8)
                    if "int8" in value.type
                    else rng.normal(size=shape).astype(np.float32)
                )
        names = {value.name for value in session.get_inputs()}
        found.append(
            session.run(
                [session.get_outputs()[0].name],
                {name: array for name, array in feed.items() if name in names},
            )[0]
        )
    return found


def _intact(folder: Path) -> bool | None:
    """Returns whether the folder's files may be used, or None if they are not exactly
    the files that were written.
    """
    mark = read_mark(folder)
    try:
        return (
            bool(mark[_USABLE])
            if all(mark[name] == identity(folder / name) for name in (_MODEL, _WEIGHTS))
            else None
        )
    except (OSError, KeyError):
        return None
