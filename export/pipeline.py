"""Builds a bundle with one list of steps: calibrate, capture, simplify, lower,
quantise, pack, verify. Each step takes a `Build` and returns it with its results added.

Weights stay in the checkpoint's files until the packing step writes them, one tensor at
a time. Everything is written to a staging folder. The bundle appears under its name
only after it passes the parity gate, or if an unverified bundle was allowed.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from calibration.blocks import Block, StreamedModel
from calibration.calibrate import Calibrated, calibrate
from export import manifest
from export.cache import workspace
from export.capture import capture
from export.parity.cpu_reference import reference_session, replay_forms
from export.parity.drift import find_drift
from export.parity.references import MetricCheck, goldens_of, measure_answers
from export.parity.subgraphs import replay_in_pieces
from export.passes import SIMPLIFY, GraphPass, run_passes
from export.planning.plan import LARGE_BYTES
from export.shared_weights import refer_to
from export.state import Build, BuildOptions, Detail, open_build
from export.targets import find_lowering
from runtime.contract.bundle import (
    EMBEDDINGS,
    GOLDENS,
    MANIFEST,
    TOKENIZER,
    UNVERIFIED,
    VERIFIED,
    graph_file,
    read_bundle,
    weights_file,
)
from runtime.contract.errors import BuildError, ParityError
from runtime.contract.files import staged_folder
from runtime.contract.goldens import read_goldens, write_goldens
from runtime.output.console import peak_memory_mib
from runtime.parity import StageError
from runtime.session import load

__all__ = ["STEPS", "Build", "BuildOptions", "build"]


def _calibrate(build: Build) -> Build:
    scheme, work = build.options.scheme, build.work
    finished = work / GOLDENS
    if not finished.is_file():
        model = StreamedModel(build.checkpoint.spec, build.checkpoint.read)
        blocks = [block.name for block in model.blocks()]

        def tell(block: Block) -> None:
            build.detail(blocks.index(block.name), len(blocks), block.name)

        traces = calibrate(
            model,
            build.goldens,
            build.cases,
            scheme.schemes_for,
            work / "blocks",
            build.options.ranges,
            scheme.cache == "int8",
            tell,
        )
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
    lowering = find_lowering(build.options.target)
    plans, scheme = lowering.graphs, build.options.scheme
    build = replace(
        build, graphs={name: build.graphs[plan.base].clone() for name, plan in plans.items()}
    )
    capacity = build.options.context or build.checkpoint.spec.decoder.context
    build = _passes(build, lambda name: lowering.form(name, scheme, capacity))
    for name, plan in plans.items():
        if plan.opset:
            build.graphs[name].opset_imports[""] = plan.opset
    steps = {step.name for name in plans for step in lowering.form(name, scheme, capacity)}
    refused = [
        reason for _, step, result in build.counts for reason in result.refused if step in steps
    ]
    if refused:
        raise BuildError(
            f"target {build.options.target} cannot run this graph: {refused[0]}; report it with "
            f"--dump"
        )
    return build


def _apply_scheme(build: Build) -> Build:
    scheme, calibrated, lowering = (
        build.options.scheme,
        build.calibrated,
        find_lowering(build.options.target),
    )
    assert calibrated, "calibrated before"
    if scheme.prefill is not None:
        build = replace(build, graphs={**build.graphs, "prefill": build.graphs["decoder"].clone()})
    return _passes(build, lambda name: lowering.precision(name, scheme, calibrated))


def _pack(build: Build) -> Build:
    folder, checkpoint, plans = (
        build.folder,
        build.checkpoint,
        find_lowering(build.options.target).graphs,
    )
    for name, graph in build.graphs.items():
        file, source = graph_file(name), plans[name].weights_of if name in plans else ""
        if not (build.work / file).is_file():
            written = build.work / f"partial.{file}"
            if source:
                refer_to(graph, build.work / graph_file(source))
            tell = partial(_tell_tensor, build.detail, name)
            ir.save(
                graph, written, external_data=None if source else weights_file(name), callback=tell
            )
            written.rename(build.work / file)
    for name in build.graphs:
        for file in (graph_file(name), weights_file(name)):
            if (build.work / file).is_file():
                shutil.move(build.work / file, folder / file)
    dtype = np.float16 if build.options.scheme.embeddings == "fp16" else np.float32
    table = checkpoint.read("decoder.embed_tokens.weight").numpy()
    if np.abs(table).max() > np.finfo(dtype).max:
        raise BuildError(
            f"token embeddings exceed what {np.dtype(dtype)} holds; build with --precision fp32"
        )
    np.save(folder / EMBEDDINGS, table.astype(dtype))
    shutil.copyfile(checkpoint.path / TOKENIZER, folder / TOKENIZER)
    shutil.copyfile(build.work / GOLDENS, folder / GOLDENS)
    manifest.write(build)
    return replace(build, graphs={})


def _tell_tensor(detail: Detail, name: str, tensor: object, info: Any) -> None:
    detail(info.index, info.total, f"{name} weights")


def _verify(build: Build) -> Build:
    options = build.options
    stages, metrics = _compare(build)
    passed = all(stage.passed for stage in stages) and metrics.passed
    if not passed and not options.allow_unverified:
        raise ParityError(_failure(build, stages, metrics))
    build = replace(
        build, stages=tuple(stages), metrics=metrics, verdict=VERIFIED if passed else UNVERIFIED
    )
    return build


def _compare(build: Build) -> tuple[list[StageError], MetricCheck]:
    """Measures parity and answers of the packed bundle. Graphs too large to load beside
    PyTorch are replayed part by part, and their answers are not compared.
    """
    options, tolerance = build.options, dict(build.options.scheme.tolerance)
    if find_lowering(options.target).compare_on_cpu:
        bundle = read_bundle(build.folder)
        asked = measure_answers(
            reference_session(bundle),
            build.checkpoint,
            build.source,
            options.questions,
            options.scheme.drop,
        )
        return replay_forms(bundle, tolerance), asked
    weights = sum(file.stat().st_size for file in build.folder.glob("*.weights"))
    if weights > LARGE_BYTES:
        table = np.load(build.folder / EMBEDDINGS, mmap_mode="r")
        stages = replay_in_pieces(
            build.folder,
            build.checkpoint.spec,
            table,
            read_goldens(build.folder / GOLDENS),
            tolerance,
        )
        return stages, MetricCheck(
            skipped=f"{weights / 1e9:.1f} GB of weights are compared part by part; run "
            f"infmllm-eval where they fit"
        )
    session = load(build.folder, engine_cache=False)
    return session.replay(tolerance=tolerance), measure_answers(
        session, build.checkpoint, build.source, options.questions, options.scheme.drop
    )


def _failure(build: Build, stages: Sequence[StageError], metrics: MetricCheck) -> str:
    """Describes what drifted, where the drift begins, and what to try."""
    failed = [stage for stage in stages if not stage.passed]
    if not failed:
        tasks = ", ".join(
            f"{task} {found:.1f} of {torch:.1f} %"
            for task, (torch, found) in metrics.scores.items()
        )
        worse = (
            f"answers got worse by {metrics.drop:.1f} points on {metrics.count} questions, "
            f"{metrics.allowed:.1f} are allowed ({tasks})"
        )
        return f"{worse}; nothing was written. {_REMEDY}"
    worst = max(failed, key=lambda stage: stage.error / stage.tolerance)
    differs = (
        f"{worst.stage} differs from PyTorch by {worst.error:.3g} (relative RMS), the "
        f"scheme allows {worst.tolerance:.3g}; nothing was written. "
    )
    return f"{differs}{_location(build, worst.stage)}. {_REMEDY}"


def _location(build: Build, stage: str) -> str:
    """Describes where the worst golden case departs from PyTorch. Errors of the search
    become part of the text, because the user must still get the verdict.
    """
    tolerance = dict(build.options.scheme.tolerance)
    if sum(file.stat().st_size for file in build.folder.glob("*.weights")) > LARGE_BYTES:
        return "The graphs are too large to search for the place"
    if find_lowering(build.options.target).compare_on_cpu:
        return "Build with --target cpu to learn the place if it drifts there too"
    try:
        session, goldens = (
            load(build.folder, engine_cache=False),
            read_goldens(build.folder / GOLDENS),
        )
        errors = [
            next(row.error for row in session.replay([golden], tolerance) if row.stage == stage)
            for golden in goldens
        ]
        drift = find_drift(
            build.folder, build.checkpoint, build.goldens[int(np.argmax(errors))], tolerance
        )
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        return f"The place was not found ({' '.join(str(error).split())[:120]})"
    return (
        str(drift)
        if drift
        else "The image and the prompt alone are within bounds: it is the steps after them that "
        "drift"
    )


_REMEDY = (
    "Try --calib with images of the kind the model was trained on, --keep for that block, or a "
    "higher --precision; "
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


def build(
    options: BuildOptions,
    progress: Callable[[str], None] = lambda step: None,
    detail: Detail = lambda done, total, text: None,
) -> Build:
    """Builds a bundle at `options.out`, or reuses an identical one already there. On
    any error the previous bundle is untouched.

    Calls `progress` with the name of each step, and `detail` with the state of a long
    step. Raises `UsageError`, `DataError`, `CheckpointError`, or `BuildError` with its
    subclass `ParityError`.
    """
    state = replace(open_build(options), detail=detail)
    if found := manifest.existing(state):
        return found
    with staged_folder(options.out, MANIFEST) as folder, workspace(state.key) as work:
        state = replace(state, folder=folder, work=work)
        for name, step in STEPS:
            progress(name)
            started = time.monotonic()
            state = step(state)
            cost = {
                "seconds": round(time.monotonic() - started, 1),
                "peak_mib": round(peak_memory_mib()),
            }
            state = replace(state, costs={**state.costs, name: cost})
        manifest.write(state)
    return state


def _dump_graph(build: Build, name: str, model: ir.Model, step: str) -> None:
    if build.options.dump:
        build.options.dump.mkdir(parents=True, exist_ok=True)
        ir.save(
            model,
            build.options.dump / f"{name}.{step}.onnx",
            external_data=f"{name}.{step}.weights",
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences logs, warnings and prints of the PyTorch exporter, which do not help
    users.
    """
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
