"""What a check says: a level, what was found, and where something does not fit, its
cause and its fix.
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
"""From harmless to fatal: `note` is good to know, `warning` costs speed or comfort,
`problem` keeps a target from running.
"""

CPU, CUDA, TENSORRT, RTX = "cpu", "cuda", "tensorrt", "rtx"
WANTED = {
    CPU: "ONNX Runtime on the CPU",
    CUDA: "ONNX Runtime on an NVIDIA GPU",
    TENSORRT: "TensorRT on a Jetson, PC or server",
    RTX: "the TensorRT-RTX plugin of ONNX Runtime on a desktop RTX GPU",
}
"""What a person may want to run, and what it is."""


@dataclass(frozen=True)
class Finding:
    """A check's result. `cause` and `fix` are empty where there is nothing to do."""

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
    """A question, the targets its answer matters to, and the function that answers it;
    None where the question does not arise.
    """

    name: str
    targets: tuple[str, ...]
    run: Callable[[Facts], Finding | None]


def ok(found: str) -> Finding:
    """As it should be."""
    return Finding("ok", found)


def note(found: str, cause: str = "", fix: str = "") -> Finding:
    """Good to know."""
    return Finding("note", found, cause, fix)


def warning(found: str, cause: str, fix: str) -> Finding:
    """It runs, but slower or less comfortably than it could."""
    return Finding("warning", found, cause, fix)


def problem(found: str, cause: str, fix: str) -> Finding:
    """It will not run."""
    return Finding("problem", found, cause, fix)
