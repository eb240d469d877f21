"""`python -m tests.gpu`: the whole command where there is no GPU, its whole flow on
engines whose GPU is stood in for, and its judgement.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from runtime.contract.pooling import pool_matrix
from runtime.doctor.facts import Facts
from tests.conftest import TINY
from tests.gpu.__main__ import check
from tests.gpu.pytorch import PyTorchEngine, load_model
from tests.gpu.record import ABSENT, FAILED, MEASURED, PASSED, Report, read_report
from tests.gpu.settings import COMPILED, EAGER, FLOAT, OURS, PYTORCH, Settings
from tests.gpu.sides import Local
from tests.gpu.verdict import NO_GPU, equal_answers, verdict
from tests.runtime.conftest import Install
from tests.runtime.gpu_report_engines import (  # noqa: F401
    BUNDLES,
    FEW,
    HostCuda,
    HostRtx,
    WrongChoice,
    facts,
    settings,
    use,
)

ROOT = Path(__file__).parents[2]


class WrongPrefill(HostCuda):
    """Computes prompts of another scale, tokens rightly."""

    def forward(self, inputs_embeds: np.ndarray, start: int) -> np.ndarray:
        found = super().forward(inputs_embeds, start)
        return found * 1.2 if inputs_embeds.shape[1] > 1 else found


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiling takes a minute, and here has no GPU to capture graphs of; a test of its
    own traces what is compiled. One thread suffices.
    """
    monkeypatch.setattr(torch, "compile", lambda call, **options: call)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_without_a_gpu_everything_is_absent_with_its_reason(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        "tests.gpu",
        "--out",
        str(tmp_path / "out"),
        "--checkpoint",
        str(tiny_checkpoint),
        "--quick",
        "--json",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "INFMLLM_CACHE": str(tmp_path / "cache"),
    }
    result = subprocess.run(
        [*command, "--schemes", "fp16", "int8"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    data = json.loads(result.stdout)
    assert (
        data == json.loads((tmp_path / "out" / "report.json").read_text())
        and data["format"] == "infmllm-gpu-check"
        and data["version"] == 1
    )
    assert data["verdict"] == NO_GPU and data["exit_code"] == 0
    assert all(row["outcome"] == ABSENT and len(row["reason"]) > 20 for row in data["rows"])
    places = {(row["part"], row["target"], row["scheme"]) for row in data["rows"]}
    assert {
        ("parity", target, scheme)
        for target in ("cuda", "tensorrt", "rtx")
        for scheme in ("fp16", "int8")
    } <= places
    assert {
        ("parity", PYTORCH, "fp32"),
        ("rounds", PYTORCH, "fp16"),
        ("bandwidth", "", ""),
    } <= places
    assert {goal["outcome"] for goal in data["goals"]} == {"not measured"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert (
        NO_GPU in page
        and "is not installed" in page
        and "http" not in page
        and "<script" not in page
    )
    assert "parity tiny tensorrt fp16" in result.stderr


def test_every_engine_is_proved_timed_and_compared(
    settings: Settings, facts: Facts, gpu: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu()
    use(monkeypatch, "cuda", HostCuda)
    use(monkeypatch, "rtx", HostRtx)
    check(replace(settings, device="cpu"), facts, Local, "as typed")
    check(replace(settings, targets=("rtx",)), facts, Local)
    report = check(replace(settings, targets=("tensorrt",), schemes=("int8", "fp16")), facts, Local)
    text, code = verdict(report)
    assert code == 0 and text.startswith(
        "PASSED: 4 engines and schemes agree with PyTorch on NVIDIA GeForce RTX 4090"
    ), text
    for target, scheme in BUNDLES:
        check_engine(report, target, scheme)
    exact, half = (report.find("parity", "tiny", PYTORCH, scheme) for scheme in ("fp32", "fp16"))
    assert (
        exact
        and half
        and max(s["error"] for s in exact.values["stages"])
        < 1e-5
        < min(s["error"] for s in half.values["stages"][:3])
        < 5e-3
    )
    assert report.find("bandwidth").values["gbs"] > 0.1
    assert read_report(settings.out / "report.json") == report
    page = (settings.out / "report.html").read_text()
    assert (
        text in page
        and "as typed" in page
        and f"{COMPILED} absent" in page
        and "Nothing was absent" in page
    )


def check_engine(report: Report, target: str, scheme: str) -> None:
    parity, latency, rounds = (
        report.find(part, "tiny", target, scheme) for part in ("parity", "latency", "rounds")
    )
    assert parity and parity.outcome == PASSED, parity
    assert [stage["stage"] for stage in parity.values["stages"]] == [
        "vision",
        "prefill",
        "decode",
        "choice",
    ]
    assert (
        all(0 < stage["error"] <= stage["tolerance"] for stage in parity.values["stages"][:3])
        and parity.values["stages"][3]["error"] == 0
    )
    equal = equal_answers(report, parity)
    assert (
        equal and equal[1] == 6 and (equal[0] >= 5 or scheme == "int8")
    )  # random weights have near ties
    assert latency and latency.outcome == MEASURED and latency.values["metrics"]["tokens_per_s"] > 0
    assert rounds and rounds.outcome == MEASURED
    peers = {EAGER, COMPILED}
    assert set(rounds.values["absent"]) == (set() if target == "cuda" else peers), (
        "only the first run had PyTorch"
    )
    assert set(rounds.values["contenders"]) == {OURS} | (peers if target == "cuda" else set()) | (
        {FLOAT} if scheme == "int8" else set()
    )
    for times in rounds.values["contenders"].values():
        assert set(times) == {"vision", "prefill", "step"} and all(
            len(values) == FEW.rounds and min(values) > 0 for values in times.values()
        )


@pytest.mark.parametrize(("engine", "stage"), [(WrongPrefill, "prefill"), (WrongChoice, "choice")])
def test_a_wrong_engine_turns_the_verdict(
    settings: Settings, facts: Facts, engine: type, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, "cuda", engine)
    report = check(settings, facts, Local)
    row = report.find("parity", "tiny", "cuda", "fp16")
    assert (
        row
        and row.outcome == FAILED
        and [s["stage"] for s in row.values["stages"] if not s["passed"]] == [stage]
    )
    text, code = verdict(report)
    assert (
        code == 1
        and text.startswith("FAILED: 1 of 1 checks")
        and f"tiny cuda fp16 ({stage}" in text
    )
    assert report.find("latency", "tiny", "cuda", "fp16") is None, "what is wrong is not timed"
    assert json.loads((settings.out / "report.json").read_text())["exit_code"] == 1
    assert 'class="verdict bad"' in (settings.out / "report.html").read_text()


def test_what_is_compiled_can_be_traced_and_computes_the_same(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    real = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda call, **options: real(call, backend="eager", fullgraph=True)
    )
    model = load_model(tiny_checkpoint, torch.float16, "cpu")
    eager, compiled = (PyTorchEngine(model, 40, variant) for variant in (EAGER, COMPILED))
    inputs = np.random.default_rng(0).normal(size=(1, 9, TINY.decoder.hidden)).astype(np.float32)
    assert np.array_equal(eager.forward(inputs, 0), compiled.forward(inputs, 0))
    whole = eager.forward(inputs, 0)
    eager.forward(inputs[:, :8], 0)
    assert np.allclose(eager.forward(inputs[:, 8:], 8), whole, atol=1e-2 * np.abs(whole).max()), (
        "a token behind a prompt sees it"
    )
    assert len(compiled.greedy_steps(5, 9, 4)) == 4
    pixels, pool = np.ones((1, 3, 32, 32), np.float32), pool_matrix(4, 2)
    assert np.array_equal(eager.embed_image(pixels, pool), compiled.embed_image(pixels, pool))
