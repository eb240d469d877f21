"""Checks of the GPU engines' libraries: ONNX Runtime's CUDA provider, TensorRT with its
bindings and cuda-python, and the TensorRT-RTX plugin.
"""

from __future__ import annotations

import re

from runtime.doctor.compatibility import (
    FUSED_TENSORRT,
    OLDEST_ONNXRUNTIME,
    OLDEST_TENSORRT,
    numbers,
    release,
)
from runtime.doctor.facts import Facts
from runtime.doctor.finding import CUDA, RTX, TENSORRT, Check, Finding, ok, problem, warning
from runtime.doctor.gpu import driver_runs
from runtime.engines import PIP_ONNXRUNTIME_GPU

__all__ = ["CHECKS"]

_LIBRARY = re.compile(r"(lib[\w+-]+)\.so(?:\.(\d+))?[\w.]*: cannot open shared object")


def _cuda_major(facts: Facts) -> int | None:
    """Returns the CUDA major version that onnxruntime-gpu reports it is built for.
    PyPI's package is built for CUDA 13 since 1.27
    (github.com/microsoft/onnxruntime/issues/29032).
    """
    major = numbers(str(facts.probes["onnxruntime"].values.get("cuda", "")))
    return major[0] if major else None


def _cuda_provider(facts: Facts) -> Finding | None:
    if "onnxruntime-gpu" not in facts.packages:
        fix = (
            "use --target tensorrt: PyPI has no onnxruntime-gpu for Jetson"
            if facts.jetson
            else PIP_ONNXRUNTIME_GPU
        )
        return problem(
            "onnxruntime-gpu is not installed",
            "the CPU package onnxruntime has no CUDA provider",
            fix,
        )
    if not facts.probes["onnxruntime"].works:
        return None  # the onnxruntime check reports the reason
    if "CUDAExecutionProvider" not in facts.probes["onnxruntime"].values["providers"]:
        found = "CUDAExecutionProvider is absent although onnxruntime-gpu is installed"
        return problem(found, "another onnxruntime overwrote its files", PIP_ONNXRUNTIME_GPU)
    probe = facts.probes["cuda_provider"]
    if probe.works and probe.values["runs"]:
        return ok(
            f"CUDAExecutionProvider works (onnxruntime-gpu {facts.packages['onnxruntime-gpu']})"
        )
    return _failed_provider(facts, probe.error, f"{probe.error}\n{probe.log}")


def _failed_provider(facts: Facts, error: str, log: str) -> Finding:
    """Explains a failed CUDA provider by the library it did not find. Without a driver
    that library is libcuda, which the GPU check explains.
    """
    missing = _LIBRARY.search(log)
    built = _cuda_major(facts)
    if missing is None:
        return problem(
            f"CUDAExecutionProvider does not start: {error or 'it fell back to the CPU'}",
            "see the check of the GPU",
            "apply the fix of that check",
        )
    name, major = missing[1], missing[2]
    found = (
        f"CUDAExecutionProvider does not start: {name}.so{'.' + major if major else ''} is "
        f"not found"
    )
    if "cudnn" in name:
        return problem(
            found,
            f"cuDNN {major or 9} is not installed",
            f"pip install nvidia-cudnn-cu{built or 13}",
        )
    if name == "libcuda":
        return problem(found, "there is no NVIDIA driver", "see the check of the GPU")
    others = [
        package for package in facts.packages if package.startswith(("nvidia-cuda", "nvidia-cudnn"))
    ]
    cause = f"it needs the libraries of CUDA {built or major}" + (
        f", installed are {', '.join(others)}" if others else ""
    )
    return problem(
        found, cause, "pip install 'onnxruntime-gpu[cuda,cudnn]', or install that CUDA toolkit"
    )


def _driver_onnxruntime(facts: Facts) -> Finding | None:
    return (
        driver_runs(facts, "onnxruntime-gpu", _cuda_major(facts))
        if "onnxruntime-gpu" in facts.packages
        else None
    )


def _tensorrt(facts: Facts) -> Finding:
    probe = facts.probes["tensorrt"]
    if not probe.installed:
        return _no_bindings(facts)
    if probe.works:
        return ok(f"TensorRT {probe.values['version']}")
    found = f"TensorRT's bindings do not load: {probe.error}"
    missing = _LIBRARY.search(probe.error)
    if missing and missing[1].startswith(("libnvinfer", "libnvonnxparser")):
        fix = (
            "sudo apt install tensorrt libnvinfer-bin"
            if facts.jetson
            else "pip install --force-reinstall tensorrt"
        )
        return problem(
            found,
            f"{missing[1]} is missing: the library is not installed, or has another major "
            f"version than the bindings",
            fix,
        )
    cause = (
        "a library it needs is missing, or the bindings do not match the library or this "
        "Python version"
    )
    return problem(
        found,
        cause,
        "install bindings and library of one version (docs/jetson.md, or pip install "
        "--force-reinstall tensorrt)",
    )


def _no_bindings(facts: Facts) -> Finding:
    python, system = facts.python, facts.jetson.bindings if facts.jetson else ()
    if system and python.version not in system:
        found = (
            f"TensorRT's bindings of JetPack are for Python {', '.join(system)}, this is "
            f"{python.version}"
        )
        cause = "bindings work with one Python version only; this project needs 3.11 or newer"
        return problem(
            found,
            cause,
            "install TensorRT's wheel for this Python, in JetPack's version (docs/jetson.md)",
        )
    if system and not python.sees_system:
        found = "this virtual environment does not see JetPack's TensorRT"
        return problem(
            found,
            "it was created without --system-site-packages",
            "create it again: python3 -m venv --system-site-packages .venv",
        )
    if facts.jetson:
        return problem(
            "TensorRT's bindings are not installed",
            "JetPack's compute packages are missing",
            "sudo apt install nvidia-jetpack",
        )
    return problem(
        "TensorRT is not installed",
        "this Python environment lacks it",
        'pip install -e ".[tensorrt]"',
    )


