"""A latency report as data: the raw times of every answer and their conditions, stored
as versioned JSON.

Everything shown (percentiles, rates, fractions, plots, differences) is computed from
these values, so old reports can still be shown and compared.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from runtime.contract.errors import DataError, kind_name
from runtime.hardware.machine import Machine
from runtime.hardware.readings import Energy, Gpu, Thermal

__all__ = [
    "FORMAT",
    "STAGES",
    "VERSION",
    "AnswerTimes",
    "BundleFacts",
    "Conditions",
    "Limits",
    "Report",
    "Work",
    "parse_report",
    "read_report",
    "to_json",
]

FORMAT, VERSION = "infmllm-bench", 1
STAGES = ("decode_image", "preprocess", "vision", "prefill")
_MAX_BYTES = 256 << 20
_LARGEST = 1e18  # upper bound of every number in a report

T = TypeVar("T")


@dataclass(frozen=True)
class AnswerTimes:
    """The times of one answer in milliseconds: of each stage before the first token, to
    the first text, to the end, and of every later decode step.
    """

    stages_ms: dict[str, float]
    ttft_ms: float
    total_ms: float
    step_ms: tuple[float, ...]
    tokens: int


@dataclass(frozen=True)
class BundleFacts:
    """The measured bundle; `manifest_sha256` distinguishes bundles of the same name."""

    name: str
    model: str
    target: str
    schemes: dict[str, str]
    verdict: str
    manifest_sha256: str


@dataclass(frozen=True)
class Conditions(Machine):
    """The conditions that the figures depend on: the machine, the software and the
    question. `started` is in UTC.
    """

    cores: int
    threads: int
    python: str
    onnxruntime: str
    infmllm: str
    picture: str
    prompt: str
    prompt_tokens: int
    visual_tokens: int
    max_new_tokens: int
    repetitions: int
    warmup: int
    started: str


@dataclass(frozen=True)
class Limits:
    """The limits of this machine with the same threads: reading memory in GB/s, matrix
    products in GFLOP/s (float32) and GOP/s (8-bit).
    """

    read_gbs: float
    fp32_gflops: float
    int8_gops: float


@dataclass(frozen=True)
class Work:
    """The work of the model: bytes that a decode step reads (weights, and per cache
    row), and operations of vision tower and prefill (2 per multiplication).
    """

    decoder_weight_bytes: int
    cache_row_bytes: int
    vision_flop: float
    prefill_flop: float


@dataclass(frozen=True)
class Report:
    """One measurement. `limits` were measured before and after it. `missing` holds the
    reason for every absent part.
    """

    bundle: BundleFacts
    conditions: Conditions
    load_ms: float
    peak_rss_mb: float
    answers: tuple[AnswerTimes, ...]
    limits: tuple[Limits, ...]
    work: Work
    thermal: Thermal
    energy: Energy | None = None
    gpu: Gpu | None = None
    missing: dict[str, str] = field(default_factory=dict)


def to_json(report: Report, summary: Mapping[str, Any]) -> str:
    """Formats the report as JSON text. `summary` is for readers who want figures
    without computing them; reading a report ignores it.
    """
    return (
        json.dumps(
            {"format": FORMAT, "version": VERSION, "summary": summary, **asdict(report)}, indent=1
        )
        + "\n"
    )


def read_report(path: Path) -> Report:
    """Reads a report strictly. Raises `DataError` that names the first field that is
    missing, unknown, of the wrong type, out of range or not finite.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(
                f"{path} is larger than {_MAX_BYTES} bytes; give a file written by infmllm-bench "
                f"--json"
            )
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"cannot read {path} ({error.strerror}); give a file written by infmllm-bench --json"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not valid JSON ({error}); give a file written by infmllm-bench --json"
        ) from None
    return parse_report(data, str(path))


def parse_report(data: object, where: str) -> Report:
    """Builds a report from parsed JSON; `where` names the file in errors. Raises
    `DataError`.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise DataError(
            f'{where}: "format" is not "{FORMAT}"; give a file written by infmllm-bench --json'
        )
    version = data.get("version")
    if type(version) is not int or version != VERSION:
        raise DataError(
            f"{where}: report version is {version!r:.20}, expected {VERSION}; measure again"
        )
    report = _object(
        Report,
        {k: v for k, v in data.items() if k not in ("format", "version", "summary")},
        f"{where}: report",
    )
    if not report.answers or not report.limits:
        raise DataError(
            f"{where}: has no answers or no limits, expected at least one of each; measure again"
        )
    for index, answer in enumerate(report.answers):
        if set(answer.stages_ms) != set(STAGES):
            raise DataError(
                f"{where}: answers[{index}].stages_ms has {sorted(answer.stages_ms)}, expected "
                f"{sorted(STAGES)}; measure again"
            )
    return report


def _object(cls: type[T], value: object, where: str) -> T:
    """Builds a dataclass from an object that has exactly its fields."""
    if not isinstance(value, dict):
        raise DataError(f"{where} is {kind_name(type(value))}, expected an object; measure again")
    hints, names = get_type_hints(cls), {f.name for f in fields(cls)}  # type: ignore[arg-type]
    if names != set(value):
        raise DataError(
            f"{where} lacks {sorted(names - set(value))}, has unknown "
            f"{sorted(set(value) - names)!s:.200}; measure again"
        )
    return cls(**{name: _value(hints[name], value[name], f"{where}.{name}") for name in names})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        return None if value is None else _value(arguments[0], value, where)
    if is_dataclass(hint):
        return _object(hint, value, where)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list):
        return tuple(
            _value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)
        )
    if origin is dict and isinstance(value, dict):
        return {
            key: _value(arguments[1], item, f"{where}.{key:.40}") for key, item in value.items()
        }
    if hint is float and type(value) in (int, float) and 0 <= value <= _LARGEST:
        return float(value)
    if (hint is str and isinstance(value, str)) or (
        hint is int and type(value) is int and 0 <= value <= _LARGEST
    ):
        return value
    raise DataError(
        f"{where} is {value!r:.60}, expected {_NAMES.get(origin or hint, 'another type')}; "
        f"measure again"
    )


_NAMES = {
    float: "a number of at least 0",
    int: "a whole number of at least 0",
    str: "text",
    tuple: "a list",
    dict: "an object",
}
