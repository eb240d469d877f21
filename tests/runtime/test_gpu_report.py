"""`python -m tests.gpu`: the whole command where there is no GPU, its whole flow on
engines whose GPU is stood in for, and its judgement.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from runtime.contract.bundle import Bundle
from runtime.contract.errors import EngineError, UsageError
from runtime.contract.pooling import pool_matrix
from runtime.doctor.facts import Facts
from runtime.doctor.probes import Probe
from runtime.engines import TARGETS, EngineOptions
from runtime.engines.onnxruntime.cuda import OrtCudaEngine
from runtime.engines.onnxruntime.io_binding import HOST
from runtime.engines.onnxruntime.tensorrt_rtx import OrtRtxEngine
from tests.conftest import TINY
from tests.gpu import timing
from tests.gpu.__main__ import check
from tests.gpu.pytorch import PyTorchEngine, load_model
from tests.gpu.record import ABSENT, FAILED, MEASURED, PASSED, Report, read_report
from tests.gpu.settings import COMPILED, EAGER, FLOAT, OURS, PYTORCH, Effort, Settings
from tests.gpu.sides import Absent, Broken, Local, Process
from tests.gpu.verdict import NO_GPU, equal_answers, verdict
from tests.runtime.conftest import Install
from tests.runtime.doctor_machines import CPU_ORT, GPU_ORT, driver, machine, tensorrt

ROOT = Path(__file__).parents[2]
BUNDLES = (("cuda", "fp16"), ("tensorrt", "fp16"), ("tensorrt", "int8"), ("rtx", "fp16"))
FEW = Effort(rounds=2, steps=3, repetitions=2, new_tokens=6, samples=4, questions=0)


class HostCuda(OrtCudaEngine):
    """The engine of the CUDA provider, on the CPU's memory."""

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        super().__init__(bundle, options, HOST)


class HostRtx(OrtRtxEngine):
    """The engine of the TensorRT-RTX plugin, on the CPU's memory."""

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        super().__init__(bundle, options, HOST)


class WrongPrefill(HostCuda):
    """Computes prompts of another scale, tokens rightly."""

    def forward(self, inputs_embeds: np.ndarray, start: int) -> np.ndarray:
        found = super().forward(inputs_embeds, start)
        return found * 1.2 if inputs_embeds.shape[1] > 1 else found


class WrongChoice(HostCuda):
    """Right logits, but the token taken on the device is another."""

    def greedy(self, inputs_embeds: np.ndarray, start: int) -> int:
        return (super().greedy(inputs_embeds, start) + 1) % 900


class Loadless(HostCuda):
    """Cannot be loaded."""

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        raise EngineError("no kernel image is available")


class Crashing(HostCuda):
    """Dies of what is none of our errors."""

    def embed_image(self, pixels: np.ndarray, pool: np.ndarray) -> np.ndarray:
        raise RuntimeError("an illegal memory access was encountered")


def use(monkeypatch: pytest.MonkeyPatch, target: str, engine: type) -> None:
    monkeypatch.setitem(
        TARGETS,
        target,
        replace(TARGETS[target], engine=f"{engine.__module__}:{engine.__qualname__}"),
    )


@pytest.fixture
def facts(tmp_path: Path) -> Facts:
    """A machine with a GPU for which every target is installed."""
    packages = {"onnxruntime-gpu": "1.27.0", "tensorrt-cu13": "10.3.0", "cuda-bindings": "13.0.0"}
    answers = {
        "driver": driver("NVIDIA GeForce RTX 4090", (8, 9), "13.0"),
        "tensorrt": tensorrt("10.3.0"),
    }
    answers["cuda_provider"] = Probe(True, {"runs": True})
    found = machine(tmp_path / "root", {**answers, "onnxruntime": GPU_ORT}, packages)
    return replace(found, access=replace(found.access, driver="580.1"))


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


@pytest.fixture
def settings(
    tmp_path: Path,
    tiny_checkpoint: Path,
    built_for: Callable[[str, str], Path],
    built_tensorrt: Callable[[str], Path],
) -> Settings:
    """A run on bundles built before, which lie in its folder as if brought from another
    machine; PyTorch finds no GPU.
    """
    for target, scheme in BUNDLES:
        built = built_tensorrt(scheme) if target == "tensorrt" else built_for(target, scheme)
        shutil.copytree(built, tmp_path / "out" / "bundles" / f"tiny-{target}-{scheme}")
    return Settings(
        tmp_path / "out", (), tiny_checkpoint, ("cuda",), ("fp16",), FEW, keeps_bundles=True
    )


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
    use(monkeypatch, "cuda", HostCuda), use(monkeypatch, "rtx", HostRtx)
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
    assert report.find("bandwidth").values["gbs"] > 0.1  # type: ignore[union-attr]
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


def test_a_wrong_kernel_that_the_engine_itself_refuses_is_a_failure(
    settings: Settings, facts: Facts, gpu: Install
) -> None:
    simulation = gpu(fuses=False)
    simulation.plant = spoil
    report = check(replace(settings, targets=("tensorrt",)), facts, Local)
    row = report.find("parity", "tiny", "tensorrt", "fp16")
    assert row and row.outcome == FAILED and row.reason and verdict(report)[1] == 1, row


