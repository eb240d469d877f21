"""Measures the energy of answers with the sensors of this machine: rails of a Jetson
(INA3221 or tegrastats), RAPL counters of a CPU, or a GPU through NVML.

Every source reports joules per rail, counted from the time it was opened. Energy is
measured in separate answers after the timed ones, because reading sensors would slow
the timed answers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from runtime.hardware.machine import read_number, read_text
from runtime.hardware.readings import Energy

__all__ = [
    "Integrator",
    "Rapl",
    "Source",
    "counted_rails",
    "ina_rails",
    "measure_energy",
    "open_ina",
]

_INA_PERIOD = 0.05
_IDLE_SECONDS, _LEAST_SECONDS = 0.5, 1.5
_WHOLE_MODULE = (
    "VDD_IN",
    "POM_5V_IN",
)  # the supply of the whole module: first Orin Nano and NX, Xavier NX; then Nano and TX2
_WITHIN_OTHERS = ("VDDQ_VDD2_1V8AO",)  # AGX Orin: supplied by VIN_SYS_5V0, so counted there


class Source(Protocol):
    """A source of energy readings in joules. `name` is shown to users."""

    name: str

    def joules(self) -> dict[str, float]:
        """Returns the joules per rail since this source was opened."""
        ...

    def close(self) -> None:
        """Stops reading."""
        ...


class Integrator:
    """A source that integrates power readings in its own thread. Each reading counts
    until the next one arrives.
    """

    def __init__(self, name: str, readings: Iterable[Mapping[str, float]]) -> None:
        self.name = name
        self._joules: dict[str, float] = {}
        self._watts: dict[str, float] = {}
        self._since = time.monotonic()
        self._lock, self._stopped, self._first = (
            threading.Lock(),
            threading.Event(),
            threading.Event(),
        )
        self._thread = threading.Thread(target=self._follow, args=(readings,), daemon=True)
        self._thread.start()
        self._first.wait(timeout=2.0)

    def _follow(self, readings: Iterable[Mapping[str, float]]) -> None:
        for watts in readings:
            with self._lock:
                self._count()
                self._watts = dict(watts)
            self._first.set()
            if self._stopped.is_set():
                return

    def _count(self) -> None:
        now = time.monotonic()
        for rail, watts in self._watts.items():
            self._joules[rail] = self._joules.get(rail, 0.0) + watts * (now - self._since)
        self._since = now

    def joules(self) -> dict[str, float]:
        """See `Source.joules`."""
        with self._lock:
            self._count()
            return dict(self._joules)

    def close(self) -> None:
        """See `Source.close`."""
        self._stopped.set()
        self._thread.join(timeout=1.0)


def ina_rails(root: Path) -> dict[str, float]:
    """Returns the watts of every labelled channel of the INA3221 monitors, computed as
    millivolts times milliamperes. The result is empty if there are no monitors.
    """
    found: dict[str, float] = {}
    for label in sorted(
        (root / "sys/bus/i2c/drivers/ina3221").glob("*/hwmon/hwmon*/in[123]_label")
    ):
        channel = label.name[2]
        name = read_text(label)
        volts, amperes = (
            read_number(label.with_name(f"in{channel}_input")),
            read_number(label.with_name(f"curr{channel}_input")),
        )
        if name and name != "NC" and volts is not None and amperes is not None:
            found[name] = volts * amperes * 1e-6
    return found


def open_ina(root: Path) -> Integrator | None:
    """Opens the Jetson's rails, read 20 times a second; None if there are none."""
    return Integrator("INA3221 rails", _again(lambda: ina_rails(root))) if ina_rails(root) else None


def _again(read: Callable[[], dict[str, float]]) -> Iterator[dict[str, float]]:
    while True:
        yield read()
        time.sleep(_INA_PERIOD)


