"""Machines where ONNX Runtime's package is called onnxruntime-gpu: measuring and
building must not ask for the other name.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path

import onnxruntime as ort
import pytest

from export import state
from runtime.bench.measure import BenchOptions, measure


def test_versions_are_told_where_the_package_has_another_name(
    built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name in ("onnxruntime", "infmllm-edge"):  # the second: a clone that was never installed
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(state, "version", version)
    report = measure(BenchOptions(built("fp32"), repetitions=1, warmup=0, new_tokens=2, threads=1))
    assert (
        report.conditions.onnxruntime == ort.__version__ == state.tools()["onnxruntime"]
        and report.conditions.infmllm
    )