def _tensorrt_library(facts: Facts) -> Finding | None:
    """Checks that the bindings and the library have the same version. Libraries before
    10 number versions differently and are left to the version check.
    """
    values = facts.probes["tensorrt"].values
    bindings, library = str(values.get("version", "")), str(values.get("library", ""))
    if (
        not bindings
        or not library
        or numbers(library) < (10,)
        or release(bindings) == release(library)
    ):
        return None
    found = f"TensorRT's bindings are {bindings}, the library is {library}"
    fix = (
        f"install both in the same version: pip install "
        f"'tensorrt=={'.'.join(map(str, release(library)))}.*', or change the library"
    )
    return problem(found, "two installations are mixed, such as one by pip and one by apt", fix)


def _tensorrt_version(facts: Facts) -> Finding | None:
    values = facts.probes["tensorrt"].values
    if "version" not in values:
        return None
    version = str(values["version"])
    if release(version) < OLDEST_TENSORRT:
        fix = "flash JetPack 6.2 or newer" if facts.jetson else "pip install -U tensorrt"
        return problem(
            f"TensorRT {version} is too old",
            "it cannot read the graphs of a bundle; 10.3 is the oldest version that can",
            fix,
        )
    fused = values.get("fused", release(version) >= FUSED_TENSORRT)
    return ok(
        f"TensorRT {version} supports the faster fused decoder (key/value cache updated in place)"
        if fused
        else f"TensorRT {version} supports only the plain decoder; the faster fused one needs 10.15"
    )


def _driver_tensorrt(facts: Facts) -> Finding | None:
    return (
        driver_runs(facts, "TensorRT", facts.tensorrt_cuda)
        if facts.probes["tensorrt"].installed
        else None
    )


def _cuda_python(facts: Facts) -> Finding | None:
    version = facts.packages.get("cuda-bindings") or facts.packages.get("cuda-python")
    wanted = facts.tensorrt_cuda or (numbers(facts.driver_cuda)[0] if facts.driver_cuda else None)
    span = f"'cuda-python>={wanted},<{wanted + 1}'" if wanted else "cuda-python"
    if not version:
        return problem(
            "cuda-python is not installed",
            "the TensorRT engine needs it to manage device memory",
            f"pip install {span}",
        )
    if wanted and numbers(version)[0] != wanted:
        return problem(
            f"cuda-python {version} does not match TensorRT for CUDA {wanted}",
            "both must be for the same CUDA major version",
            f"pip install {span}",
        )
    return ok(f"cuda-python {version}")


def _rtx(facts: Facts) -> Finding:
    probe = facts.probes["rtx"]
    if not facts.plugin and not probe.installed:
        cuda = 12 if facts.driver_cuda and numbers(facts.driver_cuda)[0] < 13 else 13
        fix = f"pip install 'onnxruntime>=1.24' onnxruntime-ep-nv-tensorrt-rtx-cu{cuda} (146 MB)"
        return problem(
            "the TensorRT-RTX plugin is not installed",
            "it is a separate package, which ONNX Runtime does not include",
            fix,
        )
    version = str(facts.probes["onnxruntime"].values.get("version", ""))
    if version and release(version) < OLDEST_ONNXRUNTIME:
        return problem(
            f"onnxruntime {version} is too old for the TensorRT-RTX plugin",
            "the plugin needs 1.24 or newer",
            "pip install -U onnxruntime",
        )
    if probe.error:
        return problem(
            f"the TensorRT-RTX plugin does not load: {probe.error}",
            "a driver or library it needs is missing",
            "see the check of the GPU",
        )
    if not probe.values.get("devices"):
        return problem(
            "the TensorRT-RTX plugin finds no GPU",
            "it needs an RTX GPU of Ampere or newer",
            "see the checks of the GPU, or use --target cpu",
        )
    return ok(
        f"the TensorRT-RTX plugin {facts.packages.get(facts.plugin, '')} finds "
        f"{probe.values['devices']} GPU"
    )


def _rtx_packages(facts: Facts) -> Finding | None:
    """Warns if the plugin and onnxruntime-gpu are both installed. NVIDIA's installation
    page says to uninstall onnxruntime-gpu first.
    """
    if not facts.plugin or "onnxruntime-gpu" not in facts.packages:
        return None
    cause = "the plugin needs the package onnxruntime, whose files onnxruntime-gpu overwrites"
    return warning(
        "both onnxruntime-gpu and the TensorRT-RTX plugin are installed",
        cause,
        "pip uninstall -y onnxruntime-gpu && pip install onnxruntime",
    )


def _driver_rtx(facts: Facts) -> Finding | None:
    return (
        driver_runs(facts, facts.plugin, 12 if facts.plugin.endswith("cu12") else 13)
        if facts.plugin
        else None
    )


CHECKS = (
    Check("cuda provider", (CUDA,), _cuda_provider),
    Check("driver for onnxruntime", (CUDA,), _driver_onnxruntime),
    Check("tensorrt", (TENSORRT,), _tensorrt),
    Check("tensorrt library", (TENSORRT,), _tensorrt_library),
    Check("tensorrt decoder", (TENSORRT,), _tensorrt_version),
    Check("driver for tensorrt", (TENSORRT,), _driver_tensorrt),
    Check("cuda-python", (TENSORRT,), _cuda_python),
    Check("rtx plugin", (RTX,), _rtx),
    Check("rtx packages", (RTX,), _rtx_packages),
    Check("driver for rtx", (RTX,), _driver_rtx),
)
