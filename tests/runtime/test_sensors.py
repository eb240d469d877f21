"""What the latency report reads from a machine: power, heat and hardware, on recorded
output and folders that look like a system's.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.hardware.machine import read_machine
from runtime.hardware.nvidia import Nvidia
from runtime.hardware.power import (
    Integrator,
    Rapl,
    counted_rails,
    ina_rails,
    measure_energy,
    open_ina,
)
from runtime.hardware.readings import Thermal
from runtime.hardware.tegrastats import Tegrastats, parse_line
from runtime.hardware.thermal import ThermalWatch

# Lines as tegrastats prints them: Orin Nano and Orin NX (JetPack 6), AGX Orin (JetPack 5), TX2
# (JetPack 4: no units), AGX Xavier (JetPack 5).
TEGRASTATS = {
    "02-11-2025 09:14:02 RAM 3417/7620MB (lfb 12x4MB) SWAP 0/8192MB (cached 0MB) CPU "
    "[18%@1510,22%@1510,9%@1510,31%@1510,off,off] EMC_FREQ 41%@2133 "
    "GR3D_FREQ 87%@[611] NVDEC off NVJPG off VIC off OFA off APE 200 cpu@51.843C soc2@50.375C "
    "soc0@50.906C gpu@53.281C tj@53.281C soc1@51.093C "
    "VDD_IN 9216mW/7742mW VDD_CPU_GPU_CV 3560mW/2411mW VDD_SOC 2456mW/2198mW": (
        {"VDD_IN": 9.216, "VDD_CPU_GPU_CV": 3.56, "VDD_SOC": 2.456},
        9.216,
    ),
    "05-15-2025 18:30:28 RAM 6982/7620MB (lfb 5x1MB) SWAP 2640/16384MB (cached 202MB) CPU "
    "[97%@1984,88%@1984,93%@247] EMC_FREQ 18%@3199 "
    "GR3D_FREQ 84%@[713] NVENC 1%@115 APE 174 cpu@65.562C tj@65.562C VDD_IN 17946mW/15710mW "
    "VDD_CPU_GPU_CV 8896mW/7585mW VDD_SOC 3923mW/3515mW": (
        {"VDD_IN": 17.946, "VDD_CPU_GPU_CV": 8.896, "VDD_SOC": 3.923},
        17.946,
    ),
    "RAM 13983/62780MB (lfb 424x4MB) SWAP 126/31390MB (cached 0MB) CPU [90%@2201,100%@2201] "
    "EMC_FREQ 1%@2133 GR3D_FREQ 14%@[407,407] VIC_FREQ 115 "
    "APE 174 CV0@73.625C CPU@77.281C tj@77.281C VDD_GPU_SOC 3150mW/2971mW VDD_CPU_CV "
    "14312mW/12415mW VIN_SYS_5V0 4968mW/5048mW NC 0mW/0mW "
    "VDDQ_VDD2_1V8AO 1091mW/1091mW NC 0mW/0mW": (
        {"VDD_GPU_SOC": 3.15, "VDD_CPU_CV": 14.312, "VIN_SYS_5V0": 4.968, "VDDQ_VDD2_1V8AO": 1.091},
        22.43,
    ),
    "RAM 3276/7859MB (lfb 5x4MB) SWAP 1626/12122MB (cached 181MB) CPU [44%@1421,8%@1240] EMC_FREQ "
    "1%@1866 GR3D_FREQ 0%@114 APE 150 MTS fg 1% bg 1% "
    "PLL@42.5C PMIC@50C VDD_SYS_GPU 182/182 VDD_SYS_SOC 730/730 VDD_4V0_WIFI 0/0 VDD_IN 5297/5297 "
    "VDD_SYS_CPU 1917/1917 VDD_SYS_DDR 1241/1241": (
        {
            "VDD_SYS_GPU": 0.182,
            "VDD_SYS_SOC": 0.73,
            "VDD_4V0_WIFI": 0.0,
            "VDD_IN": 5.297,
            "VDD_SYS_CPU": 1.917,
            "VDD_SYS_DDR": 1.241,
        },
        5.297,
    ),
    "RAM 2500/31918MB (lfb 6000x4MB) CPU [1%@1190,off,off] AO@38C GPU 311mW/300mW CPU 622mW/600mW "
    "SOC 933mW/933mW CV 0mW/0mW VDDRQ 155mW/155mW "
    "SYS5V 1368mW/1368mW": (
        {"GPU": 0.311, "CPU": 0.622, "SOC": 0.933, "CV": 0.0, "VDDRQ": 0.155, "SYS5V": 1.368},
        3.389,
    ),
}


@pytest.mark.parametrize("line", TEGRASTATS)
def test_tegrastats_lines(line: str) -> None:
    rails, total = TEGRASTATS[line]
    assert parse_line(line) == pytest.approx(rails) and set(parse_line(line)) == set(rails)
    assert sum(parse_line(line)[rail] for rail in counted_rails(rails)) == pytest.approx(total)
    assert parse_line("tegrastats: permission denied") == {}


def test_tegrastats_runs_until_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "tegrastats"
    program.write_text(
        f"#!{sys.executable}\nimport time\nwhile True:\n    print('RAM 1/2MB VDD_IN 4000mW/1mW', "
        f"flush=True)\n    time.sleep(0.02)\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    source = Tegrastats.open()
    assert source is not None
    started = source.joules().get("VDD_IN", 0.0)
    time.sleep(0.25)
    counted = source.joules()["VDD_IN"] - started
    source.close()
    assert 0.8 < counted < 40 and source._process.returncode is not None
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert Tegrastats.open() is None


def write(root: Path, **files: object) -> None:
    for name, value in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")


def test_ina_rails(tmp_path: Path) -> None:
    assert ina_rails(tmp_path) == {} and open_ina(tmp_path) is None
    monitor = tmp_path / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3"
    for channel, (label, volts, amperes) in enumerate(
        (("VDD_GPU_SOC", 20000, 500), ("VDD_CPU_CV", 19000, 100), ("NC", 0, 0)), start=1
    ):
        write(
            monitor,
            **{
                f"in{channel}_label": label,
                f"in{channel}_input": volts,
                f"curr{channel}_input": amperes,
            },
        )
    write(
        tmp_path / "sys/bus/i2c/drivers/ina3221/1-0041/hwmon/hwmon4",
        in2_label="VDDQ_VDD2_1V8AO",
        in2_input=5000,
        curr2_input="",
    )
    assert ina_rails(tmp_path) == pytest.approx({"VDD_GPU_SOC": 10.0, "VDD_CPU_CV": 1.9})
    source = open_ina(tmp_path)
    assert source is not None
    before, started = source.joules(), time.monotonic()
    time.sleep(0.2)
    after, seconds = source.joules(), time.monotonic() - started
    source.close()
    assert after["VDD_GPU_SOC"] - before["VDD_GPU_SOC"] == pytest.approx(10.0 * seconds, rel=0.2)


def test_rapl_counts_across_its_range(tmp_path: Path) -> None:
    assert Rapl.open(tmp_path) == "no RAPL counters"
    zones = tmp_path / "sys/class/powercap"
    write(
        zones / "intel-rapl:0",
        name="package-0",
        energy_uj=9_000_000,
        max_energy_range_uj=10_000_000,
    )
    write(zones / "intel-rapl:0:0", name="core", energy_uj=1, max_energy_range_uj=10_000_000)
    write(zones / "intel-rapl:0:1", name="dram", energy_uj=0, max_energy_range_uj=10_000_000)
    rapl = Rapl.open(tmp_path)
    assert isinstance(rapl, Rapl) and rapl.joules() == {"package-0": 0.0, "dram-0": 0.0}
    write(zones / "intel-rapl:0", energy_uj=2_000_000)
    write(zones / "intel-rapl:0:1", energy_uj=500_000)
    assert rapl.joules() == pytest.approx({"package-0": 3.0, "dram-0": 0.5}) and counted_rails(
        rapl.joules()
    ) == ("package-0", "dram-0")
    (zones / "intel-rapl:0/energy_uj").write_text("")
    assert "chmod" in str(Rapl.open(tmp_path))


class Clockwork:
    """A source whose joules are what the answers below used."""

    name = "clockwork"
    spent = 0.0

    def joules(self) -> dict[str, float]:
        return {"VDD_IN": self.spent, "VDD_SOC": self.spent / 4}

    def close(self) -> None:
        """Nothing runs."""


def test_energy_is_split_into_image_and_token() -> None:
    source = Clockwork()

    def ask(limit: int) -> int:
        source.spent += 3.0 + 0.5 * (min(limit, 9) - 1)
        time.sleep(0.01)
        return min(limit, 9)

    energy = measure_energy([source], ask, 30, seconds=0.05)
    assert energy.joules_per_image == pytest.approx(
        3.0
    ) and energy.joules_per_token == pytest.approx(0.5)
    assert (
        energy.idle_w == 0
        and energy.counted == ("VDD_IN",)
        and energy.rails_w["VDD_SOC"] == pytest.approx(energy.power_w / 4)
    )
    assert measure_energy([source], lambda limit: 1, 30, seconds=0.01).joules_per_token is None


def test_an_integrator_counts_each_reading_until_the_next() -> None:
    def readings() -> Iterator[dict[str, float]]:
        for watts in itertools.chain((8.0,), itertools.repeat(2.0)):
            yield {"a": watts}
            time.sleep(0.1)

    source = Integrator("test", readings())
    time.sleep(0.4)
    joules = source.joules()["a"]
    source.close()
    assert 1.0 < joules < 3.0  # 0.8 of the first tenth, 0.6 of the rest


def fake_nvml(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> None:
    class NVMLError(Exception):
        pass

    def fail(*_: Any) -> Any:
        raise NVMLError("Not Supported")

    module: Any = types.ModuleType("pynvml")
    module.NVMLError = NVMLError
    for name in ("nvmlInit", "nvmlShutdown"):
        setattr(module, name, lambda *_: None)
    for name, value in {
        "nvmlDeviceGetHandleByIndex": "gpu",
        "nvmlSystemGetDriverVersion": "580.1",
        **answers,
    }.items():
        setattr(
            module,
            name,
            fail
            if value is None
            else lambda *_, value=value: value() if callable(value) else value,
        )
    monkeypatch.setitem(sys.modules, "pynvml", module)


def test_nvml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "not installed" in str(Nvidia.open())
    fake_nvml(monkeypatch, nvmlDeviceGetHandleByIndex=None)
    assert "finds no GPU (Not Supported)" in str(Nvidia.open())
    energy = itertools.count(5000, 1500)
    process = types.SimpleNamespace(pid=os.getpid(), usedGpuMemory=3_000_000)
    other = types.SimpleNamespace(pid=-1, usedGpuMemory=9_000_000)
    fake_nvml(
        monkeypatch,
        nvmlDeviceGetTotalEnergyConsumption=lambda: next(energy),
        nvmlDeviceGetName=b"Orin",
        nvmlDeviceGetComputeRunningProcesses=[other, process],
        nvmlDeviceGetCurrentClocksThrottleReasons=0x1 | 0x20,
    )
    gpu = Nvidia.open()
    assert isinstance(gpu, Nvidia) and gpu.counts_energy and gpu.joules() == {"gpu": 1.5}
    assert (gpu.facts().name, gpu.facts().driver, gpu.facts().memory_mb) == ("Orin", "580.1", 3.0)
    watch = ThermalWatch(tmp_path, gpu)
    watch.look()
    assert watch.finish().gpu_reasons == ("software thermal slowdown",)
    fake_nvml(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=None, nvmlDeviceGetPowerUsage=None)
    silent = Nvidia.open()
    assert (
        isinstance(silent, Nvidia)
        and not silent.counts_energy
        and silent.facts().memory_mb is None
        and silent.reasons() == set()
    )


def test_thermal_signs(tmp_path: Path) -> None:
    assert ThermalWatch(tmp_path).finish() == Thermal(None, (), None, {}, ())
    cpu = tmp_path / "sys/devices/system/cpu"
    for core in (0, 1):
        write(cpu / f"cpu{core}/thermal_throttle", core_throttle_count=4, package_throttle_count=0)
        write(
            cpu / f"cpufreq/policy{core}",
            scaling_cur_freq=1_000_000 * (core + 1),
            cpuinfo_max_freq=3_000_000,
        )
    zones = tmp_path / "sys/class/thermal"
    for number, (kind, degrees) in enumerate(
        (("cpu-thermal", 40000), ("cv0-thermal", -256000), ("cpu-thermal", 41000))
    ):
        write(zones / f"thermal_zone{number}", type=kind, temp=degrees)
    watch = ThermalWatch(tmp_path)
    watch.look()
    write(cpu / "cpu1/thermal_throttle", core_throttle_count=6)
    write(zones / "thermal_zone0", temp=55500)
    found = watch.finish()
    assert (
        found.throttle_events == 2
        and found.clock_mhz == (1500.0,)
        and found.max_clock_mhz == 3000.0
    )
    assert found.temperature_c == {
        "cpu-thermal": (40.0, 55.5),
        "cpu-thermal thermal_zone2": (41.0, 41.0),
    }


def test_machines_are_told_by_their_files(tmp_path: Path) -> None:
    write(
        tmp_path / "proc",
        cpuinfo="processor : 0\nFeatures : fp asimd asimddp i8mm\nCPU part : 0xd42",
        meminfo="MemTotal:        7802880 kB",
    )
    (tmp_path / "proc/device-tree").mkdir()
    (tmp_path / "proc/device-tree/model").write_bytes(b"NVIDIA Jetson Orin Nano Developer Kit\0")
    write(tmp_path / "sys/devices/system/cpu/cpu0/cache/index2", level=2, size="256K")
    write(tmp_path / "sys/devices/system/cpu/cpu0/cache/index3", level=3, size="2M")
    found = read_machine(tmp_path)
    assert (
        found.board == "NVIDIA Jetson Orin Nano Developer Kit"
        and "0xd42" in found.cpu
        and found.isa == ("asimd", "asimddp", "i8mm")
    )
    assert found.memory_mb == pytest.approx(7990.149) and found.last_cache_mb == pytest.approx(
        2.097152
    )
    here = read_machine()
    assert here.cpu and here.memory_mb > 100
