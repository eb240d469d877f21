"""The doctor on PCs: every check fires on the machine it is for, with a cause and a
fix, and is silent on others.
"""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.contract.errors import UsageError
from runtime.doctor.checks import CHECKS, choose_targets, diagnose
from runtime.doctor.facts import IMPORT_NAMES, Facts, installed_import_owners
from runtime.doctor.finding import WANTED
from runtime.doctor.probes import Probe
from runtime.doctor.report import diagnosis_text, verdict
from tests.runtime.doctor_machines import (
    ABSENT,
    CPU_ORT,
    GPU_ORT,
    PLUGIN,
    driver,
    fires,
    machine,
    orin_nano,
    rtx_desktop,
    say,
    silent,
    tensorrt,
    write,
)


def test_names_and_targets_of_the_table() -> None:
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names) >= 20
    assert all(set(check.targets) <= set(WANTED) and check.targets for check in CHECKS)


def test_a_cpu_box_is_well_for_the_cpu_only(tmp_path: Path) -> None:
    facts = machine(tmp_path)
    diagnosis = diagnose(facts, choose_targets(facts, None))
    assert diagnosis.targets == ("cpu",) and not diagnosis.problems
    assert {result.finding.level for result in diagnosis.results} <= {
        "ok",
        "note",
    } and "no problem found: cpu" in diagnosis_text(facts, diagnosis)
    for target in ("cuda", "tensorrt", "rtx"):
        problems = diagnose(facts, (target,)).problems
        assert "gpu" in {result.check for result in problems} and all(
            result.finding.fix for result in problems
        )
    with pytest.raises(UsageError, match="cpu, cuda, tensorrt, rtx"):
        choose_targets(facts, "gpu")


def test_a_desktop_with_mismatched_cuda(tmp_path: Path) -> None:
    log = (
        "[E:onnxruntime] Failed to load libonnxruntime_providers_cuda.so with error: "
        "libcublasLt.so.13: cannot open shared object file"
    )
    packages = {
        "onnxruntime": "1.31.1",
        "onnxruntime-gpu": "1.27.0",
        "nvidia-cuda-runtime-cu12": "12.8.90",
    }
    facts = rtx_desktop(
        tmp_path, packages, onnxruntime=GPU_ORT, cuda_provider=Probe(True, {"runs": False}, log=log)
    )
    assert choose_targets(facts, None) == ("cpu", "cuda")
    fires(
        facts,
        "one onnxruntime",
        "problem",
        "1.31.1",
        "1.27.0",
        "pip uninstall -y onnxruntime onnxruntime-gpu",
    )
    fires(
        facts,
        "cuda provider",
        "problem",
        "libcublasLt.so.13",
        "CUDA 13",
        "installed are nvidia-cuda-runtime-cu12",
    )
    fires(
        facts,
        "driver for onnxruntime",
        "problem",
        "CUDA 13",
        "driver 570.124.06 runs up to 12.8",
        "580",
    )
    fires(facts, "nvml", "warning", "pip install nvidia-ml-py")
    fires(facts, "gpu", "ok", "RTX 4090 (8.9, 25.0 GB)", "570.124.06", "12.8")
    assert {result.check for result in diagnose(facts, ("cuda",)).problems} == {
        "one onnxruntime",
        "cuda provider",
        "driver for onnxruntime",
    }
    assert not diagnose(facts, ("cpu",)).problems and "3 problems for cuda" in verdict(
        diagnose(facts, ("cuda",))
    )


def test_a_desktop_whose_cuda_fits(tmp_path: Path) -> None:
    packages = {"onnxruntime-gpu": "1.26.0", "nvidia-ml-py": "13.0"}
    built = Probe(True, GPU_ORT.values | {"cuda": "12.8"})
    facts = rtx_desktop(
        tmp_path, packages, onnxruntime=built, cuda_provider=Probe(True, {"runs": True})
    )
    assert not diagnose(facts, ("cuda",)).problems
    silent(
        facts,
        "one onnxruntime",
        "cuda provider",
        "driver for onnxruntime",
        "nvml",
        "gpu unused",
        "onnxruntime",
        "processor",
    )


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"onnxruntime": CPU_ORT}, ("CUDAExecutionProvider is absent", "overwrote")),
        (
            {
                "cuda_provider": Probe(
                    True, error="Fail: libcudnn.so.9: cannot open shared object file"
                )
            },
            ("libcudnn.so.9", "nvidia-cudnn-cu13"),
        ),
        (
            {
                "cuda_provider": Probe(
                    True, error="Fail: libcuda.so.1: cannot open shared object file"
                )
            },
            ("no NVIDIA driver",),
        ),
        (
            {
                "cuda_provider": Probe(
                    True, error="ended by signal 11 (Segmentation fault): no message"
                )
            },
            ("Segmentation fault", "check of the GPU"),
        ),
        ({"cuda_provider": Probe(True, {"runs": False})}, ("fell back to the CPU",)),
    ],
)
def test_ways_the_cuda_provider_fails(
    answers: dict[str, Probe], words: tuple[str, ...], tmp_path: Path
) -> None:
    facts = rtx_desktop(
        tmp_path, {"onnxruntime-gpu": "1.27.0"}, **{"onnxruntime": GPU_ORT, **answers}
    )
    fires(facts, "cuda provider", "problem", *words)


