"""Defines a build's options, and the value that the pipeline's steps pass on.

The key of a build is the hash of everything that determines its result. It tells
whether intermediate files and bundles made earlier belong to the same build.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort

from calibration.calibrate import Calibrated
from calibration.parts import CALIBRATION, GOLDENS, QUESTIONS
from calibration.ranges import RANGES
from calibration.samples import (
    MIN_IMAGES,
    Case,
    default_source,
    draw_cases,
    draw_examples,
    overlap,
    set_card,
)
from export.cache import build_key
from export.parity.finding import Finding
from export.parity.references import MetricCheck
from export.passes import PassResult
from export.planning.limits import golden_count
from export.planning.plan import linears
from export.schemes import Scheme
from export.targets import find_lowering
from runtime.contract.bundle import UNVERIFIED
from runtime.contract.errors import UsageError
from runtime.parity import StageError
from trainer.checkpoint import StoredCheckpoint, open_checkpoint

__all__ = ["Build", "BuildOptions", "Detail", "open_build", "tools"]

_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "numpy")
LEAST_TEXT = 64  # tokens reserved for a question and its answer
Detail = Callable[[int, int, str], None]
"""Receives how many parts of a long step are done, how many there are, and what the
step is doing.
"""


@dataclass(frozen=True)
class BuildOptions:
    """Options that tell what to build and where to write it.

    `dump` is a folder that receives each graph after every step. `allow_unverified`
    keeps a bundle that fails parity and marks it. `force` builds even if the plan needs more
    disk or memory than is free.

    `calib` names the data for calibration, golden cases and questions (empty: the
    training mix). `samples` is the number of images for calibration, and `ranges` is
    the method that finds static ranges. `questions` is the number of images on which
    the bundle's answers are compared with PyTorch's. `context` is the length of
    fixed-length caches (default: the model's). `notes` are copied unchanged into the
    manifest's provenance.
    """

    checkpoint: Path
    scheme: Scheme
    target: str
    out: Path
    dump: Path | None = None
    allow_unverified: bool = False
    calib: str = ""
    samples: int = 32
    ranges: str = "mse"
    questions: int = 16
    context: int | None = None
    force: bool = False
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Build:
    """The value that the steps pass on. `counts` lists (graph, pass, result) in order.
    `work` is the folder of finished intermediate files. `key` identifies the build.
    """

    options: BuildOptions
    checkpoint: StoredCheckpoint
    source: str
    key: str
    goldens: Sequence[Case]
    cases: Sequence[Case]
    folder: Path = Path()
    work: Path = Path()
    detail: Detail = field(default=lambda done, total, text: None, repr=False)
    calibrated: Calibrated | None = None
    graphs: dict[str, ir.Model] = field(default_factory=dict)
    counts: tuple[tuple[str, str, PassResult], ...] = ()
    findings: tuple[Finding, ...] = ()
    stages: tuple[StageError, ...] = ()
    metrics: MetricCheck = field(default_factory=MetricCheck)
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    verdict: str = UNVERIFIED
    reused: bool = False
    overlap: str = ""
    """Why parts of the data overlap; empty if they do not."""


def open_build(options: BuildOptions) -> Build:
    """Opens the checkpoint, draws the golden and calibration cases, and computes the
    build key from everything that determines the result.
    """
    find_lowering(options.target)
    if options.dump is not None:
        try:
            options.dump.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"cannot write --dump {options.dump} ({error.strerror}); choose another folder"
            ) from None
    if options.ranges not in RANGES:
        raise UsageError(f"unknown --ranges {options.ranges!r}; choose one of: {', '.join(RANGES)}")
    checkpoint, scheme = open_checkpoint(options.checkpoint), options.scheme
    _check_context(options, checkpoint)
    used = {scheme.entry(name) for name in linears(checkpoint.spec)}
    idle = [prefix for prefix in scheme.parts if prefix not in used]
    if idle:
        raise UsageError(
            f"--keep: {checkpoint.spec.name} has no linear layers in block {idle[0]!r}; names of "
            f"blocks are, for example, decoder.layers.0 and vision_tower.blocks.0"
        )
    source = default_source(checkpoint.card, options.calib)
    draw = partial(draw_cases, spec=checkpoint.spec, tokenizer=checkpoint.tokenizer)
    goldens = draw(draw_examples(source, golden_count(checkpoint.spec), GOLDENS), seed=GOLDENS.seed)
    cases = (
        draw(
            draw_examples(source, options.samples, CALIBRATION, MIN_IMAGES),
            seed=CALIBRATION.seed,
            least=MIN_IMAGES,
        )
        if scheme.calibrates
        else []
    )
    decides: dict[str, Any] = {
        "checkpoint": checkpoint.sha256,
        "scheme": scheme,
        "target": options.target,
        "questions": options.questions,
    }
    decides |= {
        "goldens": set_card(source, goldens),
        "calibration": set_card(source, cases),
        "ranges": options.ranges,
        "tools": tools(),
    }
    asked = (
        [
            (example.name, example.samples)
            for example in draw_examples(source, options.questions, QUESTIONS)
        ]
        if options.questions
        else []
    )
    decides |= {
        "context": options.context,
        "source": source,
        "asked": repr(asked),
        "notes": options.notes,
    }
    return Build(
        options,
        checkpoint,
        source,
        build_key(decides),
        goldens,
        cases,
        overlap=overlap(source),
    )


def _check_context(options: BuildOptions, checkpoint: StoredCheckpoint) -> None:
    """Checks a context length that was asked for. Raises `UsageError` if the target has
    no fixed-length caches, or if the length is more than the model's or too short for
    an image and usual text.
    """
    if options.context is None:
        return
    if not any(plan.fixed for plan in find_lowering(options.target).graphs.values()):
        raise UsageError(
            f"--context of a build does not apply to target {options.target}; leave it out and "
            f"give --context to infmllm-run"
        )
    least, most = max(checkpoint.spec.pool_sizes) ** 2 + LEAST_TEXT, checkpoint.spec.decoder.context
    if not least <= options.context <= most:
        raise UsageError(
            f"--context is {options.context}, expected {least} (room for an image and text) to "
            f"{most} (the context of {checkpoint.spec.name})"
        )


def tools() -> dict[str, str]:
    """Returns the versions of everything a result depends on. ONNX Runtime's version is
    read from the module, because its package may be called onnxruntime-gpu.
    """
    return {name: version(name) for name in _TOOLS} | {
        "onnxruntime": ort.__version__,
        "python": platform.python_version(),
    }
