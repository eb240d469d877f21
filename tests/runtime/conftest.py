"""A machine with a simulated GPU and TensorRT, and bundles for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from export.pipeline import BuildOptions, build
from export.schemes import find_scheme
from tests.simulated_cuda import Cuda
from tests.simulated_tensorrt import Simulation

Install = Callable[..., Simulation]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Install:
    """Returns a function: `gpu(fuses=…)` replaces any real CUDA and TensorRT with the
    simulations. The test gets its own engine cache.
    """
    monkeypatch.setenv("INFMLLM_CACHE", str(tmp_path / "cache"))

    def install(fuses: bool = True, version: str = "10.3.0", total: int = 64 << 20) -> Simulation:
        cuda = Cuda(total)
        simulation = Simulation(cuda, version, fuses)
        package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
        package.bindings, bindings.runtime = bindings, cuda  # type: ignore[attr-defined]
        modules = {
            "cuda": package,
            "cuda.bindings": bindings,
            "cuda.bindings.runtime": cuda,
            "tensorrt": simulation.module,
        }
        for name, module in modules.items():
            module.__spec__ = ModuleSpec(name, None)  # PyTorch's tracer reads the spec
            monkeypatch.setitem(sys.modules, name, module)
        return simulation

    return install


@pytest.fixture(scope="session")
def built_tensorrt(
    tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Returns a function: `built_tensorrt(scheme)` is the tiny checkpoint's bundle for
    TensorRT, built once. Do not change the bundle.
    """
    done: dict[str, Path] = {}

    def get(scheme: str) -> Path:
        if scheme not in done:
            out = tmp_path_factory.mktemp("tensorrt") / scheme
            build(BuildOptions(tiny_checkpoint, find_scheme(scheme, "tensorrt"), "tensorrt", out))
            done[scheme] = out
        return done[scheme]

    return get
