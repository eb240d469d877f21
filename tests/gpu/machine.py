"""Describes the machine of a run with the facts of `runtime.doctor`: GPUs, driver and
packages, and the problems that keep a target from running.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from runtime.doctor.checks import diagnose
from runtime.doctor.facts import Facts

__all__ = ["commit", "describe", "problems"]

_BESIDE = ("torch", "triton", "numpy", "onnx", "onnxscript")


def describe(facts: Facts) -> dict[str, Any]:
    """Returns the report's description of the machine."""
    versions = dict(facts.packages)
    for name in _BESIDE:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpus = [
        asdict(device) | {"capability": "{}.{}".format(*device.capability)}
        for device in facts.devices
    ]
    where = {
        "cpu": facts.machine.cpu,
        "board": facts.machine.board,
        "os": facts.machine.os,
        "python": facts.python.version,
    }
    return {
        "gpus": gpus,
        "driver": facts.access.driver or "",
        "cuda": facts.driver_cuda,
        "packages": versions,
        **where,
    }


def problems(facts: Facts, targets: Sequence[str]) -> dict[str, str]:
    """Returns the doctor's first problem for each target, or an empty string if it sees
    none. In that case, an engine that does not load is a failure.
    """
    found = {}
    for target in targets:
        faults = diagnose(facts, (target,)).problems
        found[target] = f"{faults[0].finding.found}: {faults[0].finding.cause}" if faults else ""
    return found


def commit() -> str:
    """Returns the measured commit, with a plus if files were changed. Returns an empty
    string outside a repository.
    """
    try:
        command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
