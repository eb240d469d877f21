"""Reads system files for memory and swap, a Jetson's release and power mode, and this
user's access to the GPU.

Every reader takes the root of the file system, so tests can pass a folder that imitates
another machine.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from runtime.hardware.machine import read_number, read_text

__all__ = ["Access", "Jetson", "Memory", "read_access", "read_jetson", "read_memory"]

# Device files that CUDA needs on a PC or server, on WSL, and on a Jetson
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
    """Memory and swap in MB (10^6 bytes). `zram_mb` is the part of swap that is
    compressed memory rather than disk.
    """

    total_mb: float
    available_mb: float
    swap_mb: float
    zram_mb: float


@dataclass(frozen=True)
class Jetson:
    """A Jetson. `l4t` is the Jetson Linux version, `mode` the power mode and `modes`
    all modes by id. `clocks_pinned` is None if it cannot be read. `tensorrt` is the
    version of JetPack's TensorRT library, and `bindings` the Python versions its
    bindings support.
    """

    l4t: str
    mode: str
    modes: dict[int, str]
    clocks_pinned: bool | None
    tensorrt: str
    bindings: tuple[str, ...]


@dataclass(frozen=True)
class Access:
    """Access to the GPU. `nodes` are its device files, `closed` those this user may not
    open and `groups` their groups. `card` says whether an NVIDIA card is on the bus,
    `driver` is the kernel driver's version and `visible_devices` is
    CUDA_VISIBLE_DEVICES. `compat` says whether CUDA's forward-compatibility libraries
    are installed; `container` and `wsl` say whether this is a container or WSL.
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
    """Reads /proc/meminfo and /proc/swaps, whose figures are in KiB."""
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
    """Reads a Jetson's release and settings; None if this is not a Jetson. In a
    container without JetPack's files the version is empty.
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
    """Checks whether the GPU's minimum clock equals its maximum, as `jetson_clocks`
    sets it. Without a GPU clock, the CPU cores are checked; None if nothing can be
    read.
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
    """Returns the TensorRT version from the system library's file name, such as
    libnvinfer.so.10.3.0; empty if there is no such library.
    """
    names = [
        path.name for folder in _LIBRARIES for path in (root / folder).glob("libnvinfer.so.*.*")
    ]
    return max((name.removeprefix("libnvinfer.so.") for name in names), default="")


def _bindings(root: Path) -> tuple[str, ...]:
    """Returns the Python versions for which the system has TensorRT's bindings (package
    python3-libnvinfer).
    """
    return tuple(
        sorted(
            path.parts[-3].removeprefix("python")
            for path in (root / "usr/lib").glob("python3.*/dist-packages/tensorrt")
        )
    )


def read_access(root: Path) -> Access:
    """Reads the GPU access from /dev, /proc and the PCI bus."""
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
    """Returns the group that owns a file, or its number if the group has no name here
    (as in a container).
    """
    try:
        return path.group()
    except (KeyError, OSError):
        return str(path.stat().st_gid)
