"""Probes libraries, each in a separate process. A broken installation may abort, hang
or print, and the process boundary keeps that away from the doctor.
"""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PROBES", "Probe", "Question", "run_probe"]

_SECONDS = 120.0
_MARK = "infmllm-doctor:"
_LONGEST = 400  # most characters of an error that are kept


@dataclass(frozen=True)
class Probe:
    """The result of a probe. `installed` says whether the module exists, `values` what
    the probe found, and `error` is the last line of the error if it failed. `log` is
    its standard error output.
    """

    installed: bool
    values: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    log: str = ""

    @property
    def works(self) -> bool:
        """Whether the module is installed and the probe succeeded."""
        return self.installed and not self.error


@dataclass(frozen=True)
class Question:
    """Probe code that fills `found`. It is run only if `module` is installed; "" means
    that it always runs.
    """

    module: str
    code: str


_CUDA = """
import ctypes
cuda, number = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
def ask(function, *arguments):
    code = getattr(cuda, function)(ctypes.byref(number), *arguments)
    return number.value if code == 0 else None
found["code"] = cuda.cuInit(0)
version = ask("cuDriverGetVersion") or 0
found["cuda"] = f"{version // 1000}.{version % 1000 // 10}"
found["devices"] = []
for index in range((ask("cuDeviceGetCount") or 0) if found["code"] == 0 else 0):
    device = ctypes.c_int(ask("cuDeviceGet", index))
    name, size = ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGetName(name, 256, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
    capability = [ask("cuDeviceGetAttribute", attribute, device) for attribute in (75, 76)]
    memory = size.value / 1e6
    found["devices"].append(
        {"name": name.value.decode(), "capability": capability, "memory_mb": memory}
    )
"""

_ONNXRUNTIME = """
import onnxruntime as ort
from onnxruntime.capi import build_and_package_info as built
found["version"], found["package"] = ort.__version__, getattr(built, "package_name", "")
found["cuda"] = str(getattr(built, "cuda_version", "") or "")
found["providers"] = ort.get_available_providers()
"""

# A session with one matrix product. If CUDA fails, onnxruntime falls back to the CPU and prints
# the reason.
_CUDA_PROVIDER = """
import numpy, onnxruntime as ort
from runtime.hardware.probe_model import one_node_model
if hasattr(ort, "preload_dlls"):
    ort.preload_dlls()
left, kind = numpy.ones((2, 2), numpy.float32), numpy.dtype(numpy.float32)
model = one_node_model("MatMul", left, (2, 2), kind, kind, left)
session = ort.InferenceSession(model, providers=["CUDAExecutionProvider"])
right = float(session.run(None, {"a": left})[0][0, 0]) == 2.0
found["runs"] = session.get_providers()[0] == "CUDAExecutionProvider" and right
"""

# The library is asked too, because its version can differ from that of the bindings. Since
# TensorRT 10 its version number is 10000 x major + 100 x minor + patch.
_TENSORRT = """
import ctypes
import tensorrt as trt
found["version"] = trt.__version__
found["fused"] = hasattr(trt.INetworkDefinition, "add_kv_cache_update")
paths = [line.split()[-1] for line in open("/proc/self/maps") if "/libnvinfer.so" in line]
if paths:
    number = ctypes.CDLL(paths[0]).getInferLibVersion()
    found["library"] = f"{number // 10000}.{number // 100 % 100}.{number % 100}"
"""

_RTX = """
import onnxruntime as ort
import onnxruntime_ep_nv_tensorrt_rtx as plugin
ort.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
found["devices"] = sum(device.ep_name == plugin.get_ep_name() for device in ort.get_ep_devices())
"""

PROBES: dict[str, Question] = {
    "driver": Question("", _CUDA),
    "onnxruntime": Question("onnxruntime", _ONNXRUNTIME),
    "cuda_provider": Question("onnxruntime", _CUDA_PROVIDER),
    "tensorrt": Question("tensorrt", _TENSORRT),
    "rtx": Question("onnxruntime_ep_nv_tensorrt_rtx", _RTX),
}


def run_probe(
    name: str, seconds: float = _SECONDS, find: Callable[[str], object] = importlib.util.find_spec
) -> Probe:
    """Runs one probe of `PROBES`; a crash or a timeout is returned as a failed probe."""
    question = PROBES[name]
    if question.module and find(question.module) is None:
        return Probe(installed=False)
    code = f"import json\nfound = {{}}\n{question.code}\nprint({_MARK!r} + json.dumps(found))"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return Probe(True, error=f"no answer within {seconds:.0f} s")
    answers = [
        line.removeprefix(_MARK) for line in done.stdout.splitlines() if line.startswith(_MARK)
    ]
    log = re.sub(r"\x1b\[[0-9;]*m", "", done.stderr.strip())
    return (
        Probe(True, json.loads(answers[-1]), log=log)
        if answers
        else Probe(True, error=_failure(done.returncode, log), log=log)
    )


def _failure(code: int, log: str) -> str:
    """Returns the last line of the error. If a signal ended the process, the signal is
    named first.
    """
    last = (log.splitlines() or ["no message"])[-1].strip()[:_LONGEST]
    return last if code >= 0 else f"ended by signal {-code} ({signal.strsignal(-code)}): {last}"
