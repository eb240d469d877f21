"""The steps of a build, in the order of `export.pipeline.STEPS`. Each takes a `Build` and
returns it with its results added.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
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
from export.capture import capture
from export.gate import compare, describe_failure
from export.parity.references import goldens_of
from export.passes import SIMPLIFY, run_passes
from export.passes.contract import GraphPass
from export.shared_weights import refer_to
from export.state import Build, Detail
from export.targets import find_lowering
from runtime.contract.bundle import (
    EMBEDDINGS,
    GOLDENS,
    TOKENIZER,
    UNVERIFIED,
    VERIFIED,
    graph_file,
    weights_file,
)
from runtime.contract.errors import BuildError, ParityError
from runtime.contract.goldens import write_goldens

__all__ = [
    "apply_scheme",
    "capture_graphs",
    "lower",
    "pack",
    "run_and_calibrate",
    "simplify",
    "verify",
]


def run_and_calibrate(build: Build) -> Build:
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


def capture_graphs(build: Build) -> Build:
    assert build.calibrated, "calibrated before"
    with _quiet():
        graphs = capture(build.checkpoint.spec, build.calibrated.read)
    build = replace(build, graphs={"vision": graphs.vision, "decoder": graphs.decoder})
    for name, model in build.graphs.items():
        _dump_graph(build, name, model, "00-capture")
    return build


def _apply_passes(build: Build, choose: Callable[[str], Sequence[GraphPass]]) -> Build:
    counts = list(build.counts)
    for name, model in build.graphs.items():
        for step in choose(name):
            (result,) = run_passes(model, [step])
            counts.append((name, *result))
            _dump_graph(build, name, model, f"{len(counts):02d}-{step.name}")
    return replace(build, counts=tuple(counts))


def simplify(build: Build) -> Build:
    with _quiet():
        return _apply_passes(build, lambda name: SIMPLIFY)


def lower(build: Build) -> Build:
    lowering = find_lowering(build.options.target)
    plans, scheme = lowering.graphs, build.options.scheme
    build = replace(
        build, graphs={name: build.graphs[plan.base].clone() for name, plan in plans.items()}
    )
    capacity = build.options.context or build.checkpoint.spec.decoder.context
    build = _apply_passes(build, lambda name: lowering.form(name, scheme, capacity))
    for name, plan in plans.items():
        if plan.opset:
            build.graphs[name].opset_imports[""] = plan.opset
    steps = {step.name for name in plans for step in lowering.form(name, scheme, capacity)}
    refused = [
        reason for _, step, result in build.counts for reason in result.refused if step in steps
    ]
    if refused:
        raise BuildError(
            f"target {build.options.target} cannot run this graph: {refused[0]}; report this, with "
            f"the graphs that --dump FOLDER writes"
        )
    return build


def apply_scheme(build: Build) -> Build:
    scheme, calibrated, lowering = (
        build.options.scheme,
        build.calibrated,
        find_lowering(build.options.target),
    )
    assert calibrated, "calibrated before"
    if scheme.prefill is not None:
        build = replace(build, graphs={**build.graphs, "prefill": build.graphs["decoder"].clone()})
    return _apply_passes(build, lambda name: lowering.precision(name, scheme, calibrated))


def pack(build: Build) -> Build:
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
            f"token embeddings exceed the range of {np.dtype(dtype)}; build with --precision fp32"
        )
    np.save(folder / EMBEDDINGS, table.astype(dtype))
    shutil.copyfile(checkpoint.path / TOKENIZER, folder / TOKENIZER)
    shutil.copyfile(build.work / GOLDENS, folder / GOLDENS)
    manifest.write(build)
    return replace(build, graphs={})


def _tell_tensor(detail: Detail, name: str, tensor: object, info: Any) -> None:
    detail(info.index, info.total, f"{name} weights")


def verify(build: Build) -> Build:
    options = build.options
    found = compare(build)
    if not found.passed and not options.allow_unverified:
        raise ParityError(describe_failure(build, found))
    return replace(
        build,
        findings=tuple(found.findings),
        stages=tuple(found.stages),
        metrics=found.metrics,
        verdict=VERIFIED if found.passed else UNVERIFIED,
    )


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
