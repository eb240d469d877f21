"""Checks of a Jetson: its JetPack, whether the installed TensorRT can run on it, its
power mode and clocks, and the memory for building engines.
"""

from __future__ import annotations

from runtime.doctor.compatibility import OLDEST_TENSORRT, numbers, release
from runtime.doctor.facts import Facts
from runtime.doctor.finding import CPU, TENSORRT, Check, Finding, note, ok, problem, warning

__all__ = ["CHECKS"]

_FASTEST = ("MAXN_SUPER", "MAXN")
_SMALL_MB, _FREE_MB = 10_000, 3_000
_TENSORRT_11 = (39, 2, 2)
"""Jetson Linux version of JetPack 7.2.2, the first that runs TensorRT 11.4; JetPack 7.2
is 39.2.0 and 7.2.1 is 39.2.1. Source: NVIDIA's page "Migrating TensorRT from 10.x to
11.x on Jetson/JetPack", 11.4.1.
"""


def _jetpack(facts: Facts) -> Finding | None:
    if facts.jetson is None:
        return None
    if not facts.jetson.l4t:
        cause = "a container shows the release only if its image has /etc/nv_tegra_release"
        return note(
            f"{facts.machine.board}, JetPack unknown",
            cause,
            "also run the doctor on the device itself, outside the container",
        )
    jetpack = facts.jetpack
    if jetpack is None:
        return note(
            f"{facts.machine.board}: Jetson Linux {facts.jetson.l4t}, a JetPack this doctor does "
            f"not know"
        )
    tensorrt = facts.jetson.tensorrt or jetpack.tensorrt
    found = (
        f"{facts.machine.board}: JetPack {jetpack.name} (L4T {facts.jetson.l4t}), CUDA "
        f"{jetpack.cuda}, TensorRT {tensorrt}"
    )
    if release(tensorrt) >= OLDEST_TENSORRT:
        return ok(found)
    return problem(
        found,
        f"TensorRT {tensorrt} is too old to read the graphs of a bundle",
        "flash JetPack 6.2 or newer, or use --target cpu",
    )


def _tensorrt_on_jetson(facts: Facts) -> Finding | None:
    version = str(
        facts.probes["tensorrt"].values.get("version", "") or facts.packages.get("tensorrt", "")
    )
    if facts.jetson is None or not version or not facts.jetson.l4t:
        return None
    l4t = numbers(facts.jetson.l4t)
    if numbers(version) >= (11,) and l4t < _TENSORRT_11:
        fix = "pip uninstall -y tensorrt, and use JetPack's; or update to JetPack 7.2.2"
        return problem(
            f"TensorRT {version} on L4T {facts.jetson.l4t}",
            "on Jetson, TensorRT 11 needs JetPack 7.2.2 or newer",
            fix,
        )
    if l4t < (38,) and any(name.endswith("-libs") for name in facts.packages):
        cause = (
            "PyPI's TensorRT for aarch64 is the build for servers (SBSA), which does not run "
            "on an Orin before JetPack 7"
        )
        fix = (
            "pip uninstall -y tensorrt tensorrt-cu12-libs tensorrt-cu13-libs, then install the "
            "wheel that docs/jetson.md names"
        )
        return problem(f"TensorRT {version} from PyPI on L4T {facts.jetson.l4t}", cause, fix)
    return None


def _power_mode(facts: Facts) -> Finding | None:
    if facts.jetson is None or not facts.jetson.mode:
        return None
    mode, modes = facts.jetson.mode, facts.jetson.modes
    best = next(
        ((number, name) for name in _FASTEST for number, known in modes.items() if known == name),
        None,
    )
    if best is None or mode == best[1]:
        return ok(f"power mode {mode}")
    cause = "this mode limits clocks and the number of cores"
    return warning(
        f"power mode {mode}, {best[1]} is faster",
        cause,
        f"sudo nvpmodel -m {best[0]} (needs a sufficient power supply and cooling)",
    )


def _clocks(facts: Facts) -> Finding | None:
    if facts.jetson is None or facts.jetson.clocks_pinned is None:
        return None
    if facts.jetson.clocks_pinned:
        return ok("clocks are pinned at the power mode's maximum (jetson_clocks)")
    return note(
        "clocks change with the load",
        "short answers end before clocks reach their maximum, so latencies vary",
        "sudo jetson_clocks before measuring",
    )


def _memory(facts: Facts) -> Finding | None:
    """Checks memory and swap. Building an engine needs more memory than running it, and
    the GPU shares the memory.
    """
    memory = facts.memory
    if facts.jetson is None or memory.total_mb > _SMALL_MB:
        return None
    found = (
        f"{memory.available_mb / 1e3:.1f} GB of memory shared by CPU and GPU are free, swap "
        f"{memory.swap_mb / 1e3:.1f} GB"
    )
    disk = memory.swap_mb - memory.zram_mb
    if disk < 1000:
        cause = (
            "zram swap uses memory too: the system may kill the build of an engine"
            if memory.zram_mb
            else "without swap, the system may kill the build of an engine"
        )
        fix = (
            "sudo fallocate -l 8G /swapfile && sudo chmod 600 /swapfile && sudo mkswap "
            "/swapfile && sudo swapon /swapfile"
        )
        return warning(
            found, cause, f"sudo systemctl disable nvzramconfig; {fix}" if memory.zram_mb else fix
        )
    if memory.available_mb < _FREE_MB:
        return warning(
            found,
            "the desktop and other programs use the rest",
            "sudo systemctl isolate multi-user.target frees about 1 GB",
        )
    return ok(found)


CHECKS = (
    Check("jetpack", (TENSORRT,), _jetpack),
    Check("tensorrt on jetson", (TENSORRT,), _tensorrt_on_jetson),
    Check("power mode", (CPU, TENSORRT), _power_mode),
    Check("clocks", (CPU, TENSORRT), _clocks),
    Check("jetson memory", (CPU, TENSORRT), _memory),
)
