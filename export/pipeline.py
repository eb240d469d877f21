"""The exporter as one list: calibrate, capture, simplify, lower, quantise, pack, verify. Each step takes a build and returns it further along.

Weights stay in the checkpoint's files until the packing step writes them, one tensor at a time. Everything is written to a staging folder; the bundle
appears under its name only after the parity gate has passed.
"""

from __future__ import annotations

import contextlib
import io
import logging
import platform
import resource
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from calibration.blocks import Block, StreamedModel
from calibration.calibrate import Calibrated, calibrate
from calibration.samples import MIN_IMAGES, Case, default_source, draw_cases, draw_examples, set_card
from export.cache import build_key, workspace
from export.capture import capture
from export.devices import DEVICES
from export.drift import find_drift
from export.passes import LOWERING, SIMPLIFY, GraphPass, PassResult, run_passes
from export.passes.int8_cache import int8_cache
from export.passes.quantise import quantise_linears, store_half
from export.pieces import replay_in_pieces
from export.plan import LARGE_BYTES, MIB, make_plan
from export.schemes import Scheme
from export.verify import MetricCheck, golden_count, goldens_of, measure_answers, verdict_json
from runtime.contract.bundle import (
    DECODER,
    EMBEDDINGS,
    GOLDENS,
    MANIFEST,
    PREFILL,
    TOKENIZER,
    UNVERIFIED,
    VERIFIED,
    VISION,
    read_bundle,
    write_manifest,
)
from runtime.contract.errors import BuildError, BundleError, ParityError, UsageError
from runtime.contract.files import staged_folder
from runtime.selftest import StageError, read_goldens, replay, write_goldens
from runtime.session import load
from trainer.checkpoint import StoredCheckpoint, open_checkpoint

__all__ = ["STEPS", "Build", "BuildOptions", "build", "open_build"]

_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")
_GOLDEN_SEED, _CALIBRATION_SEED = 20231, 20230
Detail = Callable[[int, int, str], None]
"""Hears how many parts of how many a long step has done, and of what."""

_ANY_DEVICE = DEVICES["rtx4090"]  # bytes and memory of a build do not depend on it
_FILES = {"vision": VISION, "decoder": DECODER, "prefill": PREFILL}


