"""The doctor on a Jetson Orin Nano: JetPack, its TensorRT and Python, power mode,
clocks, memory, containers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from runtime.doctor.checks import choose_targets, diagnose
from runtime.doctor.compatibility import JETPACKS, find_jetpack, numbers
from runtime.doctor.facts import Interpreter
from runtime.hardware.system import read_jetson, read_memory
from tests.runtime.doctor_machines import (
    driver,
    fires,
    machine,
    memory_files,
    orin_nano,
    say,
    silent,
    tensorrt,
    write,
)


def test_an_orin_nano_whose_python_sees_no_tensorrt(tmp_path: Path) -> None:
    answers = {"driver": driver("Orin", (8, 7), "12.6")}
    facts = machine(orin_nano(tmp_path), answers, python=Interpreter("3.11", True, True))
    assert choose_targets(facts, None) == ("cpu", "tensorrt")
    fires(facts, "jetpack", "ok", "JetPack 6.2", "36.4.3", "TensorRT 10.3", "Orin Nano")
    fires(facts, "tensorrt", "problem", "Python 3.10, this is 3.11", "docs/jetson.md")
    fires(facts, "cuda-python", "problem", "'cuda-python>=12,<13'")
    fires(facts, "cuda provider", "problem", "PyPI has no onnxruntime-gpu for Jetson")
    fires(
        machine(tmp_path, answers, python=Interpreter("3.10", True, False)),
        "tensorrt",
        "problem",
        "--system-site-packages",
    )
    bare = replace(facts, jetson=replace(facts.jetson, bindings=()))  # type: ignore[type-var]
    fires(bare, "tensorrt", "problem", "nvidia-jetpack")
    silent(facts, "gpu", "compute capability", "nvml", "processor", "jetson memory")


def test_an_orin_nano_that_is_set_up(tmp_path: Path) -> None:
    packages = {"onnxruntime": "1.31.1", "tensorrt": "10.3.0", "cuda-bindings": "12.9.0"}
    answers = {"driver": driver("Orin", (8, 7), "12.6"), "tensorrt": tensorrt("10.3.0")}
    facts = machine(orin_nano(tmp_path), answers, packages, Interpreter("3.11", True, True))
    diagnosis = diagnose(facts, choose_targets(facts, None))
    assert not diagnosis.problems, diagnosis.problems
    fires(facts, "tensorrt decoder", "ok", "plain decoder")
    silent(
        facts,
        "tensorrt",
        "tensorrt library",
        "driver for tensorrt",
        "cuda-python",
        "tensorrt on jetson",
    )
    found = {result.check: result.finding.level for result in diagnosis.results}
    assert (
        found["power mode"] == "warning"
        and found["clocks"] == "note"
        and found["rtx plugin"] == "note"
    )


def test_power_mode_and_clocks(tmp_path: Path) -> None:
    facts = machine(orin_nano(tmp_path))
    fires(facts, "power mode", "warning", "15W", "MAXN_SUPER", "sudo nvpmodel -m 2")
    fires(facts, "clocks", "note", "jetson_clocks")
    write(
        tmp_path,
        **{
            "var/lib/nvpmodel/status": "pmode:0002 fmode:quiet\n",
            "sys/class/devfreq/17000000.gpu/min_freq": "612000000\n",
        },
    )
    silent(machine(tmp_path), "power mode", "clocks")
    assert (
        facts.jetson
        and facts.jetson.modes == {0: "15W", 1: "25W", 2: "MAXN_SUPER"}
        and facts.jetson.tensorrt == "10.3.0"
    )
    (tmp_path / "etc/nvpmodel.conf").unlink()
    assert machine(tmp_path).jetson.mode == "2"
    (tmp_path / "sys/class/devfreq/17000000.gpu/min_freq").unlink()
    assert machine(tmp_path).jetson.clocks_pinned is None
    write(
        tmp_path / "sys/devices/system/cpu/cpufreq/policy0",
        scaling_min_freq="729600\n",
        scaling_max_freq="1510400\n",
    )
    assert machine(tmp_path).jetson.clocks_pinned is False


def test_memory_of_a_small_jetson(tmp_path: Path) -> None:
    silent(machine(orin_nano(tmp_path)), "jetson memory", "memory")
    write(tmp_path, **memory_files(7802880, 6200000))
    fires(machine(tmp_path), "jetson memory", "warning", "without swap", "fallocate")
    write(
        tmp_path,
        **memory_files(
            7802880,
            6200000,
            3901440,
            "/dev/zram0    partition\t1950720\t0\t5\n/dev/zram1    partition\t1950720\t0\t5\n",
        ),
    )
    fires(machine(tmp_path), "jetson memory", "warning", "zram swap uses memory", "nvzramconfig")
    assert read_memory(tmp_path).zram_mb == pytest.approx(3995.07, abs=0.1)
    write(tmp_path, **memory_files(7802880, 900000, 8388604, "/swapfile file\t8388604\t0\t-2\n"))
    facts = machine(tmp_path)
    fires(facts, "jetson memory", "warning", "desktop", "multi-user")
    fires(facts, "memory", "warning", "0.9 of 8.0 GB")
    assert say(machine(tmp_path / "pc"), "jetson memory") is None


def test_jetpacks_are_known_by_their_release(tmp_path: Path) -> None:
    rows = {
        "36.4.3": "6.2",
        "36.4.0": "6.1",
        "36.4.7": "6.2.1",
        "38.4.0": "7.1",
        "39.2.0": "7.2",
        "39.2.1": "7.2.1",
        "35.4.1": "5",
        "36.3.0": "6",
    }
    assert {l4t: row.name for l4t in rows if (row := find_jetpack(l4t))} == rows and find_jetpack(
        "99.1"
    ) is None
    assert all(numbers(row.cuda) and numbers(row.tensorrt) for row in JETPACKS)
    (orin_nano(tmp_path) / "usr/lib/aarch64-linux-gnu/libnvinfer.so.10.3.0").unlink()
    write(
        tmp_path,
        **{
            "etc/nv_tegra_release": "# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: "
            "t186ref, EABI: aarch64\n"
        },
    )
    fires(machine(tmp_path), "jetpack", "problem", "TensorRT 8.5", "JetPack 6.2 or newer")
    write(tmp_path, **{"etc/nv_tegra_release": "# R99 (release), REVISION: 1.0\n"})
    fires(machine(tmp_path), "jetpack", "note", "does not know")
    (tmp_path / "etc/nv_tegra_release").unlink()
    fires(machine(tmp_path), "jetpack", "note", "JetPack unknown")
    assert (
        read_jetson(tmp_path / "none") is None and say(machine(tmp_path / "pc"), "jetpack") is None
    )


def test_tensorrt_that_does_not_run_on_this_jetson(tmp_path: Path) -> None:
    orin_nano(tmp_path)
    pip = {"tensorrt": "10.16.1", "tensorrt-cu12-libs": "10.16.1"}
    fires(
        machine(tmp_path, {"tensorrt": tensorrt("10.16.1")}, pip),
        "tensorrt on jetson",
        "problem",
        "SBSA",
        "36.4.3",
    )
    fires(
        machine(tmp_path, {"tensorrt": tensorrt("11.4.1")}, {}),
        "tensorrt on jetson",
        "problem",
        "JetPack 7.2.2",
    )
    for revision, level in (("2.1", "problem"), ("2.2", "ok")):
        write(
            tmp_path,
            **{"etc/nv_tegra_release": f"# R39 (release), REVISION: {revision}, BOARD: generic\n"},
        )
        found = say(machine(tmp_path, {"tensorrt": tensorrt("11.4.1")}, {}), "tensorrt on jetson")
        assert (found.level if found else "ok") == level


def test_a_jetson_without_its_gpu(tmp_path: Path) -> None:
    inside = machine(orin_nano(tmp_path), container=True)
    fires(inside, "gpu", "problem", "--runtime nvidia --gpus all")
    fires(machine(tmp_path), "gpu", "problem", "JetPack's driver libraries", "nvidia-l4t-cuda")
