"""The result of a check: a level, the observation and, for anything wrong, its cause
and its fix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from runtime.doctor.facts import Facts

__all__ = [
    "CPU",
    "CUDA",
    "LEVELS",
    "RTX",
    "TENSORRT",
    "WANTED",
    "Check",
    "Finding",
    "note",
    "ok",
    "problem",
    "warning",
]

LEVELS = ("ok", "note", "warning", "problem")
"""Levels from harmless to fatal. A `note` is useful to know, a `warning` costs speed or
comfort, and a `problem` keeps a target from running.
"""

CPU, CUDA, TENSORRT, RTX = "cpu", "cuda", "tensorrt", "rtx"
WANTED = {
    CPU: "ONNX Runtime on the CPU",
    CUDA: "ONNX Runtime on an NVIDIA GPU",
    TENSORRT: "TensorRT on a Jetson, PC or server",
    RTX: "the TensorRT-RTX plugin of ONNX Runtime on a desktop RTX GPU",
}
"""The targets that a user may want to run, each with a description."""


@dataclass(frozen=True)
class Finding:
    """A check's result. `cause` and `fix` are empty if there is nothing to do."""

    level: str
    found: str
    cause: str = ""
    fix: str = ""

    def __post_init__(self) -> None:
        assert self.level in LEVELS, f"{self.level} is no level"
        assert bool(self.cause) == bool(self.fix) and (
            self.cause or self.level in ("ok", "note")
        ), "what is wrong has a cause and a fix"


@dataclass(frozen=True)
class Check:
    """A named check, the targets that its result matters to, and its function. The
    function returns None if the check does not apply.
    """

    name: str
    targets: tuple[str, ...]
    run: Callable[[Facts], Finding | None]


def ok(found: str) -> Finding:
    """Returns a finding that everything is as it should be."""
    return Finding("ok", found)


def note(found: str, cause: str = "", fix: str = "") -> Finding:
    """Returns a finding that is useful to know."""
    return Finding("note", found, cause, fix)


def warning(found: str, cause: str, fix: str) -> Finding:
    """Returns a finding that the target runs, but slower or less comfortably."""
    return Finding("warning", found, cause, fix)


def problem(found: str, cause: str, fix: str) -> Finding:
    """Returns a finding that the target will not run."""
    return Finding("problem", found, cause, fix)
