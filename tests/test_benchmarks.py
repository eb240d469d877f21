"""Benchmark scripts still run. What they measure stands in docs/benchmarks.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_size_without_a_checkpoint_is_built_and_asked(tmp_path: Path) -> None:
    command = ["benchmarks/scale.py", "--preset", "nano", "--folder", str(tmp_path / "scale")]
    result = subprocess.run(
        [sys.executable, *command, "--precision", "fp32", "--tokens", "2"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    checkpoint, built, first, second = map(json.loads, result.stdout.splitlines())
    assert checkpoint["checkpoint_gb"] > 0 and built["verdict"] == "VERIFIED"
    assert first["run"] == "first" and second["tokens_per_second"] > 0
    assert not (tmp_path / "scale" / "nano-fp32").exists()


def test_drafted_answers_are_counted(built: Callable[[str], Path]) -> None:
    options = ["--answers", "12", "--drafts", "3", "--tokens", "10"]
    result = subprocess.run(
        [sys.executable, "benchmarks/drafts.py", str(built("fp32")), *options],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    assert found["answers"] == 12 and found["changed"] == 0
    assert found["drafted"] == found["accepted"] and found["drafted"]
