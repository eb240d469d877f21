"""Builds are cached by content and resumed where they stopped; parts of a graph compute
what the whole does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image

from calibration import samples
from calibration.blocks import StreamedModel
from export import cache, pipeline
from export.cache import workspace
from export.parity.drift import first_drift
from export.parity.subgraphs import replay_in_pieces
from export.passes.contract import GraphPass, PassResult
from export.pipeline import STEPS, BuildOptions, build
from export.schemes import SCHEMES, choose_scheme
from export.state import open_build
from runtime.contract.bundle import EMBEDDINGS, GOLDENS, cache_folder, read_bundle
from runtime.contract.goldens import read_goldens
from runtime.session import load


def options(checkpoint: Path, out: Path, scheme: str = "int4") -> BuildOptions:
    return BuildOptions(checkpoint, SCHEMES[scheme], "cpu", out, questions=0, samples=8)


def weights(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name != "manifest.json"
    }


def test_an_identical_build_returns_at_once_and_a_changed_one_does_not(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    steps: list[str] = []
    first = build(options(tiny_checkpoint, tmp_path / "b"), steps.append)
    count = len(steps)
    again = build(options(tiny_checkpoint, tmp_path / "b"), steps.append)
    assert again.reused and not first.reused and len(steps) == count == len(STEPS)
    assert (
        again.stages == first.stages
        and again.metrics == first.metrics
        and again.verdict == "VERIFIED"
    )
    changed = build(replace(options(tiny_checkpoint, tmp_path / "b"), samples=9), steps.append)
    assert not changed.reused and changed.key != first.key
    data = bytearray((tmp_path / "b" / "decoder.weights").read_bytes())
    data[100] ^= 1
    (tmp_path / "b" / "decoder.weights").write_bytes(data)  # damaged: is built again
    assert not build(replace(options(tiny_checkpoint, tmp_path / "b"), samples=9)).reused


def test_every_decision_is_in_the_key(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = options(tiny_checkpoint, tmp_path / "b")
    others: list[dict[str, Any]] = [
        {"scheme": SCHEMES["int8"]},
        {"samples": 9},
        {"ranges": "entropy"},
        {"questions": 3},
        {"calib": "synthetic:40"},
        {"notes": {"a": 1}},
    ]
    others += [
        {"scheme": choose_scheme("int4", cache="int8")},
        {"scheme": choose_scheme("int4", 16)},
    ]
    keys = [open_build(replace(base, **changed)).key for changed in ({}, *others)]
    assert (
        len(set(keys)) == len(keys) and open_build(replace(base, out=tmp_path / "c")).key == keys[0]
    )
    monkeypatch.setattr(cache, "source_digest", lambda: "other sources")
    assert open_build(base).key != keys[0]


def test_labels_of_the_questions_are_in_the_key(tiny_checkpoint: Path, tmp_path: Path) -> None:
    Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / "a.png")
    keys = set()
    for answer in ("red", "blue"):
        rows = [
            {"image": "a.png", "task": "caption", "answer": answer if index == 11 else "x"}
            for index in range(12)
        ]
        (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
        samples._open.cache_clear()
        keys.add(
            open_build(
                replace(
                    options(tiny_checkpoint, tmp_path / "b", "fp32"),
                    calib=str(tmp_path / "d.jsonl"),
                    questions=12,
                )
            ).key
        )
    assert len(keys) == 2


@pytest.mark.parametrize("stopped", ["capture graphs", "pack bundle", "verify against PyTorch"])
def test_a_stopped_build_resumes_behind_the_last_finished_step(
    stopped: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(replace(options(tiny_checkpoint, tmp_path / "whole"), samples=10))

    def stop(state: pipeline.Build) -> pipeline.Build:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(
            pipeline, "STEPS", [(name, stop if name == stopped else step) for name, step in STEPS]
        )
        with pytest.raises(KeyboardInterrupt):
            build(replace(options(tiny_checkpoint, tmp_path / "b"), samples=10))
    assert not (tmp_path / "b").exists()
    # PyTorch ran to the end before the stop.
    monkeypatch.setattr(StreamedModel, "run_blockwise", None)
    resumed = build(replace(options(tiny_checkpoint, tmp_path / "b"), samples=10))
    assert resumed.key == whole.key and weights(tmp_path / "b") == weights(tmp_path / "whole")
    assert not [
        path for path in (cache_folder() / "builds").iterdir() if path.name == resumed.key[:32]
    ]


@pytest.mark.slow
def test_a_killed_process_leaves_nothing_that_hinders_the_next(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-c",
        "from export.cli import main; main()",
        "build",
        str(tiny_checkpoint),
        "--questions",
        "0",
    ]
    command += ["--precision", "int8", "-o", str(tmp_path / "b")]
    process = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": "."}
    )
    while not (tmp_path / ".b.staging").exists() and process.poll() is None:
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "b").exists()
    subprocess.run(
        command, check=True, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": "."}
    )
    assert read_bundle(tmp_path / "b").verdict == "VERIFIED" and [
        path.name for path in tmp_path.iterdir()
    ] == ["b"]


def test_two_builders_of_one_key_do_not_share_a_folder() -> None:
    with workspace("a" * 64) as first, workspace("a" * 64) as second:
        assert first != second and second.is_dir()
    assert not first.exists() and not second.exists()


@pytest.mark.parametrize("scheme", ["int4-hybrid", "int8"])
def test_parts_compute_what_the_whole_does(
    scheme: str, tiny_checkpoint: Path, built: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = built(scheme)
    if scheme == "int8":
        folder = tmp_path / "b"
        build(
            BuildOptions(
                tiny_checkpoint, choose_scheme("int8", cache="int8"), "cpu", folder, questions=0
            )
        )
    session, goldens, bounds = (
        load(folder),
        read_goldens(folder / GOLDENS),
        {"vision": 1.0, "prefill": 1.0, "decode": 1.0},
    )
    table = np.load(folder / EMBEDDINGS)
    for most in (1, 1 << 30):  # every layer by itself, and all in one
        found = replay_in_pieces(folder, session.spec, table, goldens, bounds, most)
        for part, whole in zip(found, session.replay(goldens, bounds), strict=True):
            assert (
                part.error == pytest.approx(whole.error, rel=1e-3)
                and part.agreement == whole.agreement
            )
    assert not list(folder.glob("*.part"))


def test_bisection_finds_the_first_cut_beyond_the_bound() -> None:
    for broken in range(9):
        asked: list[int] = []

        def error(index: int, broken: int = broken, asked: list[int] = asked) -> float:
            asked.append(index)
            return 0.5 if index >= broken else 0.01

        assert first_drift([str(i) for i in range(9)], error, 0.1) == (
            broken,
            0.5,
            0.0 if broken == 0 else 0.01,
        )
        assert len(asked) <= 5


def test_a_pass_that_breaks_its_promise_is_caught() -> None:
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Relu", [x])
    model = ir.Model(
        ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 23}), ir_version=10
    )
    claims = {"ensures": frozenset({"::Abs"}), "removes": frozenset({"::Relu"})}
    for promise, operators in claims.items():
        with pytest.raises(AssertionError, match="pass broken"):
            GraphPass("broken", lambda model: PassResult(1), **{promise: operators})(model)
    assert GraphPass("needs", lambda model: PassResult(1), requires=frozenset({"::Abs"}))(
        model
    ).refused
