"""The settings of a run: models, targets, schemes, repetitions and time limits. The
`quick` values are for commands limited to ten minutes.
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
"""Replaces the target's name in rows about PyTorch itself."""

OURS, FLOAT, EAGER, COMPILED = "ours", "ours fp16", "PyTorch eager", "PyTorch compiled"
"""The contenders of a round: a bundle, the fp16 bundle of the same target, and PyTorch
in fp16, both eager and compiled with CUDA graphs.
"""

_QUICK_SCHEMES = ("fp16", "int8", "int8-weights")


@dataclass(frozen=True)
class Effort:
    """How much is measured: timed rounds over all contenders, decode steps per round,
    answers for the latency report, and tokens per answer.

    A build uses `samples` images for calibration and asks about `questions` images.
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
    """The settings of one run. `step_seconds` limits every step and `seconds` the whole
    run (None: no limit). PyTorch computes on `device`.

    With `resume`, results that the report in `out` already has are not measured again.
    With `keeps_bundles`, existing bundles in `out` are used unchanged.
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
        """Returns the presets by name, then the given checkpoint, if any."""
        return (*self.models, *([self.checkpoint] if self.checkpoint else []))

    def schemes_of(self, target: str) -> list[str]:
        """Returns the schemes of a target to run. fp16 comes first, because the others
        are compared with it.
        """
        wanted = self.schemes or (
            _QUICK_SCHEMES if self.quick else tuple(TARGET_SCHEMES[target].schemes)
        )
        return sorted(
            (name for name in TARGET_SCHEMES[target].schemes if name in wanted),
            key=lambda name: name != "fp16",
        )


def model_name(source: str | Path) -> str:
    """Returns the name of a preset or checkpoint in rows."""
    return source if isinstance(source, str) else source.resolve().name


def is_random(source: str | Path) -> bool:
    """Whether the weights are random: true for presets that come without a trained
    model.
    """
    return isinstance(source, str) and source != "nano"
