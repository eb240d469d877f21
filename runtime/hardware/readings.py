"""What sensors report during a run: energy, the GPU, and signs of throttling."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Energy", "Gpu", "Thermal"]


@dataclass(frozen=True)
class Energy:
    """Mean watts per rail while answering, which of them the total counts, watts at
    rest, joules to the first token and per further token.
    """

    source: str
    rails_w: dict[str, float]
    counted: tuple[str, ...]
    idle_w: float
    power_w: float
    joules_per_image: float
    joules_per_token: float | None
    answers: int


@dataclass(frozen=True)
class Gpu:
    """The GPU's name, driver, and the MB (10^6 bytes) this process held on it; None
    where the driver does not tell processes apart.
    """

    name: str
    driver: str
    memory_mb: float | None


@dataclass(frozen=True)
class Thermal:
    """Signs of throttling: events counted by the CPU, its clock in MHz after each
    answer, degrees Celsius before and after, the GPU's own reasons.
    """

    throttle_events: int | None
    clock_mhz: tuple[float, ...]
    max_clock_mhz: float | None
    temperature_c: dict[str, tuple[float, ...]]
    gpu_reasons: tuple[str, ...]
