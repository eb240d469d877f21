"""The exporter as one list: load, capture, simplify, lower, apply the scheme, pack, verify. Each step takes a build and returns it further along.

Everything is written to a staging folder; the bundle appears under its name only after the parity gate has passed.
"""

from __future__ import annotations

import contextlib
import io
import logging
import platform
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from export.capture import Graphs, capture
from export.passes import LOWERING, SIMPLIFY, GraphPass, PassResult, run_passes
from export.passes.weights import apply_scheme
from export.schemes import Scheme
from export.verify import gate, make_goldens, verdict_json
from runtime.contract.bundle import DECODER, EMBEDDINGS, GOLDENS, MANIFEST, TOKENIZER, UNVERIFIED, VERIFIED, VISION, write_manifest
from runtime.contract.errors import BuildError, UsageError
from runtime.contract.evaluation import open_examples
from runtime.contract.files import staged_folder
from runtime.contract.sample import Example
from runtime.selftest import StageError, replay, write_goldens
from runtime.session import load
from trainer.card import data_card
from trainer.checkpoint import Checkpoint, load_checkpoint

__all__ = ["STEPS", "Build", "BuildOptions", "build"]

_TOOLS = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxsim", "onnxruntime", "numpy")


@dataclass(frozen=True)
class BuildOptions:
    """What to build and where. `dump` receives each graph after every step; `allow_unverified` keeps a bundle that fails parity, marked.

    `calib` names data the golden cases are drawn from (empty: synthetic scenes).
    """

    checkpoint: Path
    scheme: Scheme
    target: str
    out: Path
    dump: Path | None = None
    allow_unverified: bool = False
    calib: str = ""


@dataclass(frozen=True)
class Build:
    """The value the steps pass on. `counts` lists (graph, pass, result) in order."""

    options: BuildOptions
    folder: Path
    examples: Sequence[Example] = ()
    checkpoint: Checkpoint | None = None
    graphs: Graphs | None = None
    counts: tuple[tuple[str, str, PassResult], ...] = ()
    stages: tuple[StageError, ...] = ()
    verdict: str = UNVERIFIED


def _load(build: Build) -> Build:
    examples = open_examples(build.options.calib, skip_bad=True) if build.options.calib else ()
    return replace(build, checkpoint=load_checkpoint(build.options.checkpoint), examples=tuple(examples))


def _capture(build: Build) -> Build:
    assert build.checkpoint, "loaded before"
    with _quiet():
        return _dumped(replace(build, graphs=capture(build.checkpoint.model)), "capture")


def _passes(build: Build, choose: Callable[[str], tuple[GraphPass, ...]]) -> Build:
    assert build.graphs, "captured before"
    counts = list(build.counts)
    for name, model in vars(build.graphs).items():
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
    return _passes(build, lambda name: (apply_scheme(build.options.scheme),))


def _pack(build: Build) -> Build:
    assert build.graphs and build.checkpoint, "captured before"
    folder, model = build.folder, build.checkpoint.model
    for name, graph in ((VISION, build.graphs.vision), (DECODER, build.graphs.decoder)):
        ir.save(graph, folder / name, external_data=name.replace(".onnx", ".weights"))
    dtype = np.float16 if build.options.scheme.embeddings == "fp16" else np.float32
    table = model.decoder.embed_tokens.weight.detach().numpy()
    if np.abs(table).max() > np.finfo(dtype).max:
        raise BuildError(f"token embeddings exceed what {np.dtype(dtype)} holds; build with --precision fp32")
    np.save(folder / EMBEDDINGS, table.astype(dtype))
    shutil.copyfile(build.checkpoint.path / TOKENIZER, folder / TOKENIZER)
    write_goldens(folder / GOLDENS, make_goldens(model, build.checkpoint.tokenizer, examples=build.examples))
    _write_manifest(build)
    return build


def _verify(build: Build) -> Build:
    tolerance = dict(build.options.scheme.tolerance)
    session = load(build.folder)
    if build.options.allow_unverified:
        stages = replay(session, tolerance)
        verdict = VERIFIED if all(stage.passed for stage in stages) else UNVERIFIED
    else:
        stages, verdict = gate(session, tolerance), VERIFIED
    build = replace(build, stages=tuple(stages), verdict=verdict)
    (build.folder / MANIFEST).unlink()
    _write_manifest(build)
    return build


STEPS: tuple[tuple[str, Callable[[Build], Build]], ...] = (
    ("load checkpoint", _load),
    ("capture graphs", _capture),
    ("simplify", _simplify),
    ("lower to target", _lower),
    ("apply precision", _apply_scheme),
    ("pack bundle", _pack),
    ("verify against PyTorch", _verify),
)


def build(options: BuildOptions, progress: Callable[[str], None] = lambda step: None) -> Build:
    """Builds a bundle at `options.out`. Raises `BuildError`s and `CheckpointError`s; on any error the previous bundle is untouched."""
    if options.target not in LOWERING:
        raise UsageError(f"unknown target {options.target!r}; choose one of: {', '.join(LOWERING)}")
    with staged_folder(options.out, MANIFEST) as folder:
        state = Build(options, folder)
        for name, step in STEPS:
            progress(name)
            state = step(state)
    return state


def _write_manifest(build: Build) -> None:
    assert build.checkpoint, "loaded before"
    scheme, tolerance = build.options.scheme, dict(build.options.scheme.tolerance)
    tools = {name: version(name) for name in _TOOLS} | {"python": platform.python_version()}
    passes = [{"graph": g, "pass": p, "modified": r.modified, "refused": list(r.refused)} for g, p, r in build.counts]
    provenance: dict[str, Any] = {"checkpoint": build.checkpoint.path.name, "checkpoint_sha256": build.checkpoint.sha256, "calibration_sha256": None}
    provenance["goldens_from"] = data_card([build.options.calib or "synthetic"])[0]
    write_manifest(
        build.folder,
        build.checkpoint.model.spec,
        build.options.target,
        {"vision": scheme.name, "decoder": scheme.name, "embeddings": scheme.embeddings},
        provenance | {"tools": tools, "passes": passes},
        verdict_json(build.verdict, build.stages, tolerance),
    )


def _dumped(build: Build, step: str) -> Build:
    if build.graphs:
        for name, model in vars(build.graphs).items():
            _dump_graph(build, name, model, f"00-{step}")
    return build


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
