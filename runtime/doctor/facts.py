"""Gathers everything that the checks need, once: machine, Python, GPU access, packages,
and the answers of library probes.
"""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from runtime.contract.bundle import cache_folder
from runtime.doctor.compatibility import Jetpack, find_jetpack, numbers
from runtime.doctor.probes import PROBES, Probe, run_probe
from runtime.hardware.machine import ROOT, Machine, read_machine, read_text
from runtime.hardware.system import Access, Jetson, Memory, read_access, read_jetson, read_memory

__all__ = [
    "DISTRIBUTION",
    "IMPORT_NAMES",
    "Facts",
    "GpuDevice",
    "Interpreter",
    "gather",
    "installed_import_owners",
    "installed_packages",
    "this_interpreter",
]

DISTRIBUTION = "infmllm-edge"
IMPORT_NAMES = ("runtime", "trainer", "calibration", "export")
"""The packages of this distribution (`tool.setuptools.packages` in `pyproject.toml`)."""

_PLUGIN = "onnxruntime-ep-nv-tensorrt-rtx"
_PACKAGES = (
    *("onnxruntime", "onnxruntime-gpu", _PLUGIN, f"{_PLUGIN}-cu12", f"{_PLUGIN}-cu13"),
    *(
        "tensorrt",
        "tensorrt-cu12",
        "tensorrt-cu13",
        "tensorrt-cu12-libs",
        "tensorrt-cu13-libs",
        "tensorrt-cu12-bindings",
        "tensorrt-cu13-bindings",
    ),
    *(
        "cuda-python",
        "cuda-bindings",
        "nvidia-ml-py",
        "nvidia-cudnn-cu12",
        "nvidia-cudnn-cu13",
        "nvidia-cuda-runtime-cu12",
        "nvidia-cuda-runtime",
    ),
)


@dataclass(frozen=True)
class Interpreter:
    """The Python interpreter: its version ("3.12"), whether it is a virtual
    environment, and whether it sees the packages of the system's Python.
    """

    version: str
    virtual: bool
    sees_system: bool


@dataclass(frozen=True)
class GpuDevice:
    """A GPU as CUDA's driver reports it: name, compute capability, and memory in MB
    (10^6 bytes).
    """

    name: str
    capability: tuple[int, int]
    memory_mb: float


@dataclass(frozen=True)
class Facts:
    """All facts about a machine. `cache` is the engine cache's folder and `free_mb` the
    free disk space there. `import_owners` maps each of our import names to the
    installed packages that bring a module of that name.
    """

    machine: Machine
    python: Interpreter
    memory: Memory
    access: Access
    jetson: Jetson | None
    packages: Mapping[str, str]
    probes: Mapping[str, Probe]
    cache: str
    free_mb: float
    import_owners: Mapping[str, tuple[str, ...]]

    @property
    def devices(self) -> tuple[GpuDevice, ...]:
        """The GPUs that CUDA finds."""
        found = self.probes["driver"].values.get("devices", ())
        return tuple(
            GpuDevice(
                device["name"],
                (device["capability"][0], device["capability"][1]),
                device["memory_mb"],
            )
            for device in found
        )

    @property
    def driver_cuda(self) -> str:
        """The newest CUDA version that this driver supports, such as "12.6"; empty
        without a driver.
        """
        return str(self.probes["driver"].values.get("cuda", ""))

    @property
    def jetpack(self) -> Jetpack | None:
        """The JetPack of a Jetson, if it is known."""
        return find_jetpack(self.jetson.l4t) if self.jetson else None

    @property
    def tensorrt_cuda(self) -> int | None:
        """The CUDA major version that TensorRT is built for, from its package, else
        from JetPack; None if neither tells.
        """
        for major in (13, 12):
            if any(name.startswith(f"tensorrt-cu{major}") for name in self.packages):
                return major
        return numbers(self.jetpack.cuda)[0] if self.jetpack else None

    @property
    def plugin(self) -> str:
        """Name of the installed TensorRT-RTX plugin package; empty if there is none."""
        return next(
            (
                name
                for name in (f"{_PLUGIN}-cu13", f"{_PLUGIN}-cu12", _PLUGIN)
                if name in self.packages
            ),
            "",
        )


def gather(
    root: Path = ROOT,
    probe: Callable[[str], Probe] = run_probe,
    packages: Mapping[str, str] | None = None,
    python: Interpreter | None = None,
    import_owners: Mapping[str, tuple[str, ...]] | None = None,
) -> Facts:
    """Reads the machine below `root` and probes every library; takes a few seconds."""
    found = installed_packages() if packages is None else packages
    asked = {
        name: probe(name)
        for name in PROBES
        if name != "cuda_provider" or "onnxruntime-gpu" in found
    }
    cache = cache_folder()
    near = next(path for path in (cache, *cache.absolute().parents) if path.exists())
    return Facts(
        read_machine(root),
        python or this_interpreter(),
        read_memory(root),
        read_access(root),
        read_jetson(root),
        found,
        asked,
        str(cache / "engines"),
        shutil.disk_usage(near).free / 1e6,
        installed_import_owners() if import_owners is None else import_owners,
    )


def installed_packages() -> dict[str, str]:
    """Returns the versions of the installed packages that any engine needs."""
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def installed_import_owners() -> dict[str, tuple[str, ...]]:
    """Returns the installed packages that bring each of our import names. Takes about
    0.3 s, because the file list of every package is read.
    """
    owners = importlib.metadata.packages_distributions()
    return {name: tuple(sorted(set(owners.get(name, ())))) for name in IMPORT_NAMES}


def this_interpreter() -> Interpreter:
    """Describes the Python that runs this code. The pyvenv.cfg of a virtual environment
    says whether it sees the system's packages.
    """
    virtual = sys.prefix != sys.base_prefix
    shared = (
        not virtual
        or "include-system-site-packages = true"
        in read_text(Path(sys.prefix) / "pyvenv.cfg").lower()
    )
    return Interpreter(
        ".".join(platform.python_version_tuple()[:2]), virtual, shared and sys.base_prefix == "/usr"
    )
