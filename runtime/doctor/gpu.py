"""Checks of the access to an NVIDIA GPU: device files, container, driver, and whether
the driver is new enough for each library.
"""

from __future__ import annotations

from runtime.doctor.compatibility import (
    DRIVER_FOR_CUDA,
    LEAST_CAPABILITY,
    RTX_CAPABILITIES,
    numbers,
)
from runtime.doctor.facts import Facts
from runtime.doctor.finding import CUDA, RTX, TENSORRT, Check, Finding, note, ok, problem, warning
from runtime.engines import PIP_ONNXRUNTIME_GPU

__all__ = ["CHECKS", "driver_runs"]


_GPU = (CUDA, TENSORRT, RTX)
_MISMATCH, _NO_COMPAT = (
    803,
    804,
)  # CUDA_ERROR_SYSTEM_DRIVER_MISMATCH and CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE, of cuda.h


def _gpu(facts: Facts) -> Finding:
    if facts.devices:
        names = ", ".join(
            f"{gpu.name} ({gpu.capability[0]}.{gpu.capability[1]}, {gpu.memory_mb / 1e3:.1f} GB)"
            for gpu in facts.devices
        )
        return ok(f"{names}; {_driver(facts)} runs CUDA up to {facts.driver_cuda}")
    found = _failure(facts)
    for reason in (_hidden, _forbidden, _init, _contained, _driverless):
        if answer := reason(facts):
            return problem(found, *answer)
    return problem(
        "no NVIDIA GPU",
        "this machine has no NVIDIA device on its PCI bus",
        "use the CPU: infmllm-export build --target cpu",
    )


def _driver(facts: Facts) -> str:
    """Returns the driver's name; a Jetson's driver has no version number of its own."""
    return f"driver {facts.access.driver}" if facts.access.driver else "the driver"


def _failure(facts: Facts) -> str:
    probe = facts.probes["driver"]
    return (
        f"CUDA finds no GPU ({probe.error or 'cuInit gives {}'.format(probe.values.get('code'))})"
    )


def _hidden(facts: Facts) -> tuple[str, str] | None:
    visible = facts.access.visible_devices
    if visible is None or visible.strip() not in ("", "-1"):
        return None
    return (
        f"CUDA_VISIBLE_DEVICES is {visible!r}, which hides every GPU",
        "unset CUDA_VISIBLE_DEVICES",
    )


def _forbidden(facts: Facts) -> tuple[str, str] | None:
    """Reports device files that this user may not open. On a Jetson, /dev/nvmap belongs
    to root:video (github.com/NVIDIA/NemoClaw/pull/5018).
    """
    if not facts.access.closed:
        return None
    groups = [group for group in facts.access.groups if group not in ("root", "0")] or [
        "video",
        "render",
    ]
    cause = f"this user may not open /{', /'.join(facts.access.closed)}"
    if facts.access.container:
        return cause, f"docker run {' '.join(f'--group-add {group}' for group in groups)} …"
    return cause, f"sudo usermod -aG {','.join(groups)} $USER, then log in again"


def _init(facts: Facts) -> tuple[str, str] | None:
    """Explains two error codes of cuInit that are more specific than a missing device.
    NVIDIA's CUDA images contain the forward-compatibility libraries.
    """
    code = int(facts.probes["driver"].values.get("code", 0))
    if code not in (_MISMATCH, _NO_COMPAT):
        return None
    if facts.access.compat:
        cause = (
            "CUDA's forward-compatibility libraries are loaded before the driver's own, but this "
            "GPU or driver does not support them"
        )
        return cause, "rm -rf /usr/local/cuda*/compat* && ldconfig (in a Dockerfile: a RUN line)"
    return (
        "the driver's kernel module and its libraries are of different versions, as after an "
        "update",
        "restart the machine",
    )


def _contained(facts: Facts) -> tuple[str, str] | None:
    """Reports a container without a GPU. Jetsons need `--runtime nvidia`, which alone
    adds devices only if NVIDIA_VISIBLE_DEVICES is set
    (github.com/mudler/vllm.cpp/pull/422).
    """
    if not facts.access.container:
        return None
    flags = "--runtime nvidia --gpus all" if facts.jetson else "--gpus all"
    return (
        "this container was given no GPU",
        f"docker run {flags} …; the host needs a driver and nvidia-container-toolkit",
    )


