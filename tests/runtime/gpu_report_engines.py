"""Helpers shared by `test_gpu_report.py` and `test_gpu_report_faults.py`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runtime.contract.bundle import Bundle
from runtime.doctor.facts import Facts
from runtime.doctor.probes import Probe
from runtime.engines import TARGETS, EngineOptions
from runtime.engines.onnxruntime.cuda import OrtCudaEngine
from runtime.engines.onnxruntime.io_binding import HOST
from runtime.engines.onnxruntime.tensorrt_rtx import OrtRtxEngine
from tests.gpu.settings import Effort, Settings
from tests.runtime.doctor_machines import GPU_ORT, driver, machine, tensorrt

BUNDLES = (("cuda", "fp16"), ("tensorrt", "fp16"), ("tensorrt", "int8"), ("rtx", "fp16"))


FEW = Effort(rounds=2, steps=3, repetitions=2, new_tokens=6, samples=4, questions=0)


class HostCuda(OrtCudaEngine):
    """The engine of the CUDA provider, on the CPU's memory."""

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        super().__init__(bundle, options, HOST)


class HostRtx(OrtRtxEngine):
    """The engine of the TensorRT-RTX plugin, on the CPU's memory."""

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        super().__init__(bundle, options, HOST)


class WrongChoice(HostCuda):
    """Right logits, but the token taken on the device is another."""

    def greedy(self, inputs_embeds: np.ndarray, start: int) -> int:
        return (super().greedy(inputs_embeds, start) + 1) % 900


def use(monkeypatch: pytest.MonkeyPatch, target: str, engine: type) -> None:
    monkeypatch.setitem(
        TARGETS,
        target,
        replace(TARGETS[target], engine=f"{engine.__module__}:{engine.__qualname__}"),
    )


@pytest.fixture
def facts(tmp_path: Path) -> Facts:
    """A machine with a GPU for which every target is installed."""
    packages = {"onnxruntime-gpu": "1.27.0", "tensorrt-cu13": "10.3.0", "cuda-bindings": "13.0.0"}
    answers = {
        "driver": driver("NVIDIA GeForce RTX 4090", (8, 9), "13.0"),
        "tensorrt": tensorrt("10.3.0"),
    }
    answers["cuda_provider"] = Probe(True, {"runs": True})
    found = machine(tmp_path / "root", {**answers, "onnxruntime": GPU_ORT}, packages)
    return replace(found, access=replace(found.access, driver="580.1"))


@pytest.fixture
def settings(
    tmp_path: Path,
    tiny_checkpoint: Path,
    built_for: Callable[[str, str], Path],
    built_tensorrt: Callable[[str], Path],
) -> Settings:
    """A run on bundles built before, which lie in its folder as if brought from another
    machine; PyTorch finds no GPU.
    """
    for target, scheme in BUNDLES:
        built = built_tensorrt(scheme) if target == "tensorrt" else built_for(target, scheme)
        shutil.copytree(built, tmp_path / "out" / "bundles" / f"tiny-{target}-{scheme}")
    return Settings(
        tmp_path / "out", (), tiny_checkpoint, ("cuda",), ("fp16",), FEW, keeps_bundles=True
    )
