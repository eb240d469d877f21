"""Machines for the doctor's tests: folders that look like a system, and answers as its
libraries would give them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtime.doctor.checks import CHECKS
from runtime.doctor.facts import DISTRIBUTION, IMPORT_NAMES, Facts, Interpreter, gather
from runtime.doctor.finding import Finding
from runtime.doctor.probes import Probe

VENV = Interpreter("3.12", True, False)
ABSENT = Probe(installed=False)
NO_DRIVER = Probe(
    True, error="OSError: libcuda.so.1: cannot open shared object file: No such file or directory"
)
CPU_ORT = Probe(
    True,
    {
        "version": "1.31.1",
        "package": "onnxruntime",
        "cuda": "",
        "providers": ["CPUExecutionProvider"],
    },
)
GPU_ORT = Probe(
    True,
    {
        "version": "1.27.0",
        "package": "onnxruntime-gpu",
        "cuda": "13.0",
        "providers": ["CUDAExecutionProvider", "CPUExecutionProvider"],
    },
)
PLUGIN = "onnxruntime-ep-nv-tensorrt-rtx-cu13"


def driver(name: str, capability: tuple[int, int], cuda: str, memory_mb: float = 8000.0) -> Probe:
    return Probe(
        True,
        {
            "code": 0,
            "cuda": cuda,
            "devices": [{"name": name, "capability": list(capability), "memory_mb": memory_mb}],
        },
    )


def tensorrt(version: str, library: str = "", fused: bool = False) -> Probe:
    return Probe(True, {"version": version, "library": library or version, "fused": fused})


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def memory_files(total: int, available: int, swap: int = 0, swaps: str = "") -> dict[str, str]:
    info = (
        f"MemTotal:       {total} kB\nMemFree:         100 kB\nMemAvailable:   {available} "
        f"kB\nSwapTotal:      {swap} kB\n"
    )
    return {
        "proc/meminfo": info,
        "proc/swaps": f"Filename\t\tType\t\tSize\t\tUsed\t\tPriority\n{swaps}",
    }


def orin_nano(root: Path) -> Path:
    """An Orin Nano Super developer kit on JetPack 6.2 in its 15 W mode, with a swap
    file.
    """
    write(
        root,
        **{
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: "
            "generic, EABI: aarch64, "
            "DATE: Wed Jan  8 01:49:37 UTC 2025\n# KERNEL_VARIANT: "
            "oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n",
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer "
            "Kit Super\0",
            "proc/cpuinfo": "processor : 0\nFeatures : fp asimd asimddp\nCPU part : 0xd42\n",
            "etc/nvpmodel.conf": "< PARAM TYPE=FILE NAME=CPU_ONLINE >\n< POWER_MODEL ID=0 "
            "NAME=15W >\nCPU_ONLINE CORE_0 1\n"
            "< POWER_MODEL ID=1 NAME=25W >\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n< PM_CONFIG "
            "DEFAULT=1 >\n",
            "var/lib/nvpmodel/status": "pmode:0000\n",
            "sys/class/devfreq/17000000.gpu/min_freq": "306000000\n",
            "sys/class/devfreq/17000000.gpu/max_freq": "612000000\n",
            "dev/nvmap": "",
            "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0": "",
            "usr/lib/python3.10/dist-packages/tensorrt/__init__.py": "",
            **memory_files(
                7802880,
                6200000,
                8388604,
                "/swapfile                               file\t\t8388604\t\t0\t\t-2\n",
            ),
        },
    )
    return root


def machine(
    root: Path,
    answers: Mapping[str, Probe] | None = None,
    packages: Mapping[str, str] | None = None,
    python: Interpreter = VENV,
    **access: Any,
) -> Facts:
    """Facts of the machine whose files lie below `root`, with answers as its libraries
    would give them.
    """
    if not (root / "proc/meminfo").exists():
        write(root, **memory_files(32000000, 20000000))
    given = {
        "driver": NO_DRIVER,
        "onnxruntime": CPU_ORT,
        "cuda_provider": ABSENT,
        "tensorrt": ABSENT,
        "rtx": ABSENT,
        **(answers or {}),
    }
    facts = gather(
        root,
        lambda name: given[name],
        {"onnxruntime": "1.31.1"} if packages is None else packages,
        python,
        {name: (DISTRIBUTION,) for name in IMPORT_NAMES},
    )
    return replace(
        facts, access=replace(facts.access, visible_devices=None, **access), free_mb=50_000.0
    )


def rtx_desktop(root: Path, packages: Mapping[str, str], **answers: Probe) -> Facts:
    """A PC with an RTX 4090 and driver 570, which runs CUDA up to 12.8."""
    version = (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  Wed Feb 26 02:07:11 "
        "UTC 2025\nGCC version:  gcc 13\n"
    )
    write(
        root,
        **{
            "proc/driver/nvidia/version": version,
            "proc/cpuinfo": "model name : AMD Ryzen 9\nflags : avx2 fma avx_vnni\n",
        },
    )
    return machine(
        root,
        {"driver": driver("NVIDIA GeForce RTX 4090", (8, 9), "12.8", 25_000.0), **answers},
        packages,
    )


def say(facts: Facts, check: str) -> Finding | None:
    return next(row for row in CHECKS if row.name == check).run(facts)


def fires(facts: Facts, check: str, level: str, *words: str) -> None:
    found = say(facts, check)
    assert found is not None and found.level == level, found
    for word in words:
        assert word in f"{found.found} | {found.cause} | {found.fix}", found


def silent(facts: Facts, *checks: str) -> None:
    for check in checks:
        found = say(facts, check)
        assert found is None or found.level == "ok", found
