"""The simulated TensorRT offers nothing that the real ones do not: its names are those of TensorRT's own bindings, the oldest we run on too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import simulated_tensorrt as simulated
from tests.compile_only import bindings
from tests.simulated_cuda import Cuda

ROOT = Path(__file__).parents[2] / ".tensorrt"
LATER = {"get_aliased_input_tensor"}  # asked of fused graphs only, which need 10.15
CLASSES = {
    "Builder": simulated._Builder,
    "INetworkDefinition": simulated._Network,
    "IBuilderConfig": simulated._Config,
    "IOptimizationProfile": simulated._Profile,
    "OnnxParser": simulated._Parser,
    "ICudaEngine": simulated._Engine,
    "IExecutionContext": simulated._Context,
}


def used() -> dict[str, list[str]]:
    """Names by the class they belong to; those of the module itself under the empty name."""
    module = simulated.Simulation(Cuda(), "0", True).module
    found = {name: [member for member in vars(cls) if not member.startswith("_")] for name, cls in CLASSES.items()}
    found["INetworkDefinition"] += ["add_kv_cache_update", "add_attention"]
    found["IBuilderConfig"] += ["progress_monitor"]
    found["Runtime"] = ["deserialize_cuda_engine"]
    found["ILogger"] = ["INTERNAL_ERROR", "ERROR", "log"]
    found["IProgressMonitor"] = ["phase_start", "step_complete", "phase_finish"]
    found["NetworkDefinitionCreationFlag"], found["MemoryPoolType"] = ["STRONGLY_TYPED"], ["WORKSPACE"]
    found["ProfilingVerbosity"] = ["DETAILED"]
    found["TensorIOMode"], found["ExecutionContextAllocationStrategy"] = ["INPUT", "OUTPUT"], ["USER_MANAGED"]
    found[""] = [name for name in vars(module) if not name.startswith("_")] + ["__version__"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("version", ["10.3.0", "11.4.0.106"])
def test_every_name_is_in_the_real_one(version: str) -> None:
    code = f"""
import tensorrt as trt
for owner, names in {used()!r}.items():
    for name in names:
        if not hasattr(getattr(trt, owner) if owner else trt, name):
            print(owner, name)
"""
    environment = bindings(ROOT, version)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-500:]
    missing = set(result.stdout.split("\n")) - {""}
    later = {f"ICudaEngine {name}" for name in LATER} | {"INetworkDefinition add_kv_cache_update", "INetworkDefinition add_attention"}
    assert missing == (later if version == "10.3.0" else set())
