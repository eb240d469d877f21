"""No version meets an unknown name: what the engine asks of TensorRT and CUDA, and what
their simulations offer, is in the real bindings.

TensorRT 10.3 is JetPack 6.2's, 10.16 the last of its generation; cuda-python of CUDA 12
and 13.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import simulated_tensorrt as simulated
from tests.compile_only import bindings, cuda
from tests.simulated_cuda import Cuda

ENGINE = Path(__file__).parents[2] / "runtime" / "engines" / "tensorrt"
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
    """Names by the class they belong to; those of the module itself under the empty
    name.
    """
    module = simulated.Simulation(Cuda(), "0", True).module
    found = {
        name: [member for member in vars(cls) if not member.startswith("_")]
        for name, cls in CLASSES.items()
    }
    found["INetworkDefinition"] += ["add_kv_cache_update", "add_attention"]
    found["IBuilderConfig"] += ["progress_monitor"]
    found["Runtime"] = ["deserialize_cuda_engine"]
    found["ILogger"] = ["INTERNAL_ERROR", "ERROR", "log"]
    found["IProgressMonitor"] = ["phase_start", "step_complete", "phase_finish"]
    found["NetworkDefinitionCreationFlag"], found["MemoryPoolType"] = (
        ["STRONGLY_TYPED"],
        ["WORKSPACE"],
    )
    found["ProfilingVerbosity"] = ["DETAILED"]
    found["TensorIOMode"], found["ExecutionContextAllocationStrategy"] = (
        ["INPUT", "OUTPUT"],
        ["USER_MANAGED"],
    )
    found[""] = [name for name in vars(module) if not name.startswith("_")] + ["__version__"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("version", ["10.3.0", "10.16.1.11", "11.4.0.106"])
def test_every_name_is_in_the_real_one(version: str) -> None:
    code = f"""
import tensorrt as trt
for owner, names in {used()!r}.items():
    for name in names:
        if not hasattr(getattr(trt, owner) if owner else trt, name):
            print(owner, name)
"""
    environment = bindings(ROOT, version)
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-500:]
    missing = set(result.stdout.split("\n")) - {""}
    later = {f"ICudaEngine {name}" for name in LATER} | {
        "INetworkDefinition add_kv_cache_update",
        "INetworkDefinition add_attention",
    }
    assert missing == (later if version == "10.3.0" else set())


def _written(owner: str) -> set[str]:
    """Attribute chains that the engine's files look up in `trt`, `tensorrt` or
    `self.trt`: "MemoryPoolType.WORKSPACE".
    """
    found = set()
    for file in ENGINE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and (
                match := re.match(rf"(?:[a-z_.]*\.)?{owner}\.([A-Z_a-z.]+)$", ast.unparse(node))
            ):
                found.add(match[1])
    return found


def _unknown(names: set[str], module: str, environment: dict[str, str]) -> str:
    """Names that a module does not have, one a line."""
    code = f"""
import importlib, operator
module = importlib.import_module({module!r})
for name in {sorted(names)!r}:
    try:
        operator.attrgetter(name)(module)
    except AttributeError:
        print(name)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-500:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("version", ["10.3.0", "10.16.1.11", "11.4.0.106"])
def test_every_name_the_engine_writes_is_in_the_real_one(version: str) -> None:
    names = {
        name
        for name in _written("trt") | _written("tensorrt")
        if not name.startswith("__") and name != "trt"
    }
    assert {
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
        "MemoryPoolType.WORKSPACE",
        "OnnxParser",
        "IProgressMonitor",
    } <= names, names
    assert not _unknown(names, "tensorrt", bindings(ROOT, version))


@pytest.mark.slow
@pytest.mark.parametrize("version", ["12.9.4", "13.3.1"])
def test_every_cuda_name_is_in_the_real_one(version: str) -> None:
    names = set(re.findall(r"\bcuda[A-Z]\w+(?:\.cuda\w+)?", (ENGINE / "cuda.py").read_text()))
    assert {
        "cudaMemcpy2DAsync",
        "cudaStreamBeginCapture",
        "cudaMemcpyKind.cudaMemcpyHostToDevice",
    } <= names, names
    assert not _unknown(names, "cuda.bindings.runtime", cuda(ROOT, version))
