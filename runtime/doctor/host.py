"""Checks of the machine itself: processor, memory, disk, WSL, and ONNX Runtime on the
CPU.
"""

from __future__ import annotations

from runtime.doctor.compatibility import OLDEST_ONNXRUNTIME, release
from runtime.doctor.facts import DISTRIBUTION, Facts
from runtime.doctor.finding import (
    CPU,
    CUDA,
    RTX,
    WANTED,
    Check,
    Finding,
    note,
    ok,
    problem,
    warning,
)
from runtime.engines import PIP_ONNXRUNTIME_GPU

__all__ = ["CHECKS"]

_FAST_8_BIT = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}
_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
_LITTLE_MEMORY_MB, _LITTLE_DISK_MB = 1000, 4000
_ALL = tuple(WANTED)


def _processor(facts: Facts) -> Finding:
    """Reports instructions for 8-bit products and bf16. Without 8-bit instructions,
    int8 still runs and still saves memory; docs/benchmarks.md measures such a machine.
    """
    features = set(facts.machine.isa)
    fast, bf16 = sorted(features & _FAST_8_BIT), sorted(features & _BF16)
    has = (
        f"{facts.machine.cpu}: 8-bit products by {', '.join(fast)}"
        if fast
        else f"{facts.machine.cpu}: no instructions for 8-bit products (VNNI)"
    )
    has += f"; bf16 by {', '.join(bf16)}" if bf16 else "; no bf16"
    return (
        ok(has)
        if fast
        else note(f"{has}. int8 works, but gains less speed over fp32 than on newer processors")
    )


def _memory(facts: Facts) -> Finding:
    memory = facts.memory
    found = (
        f"{memory.available_mb / 1e3:.1f} of {memory.total_mb / 1e3:.1f} GB available, swap "
        f"{memory.swap_mb / 1e3:.1f} GB"
    )
    if memory.available_mb >= _LITTLE_MEMORY_MB:
        return ok(found)
    return warning(
        found,
        "other programs use the memory",
        "close them; `infmllm-export plan` shows how much memory a model needs",
    )


def _disk(facts: Facts) -> Finding:
    found = f"{facts.free_mb / 1e3:.1f} GB free for the engine cache {facts.cache}"
    if facts.free_mb >= _LITTLE_DISK_MB:
        return ok(found)
    cause = "engines and packed weights take about twice a bundle's weights"
    return warning(
        found,
        cause,
        "free some space, or set INFMLLM_CACHE to a folder on a larger disk; "
        "INFMLLM_ENGINE_CACHE_GB limits its size",
    )


def _wsl(facts: Facts) -> Finding | None:
    return (
        note("this is WSL: it uses the GPU driver of Windows; do not install one in Linux")
        if facts.access.wsl
        else None
    )


def _onnxruntime(facts: Facts) -> Finding:
    probe = facts.probes["onnxruntime"]
    if not probe.installed:
        return problem(
            "onnxruntime is not installed",
            "this Python environment lacks it",
            "pip install 'onnxruntime>=1.24'",
        )
    if probe.error:
        fix = (
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install --force-reinstall "
            "onnxruntime"
        )
        return problem(
            f"onnxruntime does not load: {probe.error}",
            "its files are damaged, or made for another Python or system",
            fix,
        )
    version = str(probe.values["version"])
    if release(version) < OLDEST_ONNXRUNTIME:
        return problem(
            f"onnxruntime {version}",
            "graphs and plugins of this project need 1.24 or newer",
            "pip install -U 'onnxruntime>=1.24'",
        )
    return ok(f"onnxruntime {version}: {', '.join(probe.values['providers'])}")


def _one_onnxruntime(facts: Facts) -> Finding | None:
    """Checks that only one ONNX Runtime package is installed, because both install the
    module `onnxruntime` (github.com/microsoft/onnxruntime/issues/26996).
    """
    if not {"onnxruntime", "onnxruntime-gpu"} <= set(facts.packages):
        return None
    found = (
        f"onnxruntime {facts.packages['onnxruntime']} and onnxruntime-gpu "
        f"{facts.packages['onnxruntime-gpu']} are both installed"
    )
    cause = (
        "both install the module onnxruntime and overwrite each other's files, so either may be "
        "loaded"
    )
    return problem(found, cause, f"{PIP_ONNXRUNTIME_GPU} (for rtx: pip install onnxruntime)")


def _import_names(facts: Facts) -> Finding:
    """Checks that no other package brings a module with one of our import names. pip
    does not notice: the package installed last overwrites the other's files.
    """
    others = {
        name: [owner for owner in owners if owner != DISTRIBUTION]
        for name, owners in facts.import_owners.items()
    }
    taken = {name: owners for name, owners in others.items() if owners}
    if not taken:
        return ok(f"{', '.join(facts.import_owners)} belong to this package only")
    names = sorted({owner for owners in taken.values() for owner in owners})
    return problem(
        "; ".join(f"{name} also comes from {', '.join(owners)}" for name, owners in taken.items()),
        "packages with the same import name overwrite each other's files",
        f"use a virtual environment without {', '.join(names)}, or: pip uninstall -y "
        f"{' '.join(names)} && pip install --force-reinstall --no-deps {DISTRIBUTION}",
    )


CHECKS = (
    Check("import names", _ALL, _import_names),
    Check("processor", (CPU,), _processor),
    Check("memory", _ALL, _memory),
    Check("disk", _ALL, _disk),
    Check("wsl", (CUDA, RTX), _wsl),
    Check("onnxruntime", (CPU, CUDA, RTX), _onnxruntime),
    Check("one onnxruntime", (CUDA, RTX), _one_onnxruntime),
)