def _driverless(facts: Facts) -> tuple[str, str] | None:
    if facts.jetson:
        return (
            "JetPack's driver libraries are missing or not found",
            "sudo apt install --reinstall nvidia-l4t-cuda nvidia-l4t-core",
        )
    if facts.access.wsl:
        return (
            "Windows does not give WSL access to a GPU",
            "update the NVIDIA driver in Windows, then: wsl --update && wsl --shutdown",
        )
    if facts.access.card or facts.access.nodes:
        return (
            "there is an NVIDIA card, but no working driver",
            "install one (Ubuntu: sudo ubuntu-drivers install), then restart",
        )
    return None


def _unused(facts: Facts) -> Finding | None:
    """Reports a GPU that no installed engine would use. A Jetson without TensorRT is
    left to the TensorRT check.
    """
    engines = {"onnxruntime-gpu", "tensorrt", facts.plugin} - {""}
    if (
        not facts.devices
        or facts.jetson
        or engines & set(facts.packages)
        or facts.probes["tensorrt"].installed
    ):
        return None
    return note(
        "the GPU is not used",
        "no engine for it is installed",
        f"{PIP_ONNXRUNTIME_GPU}, or: pip install -e '.[tensorrt]'",
    )


def driver_runs(facts: Facts, library: str, major: int | None) -> Finding | None:
    """Checks whether the driver is new enough for a library built for a CUDA major
    version. A newer driver always runs an older major version.
    """
    if not facts.driver_cuda or not major:
        return None
    newest = numbers(facts.driver_cuda)[0]
    if major <= newest:
        return ok(f"{library} is built for CUDA {major}, the driver runs up to {facts.driver_cuda}")
    found = f"{library} is built for CUDA {major}, {_driver(facts)} runs up to {facts.driver_cuda}"
    cause = f"CUDA {major} needs driver {DRIVER_FOR_CUDA.get(major, 'of a newer release')} or newer"
    if facts.jetson:
        return problem(
            found,
            "a Jetson's driver is part of JetPack",
            f"install the build for CUDA {newest}, or flash a JetPack with CUDA {major}",
        )
    return problem(found, cause, f"update the driver, or install {library} for CUDA {newest}")


def _capability(facts: Facts) -> Finding | None:
    """Checks the compute capability for TensorRT. The support matrix of TensorRT 10.1
    still lists 7.0, so a Volta with TensorRT 10.x gets only a warning.
    """
    if not facts.devices or max(gpu.capability for gpu in facts.devices) >= LEAST_CAPABILITY:
        return None
    gpu = facts.devices[0]
    found = (
        f"{gpu.name} has compute capability {gpu.capability[0]}.{gpu.capability[1]}, too old for "
        f"current TensorRT"
    )
    version = numbers(str(facts.probes["tensorrt"].values.get("version", "")))
    if gpu.capability >= (7, 0) and version[:1] == (10,):
        return warning(
            found,
            "newer versions of TensorRT need 7.5 (Turing) or higher",
            "keep this TensorRT version if it builds engines",
        )
    return problem(
        found, "TensorRT needs 7.5 (Turing) or higher", "use another GPU, or the CPU: --target cpu"
    )


def _rtx_capability(facts: Facts) -> Finding | None:
    if not facts.devices or any(gpu.capability in RTX_CAPABILITIES for gpu in facts.devices):
        return None
    gpu = facts.devices[0]
    found = (
        f"{gpu.name} has compute capability {gpu.capability[0]}.{gpu.capability[1]}, which "
        f"TensorRT-RTX does not support"
    )
    cause = (
        "TensorRT-RTX supports only RTX GPUs: 8.6 (Ampere), 8.9 (Ada), 12.0 and 12.1 (Blackwell)"
    )
    return problem(found, cause, "use --target tensorrt, --target cuda or --target cpu")


def _nvml(facts: Facts) -> Finding | None:
    """Checks for nvidia-ml-py. Jetsons do not need it, because their power is read from
    the power rails.
    """
    if not facts.devices or facts.jetson or "nvidia-ml-py" in facts.packages:
        return None
    return warning(
        "nvidia-ml-py is not installed",
        "infmllm-bench needs it to read energy, memory and throttling of the GPU",
        "pip install nvidia-ml-py",
    )


CHECKS = (
    Check("gpu", _GPU, _gpu),
    Check("gpu unused", _GPU, _unused),
    Check("compute capability", (TENSORRT,), _capability),
    Check("rtx capability", (RTX,), _rtx_capability),
    Check("nvml", _GPU, _nvml),
)
