"""Describes the machine from system files: processor, relevant instruction sets,
memory, last cache level and board.
"""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ROOT", "Machine", "read_machine", "read_number", "read_text", "reset_peak_memory"]

ROOT = Path("/")
# x86 flags and ARM features that determine which kernels run.
_ISA = {
    *(
        "avx",
        "avx2",
        "fma",
        "f16c",
        "avx_vnni",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
        "amx_int8",
        "amx_bf16",
        "amx_tile",
    ),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
}
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "": 1}


@dataclass(frozen=True)
class Machine:
    """The machine: processor, board (None unless the device tree names one),
    instruction sets, and memory and last-level cache in MB (10^6 bytes).
    """

    cpu: str
    board: str | None
    isa: tuple[str, ...]
    memory_mb: float
    last_cache_mb: float | None
    os: str


def read_machine(root: Path = ROOT) -> Machine:
    """Reads `/proc`, `/sys` and the device tree below `root`. Missing values are left
    out, never guessed.
    """
    info = read_text(root / "proc/cpuinfo")
    board = read_text(root / "proc/device-tree/model") or None
    flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", info, re.MULTILINE)).split())
    name = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    part = re.search(r"^CPU part\s*:\s*(.+)$", info, re.MULTILINE)
    cpu = (
        name[1].strip()
        if name
        else f"{platform.machine()} part {part[1].strip()}"
        if part
        else platform.processor() or platform.machine()
    )
    total = re.search(r"^MemTotal:\s*(\d+) kB", read_text(root / "proc/meminfo"), re.MULTILINE)
    memory = int(total[1]) * 1024 / 1e6 if total else 0.0
    return Machine(
        cpu,
        board,
        tuple(sorted(flags & _ISA)),
        memory,
        _last_cache(root),
        platform.platform(terse=True),
    )


def _last_cache(root: Path) -> float | None:
    """Returns the size of the highest cache level in MB; None if it is not known."""
    found: list[tuple[float, float]] = []
    for index in sorted((root / "sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, size = (
            read_number(index / "level"),
            re.fullmatch(r"(\d+)([KMG]?)", read_text(index / "size")),
        )
        if level is not None and size:
            found.append((level, int(size[1]) * _UNITS[size[2]] / 1e6))
    return max(found)[1] if found else None


def read_text(path: Path) -> str:
    """Reads a small system file without surrounding white space; empty if it cannot be
    read.
    """
    try:
        return path.read_text(errors="replace").strip("\0\n\t ")
    except OSError:
        return ""


def read_number(path: Path) -> float | None:
    """Returns the number in a system file; None if there is none."""
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return None


def reset_peak_memory() -> bool:
    """Resets the peak memory that the system records for this process. Returns False if
    the system does not allow it.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