def test_onnxruntime_itself(tmp_path: Path) -> None:
    fires(
        machine(tmp_path, {"onnxruntime": ABSENT}),
        "onnxruntime",
        "problem",
        "not installed",
        "pip install",
    )
    broken = machine(
        tmp_path,
        {"onnxruntime": Probe(True, error="ImportError: bad ELF header")},
        {"onnxruntime-gpu": "1.27.0"},
    )
    fires(broken, "onnxruntime", "problem", "bad ELF header", "--force-reinstall")
    assert say(broken, "cuda provider") is None
    fires(
        machine(tmp_path, {"onnxruntime": Probe(True, CPU_ORT.values | {"version": "1.19.2"})}),
        "onnxruntime",
        "problem",
        "1.19.2",
        "1.24",
    )
    silent(machine(tmp_path), "onnxruntime", "one onnxruntime")


def test_tensorrt_bindings_library_and_version(tmp_path: Path) -> None:
    packages = {
        "tensorrt": "10.16.1",
        "tensorrt-cu12": "10.16.1",
        "tensorrt-cu12-libs": "10.16.1",
        "cuda-python": "12.9.0",
    }

    def with_tensorrt(probe: Probe, **more: str) -> Facts:
        return rtx_desktop(tmp_path, packages | more, tensorrt=probe)

    good = with_tensorrt(tensorrt("10.16.1", "10.16.1", True))
    assert not diagnose(good, ("tensorrt",)).problems
    fires(good, "tensorrt decoder", "ok", "fused decoder")
    fires(with_tensorrt(tensorrt("10.13.3")), "tensorrt decoder", "ok", "plain decoder")
    fires(with_tensorrt(tensorrt("10.0.1")), "tensorrt decoder", "problem", "too old", "10.3")
    fires(
        with_tensorrt(tensorrt("10.16.1", "10.3.0")),
        "tensorrt library",
        "problem",
        "10.16.1",
        "10.3.0",
        "tensorrt==10.3.*",
    )
    silent(with_tensorrt(tensorrt("10.16.1", "10.16.0")), "tensorrt library")
    missing = Probe(
        True,
        error="ImportError: libnvinfer.so.10: cannot open shared object file: No such file or "
        "directory",
    )
    fires(
        with_tensorrt(missing), "tensorrt", "problem", "libnvinfer is missing", "--force-reinstall"
    )
    fires(
        with_tensorrt(Probe(True, error="ImportError: undefined symbol: foo")),
        "tensorrt",
        "problem",
        "undefined symbol",
        "one version",
    )
    fires(rtx_desktop(tmp_path, {}), "tensorrt", "problem", "not installed", ".[tensorrt]")
    silent(rtx_desktop(tmp_path, {}), "driver for tensorrt", "tensorrt decoder", "tensorrt library")


def test_cuda_majors_of_tensorrt_and_its_driver(tmp_path: Path) -> None:
    thirteen = {"tensorrt": "11.4.1", "tensorrt-cu13": "11.4.1", "cuda-python": "12.9.0"}
    facts = rtx_desktop(tmp_path, thirteen, tensorrt=tensorrt("11.4.1", "11.4.1", True))
    fires(facts, "driver for tensorrt", "problem", "CUDA 13", "12.8", "580")
    fires(
        facts,
        "cuda-python",
        "problem",
        "cuda-python 12.9.0 does not match TensorRT for CUDA 13",
        "'cuda-python>=13,<14'",
    )
    fires(
        rtx_desktop(tmp_path, {}, tensorrt=tensorrt("10.16.1")),
        "cuda-python",
        "problem",
        "'cuda-python>=12,<13'",
    )
    newer = replace(
        facts, probes={**facts.probes, "driver": driver("NVIDIA GeForce RTX 4090", (8, 9), "13.1")}
    )
    silent(newer, "driver for tensorrt")
    orin = machine(
        orin_nano(tmp_path / "orin"),
        {"driver": driver("Orin", (8, 7), "12.6"), "tensorrt": tensorrt("10.16.1")},
        thirteen,
    )
    fires(orin, "driver for tensorrt", "problem", "part of JetPack", "flash")


