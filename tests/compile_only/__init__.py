"""TensorRT without a GPU: its real parser and compiler, to compile engines that cannot
run here, and the Python names of other versions.

Two public wheels are combined: TensorRT's Python bindings, and the ONNX Runtime plugin
that contains TensorRT-RTX, whose compiler needs no GPU. A small library of forwarding
functions, compiled here, connects them. It is for tests only and not part of the
product.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

__all__ = ["bindings", "compiler", "cuda"]

HERE = Path(__file__).parent
COMPILER = ("tensorrt_cu13_bindings==11.4.0.106", "onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0")
_TENSORRT = '''"""The public bindings over the TensorRT-RTX compiler, or over nothing."""
import ctypes
import pathlib
import sys

sys.setdlopenflags(sys.getdlopenflags() | ctypes.RTLD_GLOBAL)
for name in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
    library = next(pathlib.Path(__file__).parent.glob(f"lib{name}.so.*"))
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

from tensorrt_bindings import *  # noqa: E402,F403
from tensorrt_bindings import __version__  # noqa: E402,F401
'''


def compiler(root: Path) -> dict[str, str]:
    """Returns an environment in which `import tensorrt` gives version 11.4 with a
    working compiler. Skips the test if it cannot be set up.
    """
    return _environment(root, COMPILER, "onnxruntime_ep_nv_tensorrt_rtx")


def bindings(root: Path, version: str) -> dict[str, str]:
    """Returns an environment in which `import tensorrt` gives the names of that
    version, without working functions.
    """
    return _environment(root, (f"tensorrt_cu12_bindings=={version}",), "")


def cuda(root: Path, version: str) -> dict[str, str]:
    """Returns an environment in which `cuda.bindings.runtime` has that version, without
    a driver.
    """
    return _environment(root, (f"cuda-bindings=={version}", "cuda-pathfinder>=1.1"), "")


def _environment(root: Path, wheels: tuple[str, ...], libraries: str) -> dict[str, str]:
    folder = root / wheels[0].replace("==", "-")
    if not (folder / "ready").is_file():
        try:
            _install(folder, wheels, libraries)
        except (subprocess.CalledProcessError, OSError) as error:
            said = str(getattr(error, "stderr", "") or error).strip().splitlines()[-1:]
            if os.environ.get("INFMLLM_REQUIRE_TENSORRT"):
                raise
            pytest.skip(
                f"TensorRT's compiler could not be set up ({said}); pip must reach its wheels, "
                f"and gcc be installed"
            )
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(HERE.parents[1])])}


def _install(folder: Path, wheels: tuple[str, ...], libraries: str) -> None:
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--upgrade",
        "--target",
        str(folder),
        *wheels,
    ]
    subprocess.run(pip, check=True, capture_output=True, text=True, timeout=900)
    if "tensorrt" not in wheels[0]:
        (folder / "ready").touch()
        return
    module = folder / "tensorrt"
    module.mkdir(exist_ok=True)
    (module / "__init__.py").write_text(_TENSORRT)
    generation = wheels[0].partition("==")[2].partition(".")[0]
    for name, real in (
        ("nvinfer", "tensorrt_rtx"),
        ("nvonnxparser", "tensorrt_onnxparser_rtx"),
        ("nvinfer_plugin", ""),
    ):
        found = next((folder / libraries).glob(f"lib{real}.so.*")) if libraries and real else ""
        soname = f"lib{name}.so.{generation}"
        output = [
            "-o",
            str(module / soname),
            f"-Wl,-soname,{soname}",
            f'-DTARGET="{found}"',
            f"-D{name}",
        ]
        command = ["gcc", "-O1", "-shared", "-fPIC", str(HERE / "forward.c"), *output, "-ldl"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    (folder / "ready").touch()
