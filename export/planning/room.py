"""Says what a build will need before it starts, and refuses what cannot fit."""

from __future__ import annotations

import shutil
from pathlib import Path

from export.planning.plan import Plan
from runtime.contract.errors import BuildError
from runtime.hardware.system import read_memory

__all__ = ["check_room"]

_MARGIN = 0.95  # of what is free; the rest is the system's
_MEGA = 1e6


def check_room(
    plan: Plan, places: tuple[Path, ...], force: bool = False, root: Path = Path("/")
) -> str:
    """Returns a line that shows a build's needs beside what is free: memory, and disk at
    every place that the build writes to. Raises `BuildError` if something does not fit,
    unless `force` is set. `root` is where the system's files are.
    """
    memory, disk = plan.build_peak / _MEGA, plan.disk_bytes / _MEGA
    free = read_memory(root).available_mb
    rows = [("memory", memory, free, "close other programs, or use a larger machine")]
    for place in dict.fromkeys(_existing(place) for place in places):
        there = shutil.disk_usage(place).free / _MEGA
        rows.append((f"disk at {place}", disk, there, "make room there"))
    for what, need, has, remedy in rows:
        if has and need > _MARGIN * has and not force:
            raise BuildError(
                f"the build needs about {need:.0f} MB of {what}, {has:.0f} MB are free; {remedy}, "
                f"or build anyway with --force"
            )
    shown = (f"{need:.0f} MB of {what} ({has:.0f} free)" for what, need, has, _ in rows)
    return f"needs about {', '.join(shown)}"


def _existing(path: Path) -> Path:
    """Returns the nearest folder above a path that exists."""
    path = path.resolve()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path if path.is_dir() else path.parent
