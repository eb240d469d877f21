"""A machine with a simulated GPU and TensorRT, and bundles for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

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
def built_tensorrt(built_for: Callable[[str, str], Path]) -> Callable[[str], Path]:
    """Returns a function: `built_tensorrt(scheme)` is the TensorRT bundle of that scheme.
    Do not change the bundle.
    """
    return lambda scheme: built_for("tensorrt", scheme)
