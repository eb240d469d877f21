"""Builds a bundle with one list of steps: calibrate, capture, simplify, lower,
quantise, pack, verify. Each step takes a `Build` and returns it with its results added.

Weights stay in the checkpoint's files until the packing step writes them, one tensor at
a time. Everything is written to a staging folder. The bundle appears under its name
only after it passes the parity gate, or if an unverified bundle was allowed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from export import manifest, steps
from export.cache import workspace
from export.planning.room import check_room
from export.state import Build, BuildOptions, Detail, open_build
from runtime.contract.bundle import MANIFEST, cache_folder
from runtime.contract.files import staged_folder
from runtime.output.console import peak_memory_mib

__all__ = ["STEPS", "Build", "BuildOptions", "build"]


STEPS: tuple[tuple[str, Callable[[Build], Build]], ...] = (
    ("run PyTorch and calibrate", steps.run_and_calibrate),
    ("capture graphs", steps.capture_graphs),
    ("simplify", steps.simplify),
    ("lower to target", steps.lower),
    ("apply precision", steps.apply_scheme),
    ("pack bundle", steps.pack),
    ("verify against PyTorch", steps.verify),
)


def build(
    options: BuildOptions,
    progress: Callable[[str], None] = lambda step: None,
    detail: Detail = lambda done, total, text: None,
    announce: Callable[[str], None] = lambda text: None,
) -> Build:
    """Builds a bundle at `options.out`, or reuses an identical one already there. On
    any error the previous bundle is untouched.

    Calls `announce` with what the build will need, `progress` with the name of each step,
    and `detail` with the state of a long step. Raises `UsageError`, `DataError`,
    `CheckpointError`, or `BuildError` with its subclass `ParityError`.
    """
    state = replace(open_build(options), detail=detail)
    if found := manifest.existing(state):
        return found
    announce(check_room(manifest.plan_of(state), (options.out, cache_folder()), options.force))
    with staged_folder(options.out, MANIFEST) as folder, workspace(state.key) as work:
        state = replace(state, folder=folder, work=work)
        for name, step in STEPS:
            progress(name)
            started = time.monotonic()
            state = step(state)
            cost = {
                "seconds": round(time.monotonic() - started, 1),
                "peak_mib": round(peak_memory_mib()),
            }
            state = replace(state, costs={**state.costs, name: cost})
        manifest.write(state)
    return state
