"""What a machine's own files tell: memory and swap, a Jetson's release and power mode,
and whether this user may open the GPU.

Every reader takes the root of the file system, so that tests can hand it a folder that
looks like another machine.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from runtime.hardware.machine import read_number, read_text

__all__ = ["Access", "Jetson", "Memory", "read_access", "read_jetson", "read_memory"]

# Device files without which CUDA does not start: of a PC or server, of WSL, and of a Jetson
# (nvmap: github.com/NVIDIA/NemoClaw/issues/4231).
_NODES = (
    "nvidia0",
    "nvidiactl",
    "nvidia-uvm",
    "dxg",
    "nvmap",
    "nvhost-gpu",
    "nvhost-ctrl-gpu",
    "nvgpu/igpu0/ctrl",
)
_NVIDIA, _DISPLAY = "0x10de", "0x03"
_LIBRARIES = ("usr/lib/aarch64-linux-gnu", "usr/lib/x86_64-linux-gnu", "usr/lib")


@dataclass(frozen=True)
class Memory:
    """Memory and swap in MB (10^6 bytes); `zram_mb` is the part of swap that lies
    compressed in memory itself.
    """

    total_mb: float
    available_mb: float
    swap_mb: float
    zram_mb: float


@dataclass(frozen=True)
class Jetson:
    """A Jetson: Jetson Linux version, power mode and all modes by id, whether clocks
    are pinned (None: not readable), and JetPack's own TensorRT: the library's version
    and the Python versions its bindings are for.
    """

    l4t: str
    mode: str
    modes: dict[int, str]
    clocks_pinned: bool | None
    tensorrt: str
    bindings: tuple[str, ...]


@dataclass(frozen=True)
class Access:
    """The way to a GPU: its device files, those this user may not open and their
    groups, an NVIDIA card on the bus, the kernel driver's version,
    CUDA_VISIBLE_DEVICES, whether CUDA's forward-compatibility libraries are there, and
    whether this is a container or WSL.
    """

    nodes: tuple[str, ...]
    closed: tuple[str, ...]
    groups: tuple[str, ...]
    card: bool
    driver: str
    visible_devices: str | None
    compat: bool
    container: bool
    wsl: bool


def read_memory(root: Path) -> Memory:
    """From /proc/meminfo and /proc/swaps, whose figures are KiB."""
    info = dict(re.findall(r"^(\w+):\s*(\d+) kB", read_text(root / "proc/meminfo"), re.MULTILINE))
    total, available, swap = (
        int(info.get(name, 0)) * 1024 / 1e6 for name in ("MemTotal", "MemAvailable", "SwapTotal")
    )
    swaps = re.findall(r"^(\S+)\s+\S+\s+(\d+)", read_text(root / "proc/swaps"), re.MULTILINE)
    return Memory(
        total,
        available,
        swap,
        sum(int(size) * 1024 / 1e6 for name, size in swaps if "zram" in name),
    )


def read_jetson(root: Path) -> Jetson | None:
    """None where this is no Jetson. In a container without JetPack's files the version
    is empty.
    """
    found = re.search(
        r"R(\d+)\s*\(release\),\s*REVISION:\s*([\d.]+)", read_text(root / "etc/nv_tegra_release")
    )
    if not found and "jetson" not in read_text(root / "proc/device-tree/model").lower():
        return None
    modes = {
        int(number): name
        for number, name in re.findall(
            r"POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)", read_text(root / "etc/nvpmodel.conf")
        )
    }
    chosen = re.search(r"pmode:0*(\d+)", read_text(root / "var/lib/nvpmodel/status"))
    mode = modes.get(int(chosen[1]), str(chosen[1])) if chosen else ""
    version = f"{found[1]}.{found[2]}" if found else ""
    return Jetson(
        version, mode, modes, _clocks_pinned(root), _system_tensorrt(root), _bindings(root)
    )


def _clocks_pinned(root: Path) -> bool | None:
    """Whether the GPU's clock, or else every core's, may not go down: what
    `jetson_clocks` does.
    """
    ranges = [
        (read_number(path), read_number(path.with_name("max_freq")))
        for path in (root / "sys/class/devfreq").glob("*gp[uc]*/min_freq")
    ]
    if not ranges:
        policies = (root / "sys/devices/system/cpu/cpufreq").glob("policy*/scaling_min_freq")
        ranges = [
            (read_number(path), read_number(path.with_name("scaling_max_freq")))
            for path in policies
        ]
    known = [(least, most) for least, most in ranges if least is not None and most is not None]
    return all(least == most for least, most in known) if known else None


def _system_tensorrt(root: Path) -> str:
    """The version in the name of the library the system has, such as
    libnvinfer.so.10.3.0.
    """
    names = [
        path.name for folder in _LIBRARIES for path in (root / folder).glob("libnvinfer.so.*.*")
    ]
    return max((name.removeprefix("libnvinfer.so.") for name in names), default="")


def _bindings(root: Path) -> tuple[str, ...]:
    """Python versions for which the system has TensorRT's bindings (package
    python3-libnvinfer).
    """
    return tuple(
        sorted(
            path.parts[-3].removeprefix("python")
            for path in (root / "usr/lib").glob("python3.*/dist-packages/tensorrt")
        )
    )


def read_access(root: Path) -> Access:
    """Looks at /dev, /proc and the PCI bus."""
    nodes = [root / "dev" / name for name in _NODES if (root / "dev" / name).exists()]
    closed = [path for path in nodes if not os.access(path, os.R_OK | os.W_OK)]
    cards = [
        path.parent
        for path in (root / "sys/bus/pci/devices").glob("*/vendor")
        if read_text(path) == _NVIDIA
    ]
    version = re.search(
        r"Kernel Module.*?\s(\d+\.[\d.]+)", read_text(root / "proc/driver/nvidia/version")
    )
    container = any(
        (root / name).exists() for name in (".dockerenv", "run/.containerenv")
    ) or "kubepods" in read_text(root / "proc/1/cgroup")
    return Access(
        nodes=tuple(str(path.relative_to(root)) for path in nodes),
        closed=tuple(str(path.relative_to(root)) for path in closed),
        groups=tuple(sorted({_group(path) for path in closed})),
        card=any(read_text(card / "class").startswith(_DISPLAY) for card in cards),
        driver=version[1] if version else "",
        visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        compat=any((root / "usr/local").glob("cuda*/compat*/libcuda.so*")),
        container=container,
        wsl="microsoft" in read_text(root / "proc/version").lower(),
    )


def _group(path: Path) -> str:
    """The group that owns a file, by number where it has no name here (as in a
    container).
    """
    try:
        return path.group()
    except (KeyError, OSError):
        return str(path.stat().st_gid)