def spoil(model: onnx.ModelProto) -> None:
    """Halves the first weights there are."""
    tensor = next(
        t
        for t in model.graph.initializer
        if len(t.dims) == 2 and t.data_type == onnx.TensorProto.FLOAT16
    )
    values = onnx.numpy_helper.to_array(tensor) / 2
    tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), tensor.name))


def test_an_engine_that_does_not_load_is_absent_only_where_the_doctor_knows_why(
    settings: Settings, facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, "cuda", Loadless)
    failed = check(settings, facts, Local).find("parity", "tiny", "cuda", "fp16")
    assert (
        failed
        and failed.outcome == FAILED
        and "no kernel image" in failed.reason
        and "doctor sees nothing" in failed.reason
    )
    ailing = machine(
        tmp_path / "other",
        {"driver": driver("NVIDIA GeForce RTX 4090", (8, 9), "13.0"), "onnxruntime": CPU_ORT},
    )
    shutil.move(settings.out / "bundles", tmp_path / "second" / "bundles")
    report = check(replace(settings, out=tmp_path / "second"), ailing, Local)
    row = report.find("parity", "tiny", "cuda", "fp16")
    assert row and row.outcome == ABSENT and row.reason == "no kernel image is available"
    assert verdict(report)[1] == 0 and verdict(report)[0].startswith("NOTHING PROVED")
    alone = report.find("rounds", "tiny", PYTORCH, "fp16")
    assert alone and alone.outcome == ABSENT and "finds no CUDA GPU" in alone.reason


def test_a_crash_ends_its_step_and_no_other(
    settings: Settings, facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, "cuda", Crashing), use(monkeypatch, "rtx", HostRtx)
    report = check(replace(settings, targets=("cuda", "rtx")), facts, Local)
    crashed, sound = (report.find("parity", "tiny", target, "fp16") for target in ("cuda", "rtx"))
    assert (
        crashed
        and crashed.outcome == FAILED
        and crashed.reason == "RuntimeError: an illegal memory access was encountered"
    )
    assert sound and sound.outcome == PASSED and verdict(report)[1] == 1


def test_an_engine_gone_wrong_loses_its_times(
    settings: Settings, facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, "cuda", HostCuda)
    assert check(settings, facts, Local).find("rounds", "tiny", "cuda", "fp16") is not None
    use(monkeypatch, "cuda", WrongChoice)
    report = check(settings, facts, Local)
    assert verdict(report)[1] == 1 and not [
        row for row in report.rows if row.target == "cuda" and row.part != "parity"
    ]


def test_a_crash_while_timed_is_a_failure(
    settings: Settings, facts: Facts, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, "cuda", HostCuda)

    def crash(*given: object) -> dict[str, float]:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(timing, "once", crash)
    report = check(settings, facts, Local)
    row = report.find("rounds", "tiny", "cuda", "fp16")
    assert (
        row
        and row.outcome == FAILED
        and "illegal memory access" in row.reason
        and verdict(report)[1] == 1
    )


def test_runs_into_one_folder_merge(
    settings: Settings, facts: Facts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, "cuda", HostCuda), use(monkeypatch, "rtx", HostRtx)
    first = check(settings, facts, Local)
    second = check(replace(settings, targets=("rtx",)), facts, Local)
    assert len(second.runs) == 2 and second.find("latency", "tiny", "cuda", "fp16") == first.find(
        "latency", "tiny", "cuda", "fp16"
    )
    assert second.find("parity", "tiny", "rtx", "fp16").outcome == PASSED
    over = check(replace(settings, seconds=0.0), facts, Local)
    assert over.rows == second.rows, "a run without time loses nothing"
    again = check(replace(settings, targets=("cuda", "rtx"), resume=True), facts, Local)
    known = [row for row in second.rows if row.outcome != ABSENT]
    assert known and [row for row in again.rows if row.outcome != ABSENT] == known, (
        "what is known is not measured again"
    )
    other = replace(facts, probes={**facts.probes, "driver": driver("NVIDIA L4", (8, 9), "13.0")})
    with pytest.raises(
        UsageError,
        match=r"was measured with NVIDIA GeForce RTX 4090, this machine has NVIDIA L4; choose "
        r"another --out",
    ):
        check(settings, other, Local)


def test_a_process_that_dies_or_hangs_is_a_row_not_a_crash(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    side = Process("Ours", log)
    with pytest.raises(Absent, match="no bundle at") as refused:
        side.ask("prove", 100, bundle=str(tmp_path), target="cuda")
    assert refused.value.kind == "BundleError"
    with pytest.raises(Absent, match="took longer than 0 s and was ended"):
        side.ask("copy", 0.0)
    side.end()
    dying = Process("Ours", log)
    dying._process.kill()
    for _ in range(2):
        with pytest.raises(Broken, match="its process ended with -9"):
            dying.ask("copy", 100)
    dying.end()