@dataclass(frozen=True)
class BuildOptions:
    """What to build and where. `dump` receives each graph after every step; `allow_unverified` keeps a bundle that fails parity, marked.

    `calib` names the data that calibration, golden cases and questions come from (empty: the training mix), `samples` how many pictures calibrate,
    `ranges` how static ranges are found, `questions` on how many pictures the bundle answers against PyTorch; `notes` go into the
    manifest's provenance as they are.
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
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Build:
    """The value the steps pass on. `counts` lists (graph, pass, result) in order; `work` keeps finished pieces; `key` names what is built."""

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
    stages: tuple[StageError, ...] = ()
    metrics: MetricCheck = field(default_factory=MetricCheck)
    costs: dict[str, dict[str, float]] = field(default_factory=dict)
    verdict: str = UNVERIFIED
    reused: bool = False


def open_build(options: BuildOptions) -> Build:
    """Opens the checkpoint, draws the calibration set, and names the build by the hash of all that decides its result."""
    if options.target not in LOWERING:
        raise UsageError(f"unknown target {options.target!r}; choose one of: {', '.join(LOWERING)}")
    checkpoint, scheme = open_checkpoint(options.checkpoint), options.scheme
    source = default_source(checkpoint.card, options.calib)
    draw = partial(draw_cases, spec=checkpoint.spec, tokenizer=checkpoint.tokenizer)
    goldens = draw(draw_examples(source, golden_count(checkpoint.spec), _GOLDEN_SEED), seed=_GOLDEN_SEED)
    cases = draw(draw_examples(source, options.samples, _CALIBRATION_SEED, MIN_IMAGES), seed=_CALIBRATION_SEED) if scheme.calibrates else []
    decides: dict[str, Any] = {"checkpoint": checkpoint.sha256, "scheme": scheme, "target": options.target, "questions": options.questions}
    decides |= {"goldens": set_card(source, goldens), "calibration": set_card(source, cases), "ranges": options.ranges, "tools": _tools()}
    return Build(options, checkpoint, source, build_key(decides), goldens, cases)


def _calibrate(build: Build) -> Build:
    scheme, work = build.options.scheme, build.work
    finished = work / GOLDENS
    if not finished.is_file():
        model = StreamedModel(build.checkpoint.spec, build.checkpoint.read)
        blocks = [block.name for block in model.blocks()]

        def tell(block: Block) -> None:
            build.detail(blocks.index(block.name), len(blocks), block.name)

        traces = calibrate(model, build.goldens, build.cases, scheme.wanted, work / "blocks", build.options.ranges, scheme.cache == "int8", tell)
        partial_file = work / "goldens.partial.npz"
        write_goldens(partial_file, goldens_of(traces))
        partial_file.rename(finished)
    return replace(build, calibrated=Calibrated(build.checkpoint.read, work / "blocks"))


def _capture(build: Build) -> Build:
    assert build.calibrated, "calibrated before"
    with _quiet():
        graphs = capture(build.checkpoint.spec, build.calibrated.read)
    build = replace(build, graphs={"vision": graphs.vision, "decoder": graphs.decoder})
    for name, model in build.graphs.items():
        _dump_graph(build, name, model, "00-capture")
    return build


def _passes(build: Build, choose: Callable[[str], Sequence[GraphPass]]) -> Build:
    counts = list(build.counts)
    for name, model in build.graphs.items():
        for step in choose(name):
            (result,) = run_passes(model, [step])
            counts.append((name, *result))
            _dump_graph(build, name, model, f"{len(counts):02d}-{step.name}")
    return replace(build, counts=tuple(counts))


def _simplify(build: Build) -> Build:
    with _quiet():
        return _passes(build, lambda name: SIMPLIFY)


def _lower(build: Build) -> Build:
    build = _passes(build, lambda name: LOWERING[build.options.target][name])
    steps = {step.name for passes in LOWERING[build.options.target].values() for step in passes}
    refused = [reason for _, step, result in build.counts for reason in result.refused if step in steps]
    if refused:
        raise BuildError(f"target {build.options.target} cannot run this graph: {refused[0]}; report it with --dump")
    return build


def _apply_scheme(build: Build) -> Build:
    scheme, calibrated = build.options.scheme, build.calibrated
    assert calibrated, "calibrated before"
    if scheme.prefill is not None:
        build = replace(build, graphs={**build.graphs, "prefill": build.graphs["decoder"].clone()})

    def steps(name: str) -> list[GraphPass]:
        scheme_of = partial(scheme.linear, prefill=name == "prefill")
        cache = [int8_cache(calibrated)] if scheme.cache == "int8" and name != "vision" else []
        return [store_half(scheme.half), quantise_linears(scheme_of, calibrated), *cache]

    return _passes(build, steps)


def _pack(build: Build) -> Build:
    folder, checkpoint = build.folder, build.checkpoint
    for name, graph in build.graphs.items():
        file = _FILES[name]
        if not (build.work / file).is_file():
            written = build.work / f"partial.{file}"
            tell = partial(_tell_tensor, build.detail, name)
            ir.save(graph, written, external_data=file.replace(".onnx", ".weights"), callback=tell)
            written.rename(build.work / file)
    for name in build.graphs:
        for file in (_FILES[name], _FILES[name].replace(".onnx", ".weights")):
            shutil.move(build.work / file, folder / file)
    dtype = np.float16 if build.options.scheme.embeddings == "fp16" else np.float32
    table = checkpoint.read("decoder.embed_tokens.weight").numpy()
    if np.abs(table).max() > np.finfo(dtype).max:
        raise BuildError(f"token embeddings exceed what {np.dtype(dtype)} holds; build with --precision fp32")
    np.save(folder / EMBEDDINGS, table.astype(dtype))
    shutil.copyfile(checkpoint.path / TOKENIZER, folder / TOKENIZER)
    shutil.copyfile(build.work / GOLDENS, folder / GOLDENS)
    _write_manifest(build)
    return replace(build, graphs={})


def _tell_tensor(detail: Detail, name: str, tensor: object, info: Any) -> None:
    detail(info.index, info.total, f"{name} weights")


def _verify(build: Build) -> Build:
    options = build.options
    stages, metrics = _compare(build)
    passed = all(stage.passed for stage in stages) and metrics.passed
    if not passed and not options.allow_unverified:
        raise ParityError(_failure(build, stages, metrics))
    build = replace(build, stages=tuple(stages), metrics=metrics, verdict=VERIFIED if passed else UNVERIFIED)
    return build


def _compare(build: Build) -> tuple[list[StageError], MetricCheck]:
    """Parity and answers of the packed bundle; graphs too large to load beside PyTorch are replayed part by part, and asked nothing."""
    options, tolerance = build.options, dict(build.options.scheme.tolerance)
    weights = sum(file.stat().st_size for file in build.folder.glob("*.weights"))
    if weights > LARGE_BYTES:
        table = np.load(build.folder / EMBEDDINGS, mmap_mode="r")
        stages = replay_in_pieces(build.folder, build.checkpoint.spec, table, read_goldens(build.folder / GOLDENS), tolerance)
        return stages, MetricCheck(skipped=f"{weights / 1e9:.1f} GB of weights are compared part by part; run infmllm-eval where they fit")
    session = load(build.folder)
    return replay(session, tolerance), measure_answers(session, build.checkpoint, build.source, options.questions, options.scheme.drop)


def _failure(build: Build, stages: Sequence[StageError], metrics: MetricCheck) -> str:
    """What drifted, where it begins, and what to try."""
    failed = [stage for stage in stages if not stage.passed]
    if not failed:
        tasks = ", ".join(f"{task} {found:.1f} of {torch:.1f} %" for task, (torch, found) in metrics.scores.items())
        worse = f"answers got worse by {metrics.drop:.1f} points on {metrics.count} questions, {metrics.allowed:.1f} are allowed ({tasks})"
        return f"{worse}; nothing was written. {_REMEDY}"
    worst = max(failed, key=lambda stage: stage.error / stage.tolerance)
    drift = find_drift(build.folder, build.checkpoint, build.goldens[0], dict(build.options.scheme.tolerance))
    return (
        f"{worst.stage} differs from PyTorch by {worst.error:.3g} (relative RMS), the scheme allows {worst.tolerance:.3g}; nothing was written. "
        f"{drift}. {_REMEDY}"
    )


_REMEDY = (
    "Try --calib with pictures of the kind the model was trained on, --keep for that block, or a higher --precision; "
    "--allow-unverified keeps it, marked"
)

STEPS: tuple[tuple[str, Callable[[Build], Build]], ...] = (
    ("run PyTorch and calibrate", _calibrate),
    ("capture graphs", _capture),
    ("simplify", _simplify),
    ("lower to target", _lower),
    ("apply precision", _apply_scheme),
    ("pack bundle", _pack),
    ("verify against PyTorch", _verify),
)


def build(options: BuildOptions, progress: Callable[[str], None] = lambda step: None, detail: Detail = lambda done, total, text: None) -> Build:
    """Builds a bundle at `options.out`, or finds the very same already there. On any error the previous bundle is untouched.

    `progress` hears each step's name, `detail` what a long step is at. Raises `BuildError`s and `CheckpointError`s.
    """
    state = replace(open_build(options), detail=detail)
    if existing := _existing(state):
        return existing
    with staged_folder(options.out, MANIFEST) as folder, workspace(state.key) as work:
        state = replace(state, folder=folder, work=work)
        for name, step in STEPS:
            progress(name)
            started = time.monotonic()
            state = step(state)
            cost = {"seconds": round(time.monotonic() - started, 1), "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}
            state = replace(state, costs={**state.costs, name: cost})
        _write_manifest(state)
    return state


def _existing(build: Build) -> Build | None:
    """The bundle at the target, if it is whole, came from an equal build, and may be kept."""
    try:
        bundle = read_bundle(build.options.out)
        same = bundle.provenance.get("build_key") == build.key and not build.options.dump
        if not same or (bundle.verdict != VERIFIED and not build.options.allow_unverified):
            return None
        bundle.verify()
    except BundleError:
        return None
    stages = tuple(StageError(row["stage"], row["error"], row["tolerance"], row["agreement"]) for row in bundle.parity["stages"])
    return replace(build, stages=stages, verdict=bundle.verdict, reused=True)


def _tools() -> dict[str, str]:
    return {name: version(name) for name in _TOOLS} | {"python": platform.python_version()}


def _write_manifest(build: Build) -> None:
    (build.folder / MANIFEST).unlink(missing_ok=True)
    scheme, tolerance = build.options.scheme, dict(build.options.scheme.tolerance)
    passes = [{"graph": g, "pass": p, "modified": r.modified, "refused": list(r.refused)} for g, p, r in build.counts]
    provenance: dict[str, Any] = {"checkpoint": build.checkpoint.path.name, "checkpoint_sha256": build.checkpoint.sha256, "build_key": build.key}
    provenance |= {"goldens": set_card(build.source, build.goldens), "calibration": set_card(build.source, build.cases) if build.cases else None}
    provenance["linears"] = {prefix or "rest": linear.text() for prefix, linear in scheme.parts.items()}
    if build.cases and build.calibrated:
        provenance["smoothing"] = {name: round(value, 3) for name, value in build.calibrated.strengths().items()}
    schemes = {"vision": scheme.name, "decoder": scheme.name, "embeddings": scheme.embeddings, "cache": scheme.cache}
    provenance |= {"tools": _tools(), "passes": passes, "steps": build.costs, **build.options.notes}
    provenance["plan"] = _predicted(build)
    write_manifest(
        build.folder, build.checkpoint.spec, build.options.target, schemes, provenance, verdict_json(build.stages, build.metrics, tolerance)
    )


def _predicted(build: Build) -> dict[str, Any]:
    """What the plan said of this build, and what came: bytes on disk (without the manifest) and peak memory of the process."""
    plan = make_plan(build.checkpoint.spec, build.options.scheme, _ANY_DEVICE, samples=len(build.cases))
    actual = sum(file.stat().st_size for file in build.folder.iterdir())
    peak = max((row["peak_mib"] for row in build.costs.values()), default=0.0)
    return {"disk": plan.disk_bytes, "disk_actual": actual, "build_peak_mib": round(plan.build_peak / MIB), "build_peak_mib_actual": peak}


def _dump_graph(build: Build, name: str, model: ir.Model, step: str) -> None:
    if build.options.dump:
        build.options.dump.mkdir(parents=True, exist_ok=True)
        ir.save(model, build.options.dump / f"{name}.{step}.onnx", external_data=f"{name}.{step}.weights")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's own chatter says nothing to our users."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    torch_logger = logging.getLogger("torch.onnx")
    torch_logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(level)