@pytest.mark.parametrize(
    ("capability", "version", "tensorrt_level", "rtx_level"),
    [
        ((6, 1), "", "problem", "problem"),
        ((7, 0), "10.3.0", "warning", "problem"),
        ((7, 0), "11.4.1", "problem", "problem"),
        ((7, 5), "", "ok", "problem"),
        ((8, 6), "", "ok", "ok"),
        ((9, 0), "", "ok", "problem"),
        ((12, 0), "", "ok", "ok"),
    ],
)
def test_compute_capability(
    capability: tuple[int, int], version: str, tensorrt_level: str, rtx_level: str, tmp_path: Path
) -> None:
    facts = machine(
        tmp_path,
        {
            "driver": driver("GPU", capability, "13.0"),
            "tensorrt": tensorrt(version) if version else ABSENT,
        },
    )
    for check, level in (("compute capability", tensorrt_level), ("rtx capability", rtx_level)):
        found = say(facts, check)
        assert (found.level if found else "ok") == level


def test_the_rtx_plugin(tmp_path: Path) -> None:
    packages = {"onnxruntime": "1.31.1", PLUGIN: "0.5.0", "nvidia-ml-py": "13"}
    good = rtx_desktop(
        tmp_path,
        packages,
        rtx=Probe(True, {"devices": 1}),
        driver=driver("NVIDIA GeForce RTX 4090", (8, 9), "13.0"),
    )
    assert choose_targets(good, None) == ("cpu", "rtx") and not diagnose(good, ("rtx",)).problems
    fires(rtx_desktop(tmp_path, {}), "rtx plugin", "problem", "not installed", "rtx-cu12", "146 MB")
    fires(
        rtx_desktop(tmp_path, packages, rtx=Probe(True, {"devices": 0})),
        "rtx plugin",
        "problem",
        "finds no GPU",
    )
    fires(
        rtx_desktop(tmp_path, packages, rtx=Probe(True, error="Fail: libcuda.so.1")),
        "rtx plugin",
        "problem",
        "does not load",
    )
    fires(rtx_desktop(tmp_path, packages), "driver for rtx", "problem", "CUDA 13", "12.8")
    old = Probe(True, CPU_ORT.values | {"version": "1.22.0"})
    fires(
        rtx_desktop(tmp_path, packages, rtx=Probe(True, {"devices": 1}), onnxruntime=old),
        "rtx plugin",
        "problem",
        "1.22.0",
    )
    fires(
        rtx_desktop(tmp_path, packages | {"onnxruntime-gpu": "1.27.0"}),
        "rtx packages",
        "warning",
        "pip uninstall -y onnxruntime-gpu",
    )
    silent(good, "rtx packages", "driver for rtx", "rtx plugin")


def test_the_processor(tmp_path: Path) -> None:
    write(tmp_path, **{"proc/cpuinfo": "model name : Old\nflags : avx2 fma\n"})
    fires(machine(tmp_path), "processor", "note", "Old", "VNNI", "no bf16")
    write(tmp_path, **{"proc/cpuinfo": "model name : New\nflags : avx2 avx512_vnni avx512_bf16\n"})
    fires(machine(tmp_path), "processor", "ok", "avx512_vnni", "bf16 by avx512_bf16")


def test_another_package_with_our_import_names(tmp_path: Path) -> None:
    facts = machine(tmp_path)
    silent(facts, "import names")
    silent(replace(facts, import_owners={name: () for name in IMPORT_NAMES}), "import names")
    owners = {"runtime": ("infmllm-edge",), "trainer": ("infmllm-edge", "trainer-of-others")}
    fires(
        replace(facts, import_owners=owners),
        "import names",
        "problem",
        "trainer also comes from trainer-of-others",
        "pip uninstall -y trainer-of-others",
    )


def test_owners_of_import_names_are_read_from_installed_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "export").mkdir()
    info = tmp_path / "other_exporter-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-exporter\nVersion: 1.0\n")
    (info / "RECORD").write_text("export/__init__.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "other-exporter" in installed_import_owners()["export"]
    assert "other-exporter" not in installed_import_owners()["runtime"]


def test_import_names_are_the_packages_that_are_built() -> None:
    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    found = settings["tool"]["setuptools"]["packages"]["find"]["include"]
    assert sorted(name.removesuffix("*") for name in found) == sorted(IMPORT_NAMES)
