"""What one run does: which models, targets and schemes, how often, how long; `quick`
figures for commands that may take ten minutes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from export.schemes import TARGET_SCHEMES
from runtime.contract.errors import UsageError
from trainer.config import PRESETS

__all__ = [
    "COMPILED",
    "EAGER",
    "FLOAT",
    "FULL",
    "OURS",
    "PYTORCH",
    "QUICK",
    "TARGETS",
    "Effort",
    "Settings",
    "is_random",
    "model_name",
]

TARGETS = ("cuda", "tensorrt", "rtx")
PYTORCH = "PyTorch"
"""Stands where a target's name does in rows about PyTorch itself."""

OURS, FLOAT, EAGER, COMPILED = "ours", "ours fp16", "PyTorch eager", "PyTorch compiled"
"""Contenders of a round: a bundle, the same target's fp16 beside it, PyTorch in fp16 as
it is and compiled with CUDA graphs.
"""

_QUICK_SCHEMES = ("fp16", "int8", "int8-weights")


@dataclass(frozen=True)
class Effort:
    """How much is measured: timed rounds over all contenders, decoding steps in each,
    answers of the latency report, tokens of an answer.

    `samples` pictures calibrate, `questions` pictures are asked about when a bundle is
    built.
    """

    rounds: int = 15
    steps: int = 64
    repetitions: int = 20
    new_tokens: int = 30
    samples: int = 32
    questions: int = 16


FULL, QUICK = (
    Effort(),
    Effort(rounds=5, steps=32, repetitions=5, new_tokens=16, samples=4, questions=0),
)


@dataclass(frozen=True)
class Settings:
    """One run. `step_seconds` bounds every step, `seconds` the whole (None: no bound);
    `device` is what PyTorch computes on.

    With `resume`, what the report in `out` has already is not measured again; with
    `keeps_bundles` bundles in `out` are taken as they are.
    """

    out: Path
    models: tuple[str, ...] = ("nano", "edge")
    checkpoint: Path | None = None
    targets: tuple[str, ...] = TARGETS
    schemes: tuple[str, ...] = ()
    effort: Effort = FULL
    step_seconds: float = 1800.0
    seconds: float | None = None
    resume: bool = False
    quick: bool = False
    keeps_bundles: bool = False
    device: str = "cuda"

    def __post_init__(self) -> None:
        known = {name for target in TARGETS for name in TARGET_SCHEMES[target].schemes}
        for what, given, choices in (
            ("preset", self.models, set(PRESETS)),
            ("target", self.targets, set(TARGETS)),
            ("scheme", self.schemes, known),
        ):
            for name in given:
                if name not in choices:
                    raise UsageError(
                        f"unknown {what} {name!r}; choose one of: {', '.join(sorted(choices))}"
                    )

    @property
    def sources(self) -> tuple[str | Path, ...]:
        """Presets by name, then the checkpoint that was given, if one was."""
        return (*self.models, *([self.checkpoint] if self.checkpoint else []))

    def schemes_of(self, target: str) -> list[str]:
        """The schemes of a target to run, fp16 first: it is what others are compared
        with.
        """
        wanted = self.schemes or (
            _QUICK_SCHEMES if self.quick else tuple(TARGET_SCHEMES[target].schemes)
        )
        return sorted(
            (name for name in TARGET_SCHEMES[target].schemes if name in wanted),
            key=lambda name: name != "fp16",
        )


def model_name(source: str | Path) -> str:
    """What rows call a preset or checkpoint."""
    return source if isinstance(source, str) else source.resolve().name


def is_random(source: str | Path) -> bool:
    """Whether its weights are random numbers: presets no trained model comes with."""
    return isinstance(source, str) and source != "nano"
