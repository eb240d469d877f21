"""Watches for throttling while answers are timed: the CPU's counters and clock,
temperatures, and the GPU's reasons. Sensors are read only between answers.
"""

from __future__ import annotations

from pathlib import Path

from runtime.hardware.machine import read_number, read_text
from runtime.hardware.nvidia import Nvidia
from runtime.hardware.readings import Thermal

__all__ = ["ThermalWatch"]


class ThermalWatch:
    """Watches from its creation. Call `look` after every answer and `finish` at the
    end. System files are read below `root`.
    """

    def __init__(self, root: Path, gpu: Nvidia | None = None) -> None:
        self._root, self._gpu = root, gpu
        self._events, self._temperatures = self._count_events(), self._read_temperatures()
        self._clocks: list[float] = []
        self._reasons: set[str] = set()

    def look(self) -> None:
        """Records the current CPU clock and the GPU's throttling reasons."""
        clocks = [
            clock
            for clock in map(read_number, self._policies("scaling_cur_freq"))
            if clock is not None
        ]
        if clocks:
            self._clocks.append(sum(clocks) / len(clocks) / 1e3)
        if self._gpu is not None:
            self._reasons |= self._gpu.reasons()

    def finish(self) -> Thermal:
        """Returns everything that was recorded."""
        events, after = self._count_events(), self._read_temperatures()
        highest = [
            clock
            for clock in map(read_number, self._policies("cpuinfo_max_freq"))
            if clock is not None
        ]
        return Thermal(
            None if events is None or self._events is None else max(0, events - self._events),
            tuple(self._clocks),
            sum(highest) / len(highest) / 1e3 if highest else None,
            {
                zone: (before, after[zone])
                for zone, before in self._temperatures.items()
                if zone in after
            },
            tuple(sorted(self._reasons)),
        )

    def _policies(self, name: str) -> list[Path]:
        return sorted((self._root / "sys/devices/system/cpu/cpufreq").glob(f"policy*/{name}"))

    def _count_events(self) -> int | None:
        """Returns the sum of all throttle counts of cores and packages; None if the CPU
        has no counters.
        """
        paths = sorted(
            (self._root / "sys/devices/system/cpu").glob(
                "cpu[0-9]*/thermal_throttle/*_throttle_count"
            )
        )
        counts = [count for count in map(read_number, paths) if count is not None]
        return int(sum(counts)) if counts else None

    def _read_temperatures(self) -> dict[str, float]:
        """Returns degrees Celsius by zone. Values below zero come from sensors that are
        switched off, and are left out.
        """
        found: dict[str, float] = {}
        for zone in sorted((self._root / "sys/class/thermal").glob("thermal_zone*")):
            degrees, kind = read_number(zone / "temp"), read_text(zone / "type")
            if degrees is not None and degrees >= 0:
                found[f"{kind or zone.name}{'' if kind not in found else f' {zone.name}'}"] = (
                    degrees / 1e3
                )
        return found
