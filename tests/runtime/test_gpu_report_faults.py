"""GPU checks when an engine is wrong, crashes, hangs or does not load."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from runtime.contract.bundle import Bundle
from runtime.contract.errors import EngineError, UsageError
from runtime.doctor.facts import Facts
from runtime.engines import EngineOptions
from tests.gpu import timing
from tests.gpu.__main__ import check
from tests.gpu.record import ABSENT, FAILED, PASSED
from tests.gpu.settings import PYTORCH, Settings
from tests.gpu.sides import Absent, Broken, Local, Process
from tests.gpu.verdict import verdict
from tests.runtime.conftest import Install
from tests.runtime.doctor_machines import CPU_ORT, driver, machine
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


class Loadless(HostCuda):
    """Cannot be loaded."""

    def __init__(self, bundle: Bundle, options: EngineOptions) -> None:
        raise EngineError("no kernel image is available")


class Crashing(HostCuda):
    """Dies of what is none of our errors."""

    def embed_image(self, pixels: np.ndarray, pool: np.ndarray) -> np.ndarray:
        raise RuntimeError("an illegal memory access was encountered")


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
    use(monkeypatch, "cuda", Crashing)
    use(monkeypatch, "rtx", HostRtx)
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
    use(monkeypatch, "cuda", HostCuda)
    use(monkeypatch, "rtx", HostRtx)
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