class Rapl:
    """The energy counters of Intel and AMD CPU packages. Memory is included where it
    has its own counter.
    """

    name = "RAPL"

    def __init__(self, zones: Mapping[str, Path]) -> None:
        self._zones = dict(zones)
        self._last = {name: read_number(path / "energy_uj") or 0.0 for name, path in zones.items()}
        self._joules = dict.fromkeys(zones, 0.0)

    @classmethod
    def open(cls, root: Path) -> Rapl | str:
        """Opens the counters, or returns the reason why they cannot be used."""
        zones: dict[str, Path] = {}
        for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*")):
            name = read_text(zone / "name")
            if name.startswith("package"):
                zones[name] = zone
            elif name == "dram":
                zones[f"dram-{zone.name.split(':')[1]}"] = zone
        if not zones:
            return "no RAPL counters"
        if any(read_number(zone / "energy_uj") is None for zone in zones.values()):
            return (
                f"RAPL counters are not readable by this user; allow it with: chmod a+r "
                f"{next(iter(zones.values())) / 'energy_uj'}"
            )
        return cls(zones)

    def joules(self) -> dict[str, float]:
        """See `Source.joules`. A counter wraps to zero at its range, which is
        corrected.
        """
        for name, zone in self._zones.items():
            now = read_number(zone / "energy_uj") or self._last[name]
            step = now - self._last[name]
            self._joules[name] += (
                step if step >= 0 else step + (read_number(zone / "max_energy_range_uj") or -step)
            ) * 1e-6
            self._last[name] = now
        return dict(self._joules)

    def close(self) -> None:
        """See `Source.close`."""


def counted_rails(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the rails whose sum is the machine's total power: the supply of the whole
    module if present, else all rails that no other rail supplies.
    """
    names = tuple(names)
    supply = tuple(name for name in names if name in _WHOLE_MODULE)
    return supply or tuple(name for name in names if name not in _WITHIN_OTHERS)


def _window(
    sources: Iterable[Source], work: Callable[[], int]
) -> tuple[dict[str, float], float, int]:
    """Runs `work` and returns joules per rail, seconds, and the result of `work`."""
    before = {rail: joules for source in sources for rail, joules in source.joules().items()}
    started = time.monotonic()
    count = work()
    seconds = time.monotonic() - started
    after = {rail: joules for source in sources for rail, joules in source.joules().items()}
    return {rail: joules - before.get(rail, 0.0) for rail, joules in after.items()}, seconds, count


def _rest() -> int:
    time.sleep(_IDLE_SECONDS)
    return 0


def measure_energy(
    sources: list[Source],
    answer: Callable[[int], int],
    new_tokens: int,
    seconds: float = _LEAST_SECONDS,
) -> Energy:
    """Measures watts at rest and while answering, joules per image and joules per
    token. `answer(limit)` gives one answer of at most `limit` tokens and returns its
    number of tokens.

    Answers of one token give the energy per image. Whole answers then give the energy
    of further tokens. Each kind is repeated for `seconds`, at least once.
    """
    counts: list[int] = []

    def repeat(limit: int) -> int:
        until, done = time.monotonic() + seconds, 0
        while not done or time.monotonic() < until:
            counts.append(answer(limit))
            done += 1
        return done

    rest, resting, _ = _window(sources, _rest)
    first, _, images = _window(sources, lambda: repeat(1))
    counts.clear()
    whole, answering, answers = _window(sources, lambda: repeat(new_tokens))
    counted = counted_rails(whole)
    per_image = sum(first[rail] for rail in counted) / images
    further = sum(counts) / answers - 1
    per_token = (
        (sum(whole[rail] for rail in counted) / answers - per_image) / further
        if further > 0
        else -1.0
    )
    return Energy(
        source=" + ".join(source.name for source in sources),
        rails_w={rail: joules / answering for rail, joules in whole.items()},
        counted=counted,
        idle_w=sum(rest.get(rail, 0.0) for rail in counted) / resting,
        power_w=sum(whole[rail] for rail in counted) / answering,
        joules_per_image=per_image,
        joules_per_token=per_token if per_token >= 0 else None,
        answers=images + answers,
    )
