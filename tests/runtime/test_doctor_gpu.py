"""The doctor where CUDA finds no GPU, or nothing uses it: containers, permissions,
drivers, WSL.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runtime.doctor.probes import Probe
from runtime.hardware.system import read_access
from tests.runtime.doctor_machines import NO_DRIVER, driver, fires, machine, say, silent, write


@pytest.mark.parametrize(
    ("probe", "access", "words"),
    [
        (NO_DRIVER, {}, ("no NVIDIA GPU", "--target cpu")),
        (NO_DRIVER, {"container": True}, ("container was given no GPU", "docker run --gpus all")),
        (NO_DRIVER, {"wsl": True}, ("WSL", "wsl --update")),
        (NO_DRIVER, {"card": True}, ("no working driver", "ubuntu-drivers")),
        (
            Probe(True, {"code": 100}),
            {"visible_devices": "-1"},
            ("hides every GPU", "unset CUDA_VISIBLE_DEVICES"),
        ),
        (
            Probe(True, {"code": 803}),
            {"nodes": ("dev/nvidia0",)},
            ("different versions", "restart"),
        ),
        (
            Probe(True, {"code": 804}),
            {"compat": True, "container": True},
            ("forward-compatibility", "rm -rf /usr/local/cuda*/compat*"),
        ),
        (
            Probe(True, {"code": 999}),
            {"closed": ("dev/nvmap",), "groups": ("video",)},
            ("may not open /dev/nvmap", "usermod -aG video $USER"),
        ),
        (
            Probe(True, {"code": 999}),
            {"closed": ("dev/nvmap",), "groups": ("44",), "container": True},
            ("docker run --group-add 44",),
        ),
    ],
)
def test_why_there_is_no_gpu(
    probe: Probe, access: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    facts = machine(tmp_path, {"driver": probe}, container=access.pop("container", False))
    facts = replace(facts, access=replace(facts.access, **access))
    fires(facts, "gpu", "problem", *words)
    silent(
        facts, "nvml", "gpu unused", "compute capability", "rtx capability", "driver for tensorrt"
    )


def test_a_gpu_nothing_uses_wsl_and_a_full_disk(tmp_path: Path) -> None:
    facts = machine(tmp_path, {"driver": driver("NVIDIA GeForce RTX 3060", (8, 6), "13.0")})
    fires(facts, "gpu unused", "note", "onnxruntime-gpu[cuda,cudnn]", ".[tensorrt]")
    assert say(facts, "wsl") is None
    fires(replace(facts, access=replace(facts.access, wsl=True)), "wsl", "note", "Windows")
    fires(replace(facts, free_mb=900.0), "disk", "warning", "0.9 GB", "INFMLLM_CACHE")


def test_access_is_read_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not read_access(tmp_path).nodes and not read_access(tmp_path).container
    write(
        tmp_path,
        **{
            "proc/version": "Linux version 5.15.167.4-microsoft-standard-WSL2",
            ".dockerenv": "",
            "dev/nvidia0": "",
            "sys/bus/pci/devices/0000:01:00.0/vendor": "0x10de\n",
            "sys/bus/pci/devices/0000:01:00.0/class": "0x030000\n",
            "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for "
            "x86_64  580.95.05  Release Build\n",
            "usr/local/cuda-13.2/compat/libcuda.so.1": "",
        },
    )
    monkeypatch.setattr(os, "access", lambda *_: False)
    found = read_access(tmp_path)
    assert (found.card, found.driver, found.container, found.wsl, found.compat) == (
        True,
        "580.95.05",
        True,
        True,
        True,
    )
    assert found.nodes == found.closed == ("dev/nvidia0",) and len(found.groups) == 1
