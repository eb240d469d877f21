"""The performance goals for a GPU, as data, and the figures of a report that decide
whether they are met.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tests.gpu.record import MEASURED, Report, Row
from tests.gpu.settings import COMPILED, FLOAT, OURS, TARGETS

__all__ = ["GOALS", "Goal", "Result", "decode_share", "median_ratio", "results"]

MET, MISSED, UNKNOWN = "met", "missed", "not measured"
Value = Callable[[Report, Row], float | None]


def median_ratio(row: Row, above: tuple[str, str], below: tuple[str, str]) -> float | None:
    """Returns the median ratio of two contender stages over rounds, each ratio within
    one round. The stage "first" is image and prompt together. Returns None if a
    contender is missing.
    """
    contenders = row.values.get("contenders", {})
    if above[0] not in contenders or below[0] not in contenders:
        return None
    pairs = zip(*(_stage(contenders[name], stage) for name, stage in (above, below)), strict=True)
    return statistics.median(over / under for over, under in pairs)


def _stage(times: dict[str, list[float]], stage: str) -> list[float]:
    return (
        [a + b for a, b in zip(times["vision"], times["prefill"], strict=True)]
        if stage == "first"
        else times[stage]
    )


def decode_share(report: Report, row: Row) -> float | None:
    """Returns the share of the copy bound that decoding reaches; 1 is the bound.

    It is the time to read the bytes of a decode step at the copy rate, divided by the
    measured step time. Returns None if a figure is missing.
    """
    found = report.find("bandwidth")
    proved, times = report.find("parity", *row.key[1:]), row.values.get("contenders", {}).get(OURS)
    if (
        found is None
        or found.outcome != MEASURED
        or not times
        or proved is None
        or "work" not in proved.values
    ):
        return None
    work = proved.values["work"]
    read = work["decoder_weight_bytes"] + work["rows"] * work["cache_row_bytes"]
    return float(read / (found.values["gbs"] * 1e9) / (statistics.median(times["step"]) * 1e-3))


@dataclass(frozen=True)
class Goal:
    """A bound on a figure of a "rounds" row, for some models and schemes. It is a
    minimum if `least` is true, else a maximum.
    """

    name: str
    models: tuple[str, ...]
    schemes: tuple[str, ...]
    bound: float
    least: bool
    value: Value


GOALS: tuple[Goal, ...] = (
    Goal(
        "decode, of the copy bound",
        ("edge", "7b"),
        ("fp16", "int8-weights"),
        0.7,
        True,
        decode_share,
    ),
    Goal(
        *("decode, times PyTorch compiled", ("edge", "7b"), ("fp16", "int8-weights"), 1.3, True),
        lambda report, row: median_ratio(row, (COMPILED, "step"), (OURS, "step")),
    ),
    Goal(
        *("vision, times its own fp16", ("edge", "7b"), ("int8",), 1.2, True),
        lambda report, row: median_ratio(row, (FLOAT, "vision"), (OURS, "vision")),
    ),
    Goal(
        *(
            "first token, of PyTorch compiled's",
            ("7b",),
            ("fp16", "int8-weights", "int8"),
            0.8,
            False,
        ),
        lambda report, row: median_ratio(row, (OURS, "first"), (COMPILED, "first")),
    ),
)


@dataclass(frozen=True)
class Result:
    """The result of one goal for one engine: the measured figure, and whether the goal
    was met, missed or not measured, with the reason.
    """

    goal: str
    model: str
    target: str
    scheme: str
    wanted: str
    found: float | None
    outcome: str
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns the result as a JSON-ready dict."""
        return asdict(self)


def results(report: Report) -> list[Result]:
    """Returns the results of all goals on all targets. The cuda target has no vision
    goal, because its int8 leaves the tower in fp16.
    """
    return [_judge(report, goal, *place) for goal in GOALS for place in _places(goal)]


def _places(goal: Goal) -> Iterator[tuple[str, str, str]]:
    for model in goal.models:
        for target in TARGETS:
            for scheme in goal.schemes:
                if not (target == "cuda" and goal.name.startswith("vision")):
                    yield model, target, scheme


def _judge(report: Report, goal: Goal, model: str, target: str, scheme: str) -> Result:
    wanted, row = (
        f"{'≥' if goal.least else '≤'} {goal.bound:g}",
        report.find("rounds", model, target, scheme),
    )
    found = goal.value(report, row) if row and row.outcome == MEASURED else None
    if found is None:
        row = row or report.find("parity", model, target, scheme)
        reason = (
            "not run"
            if row is None
            else row.reason
            or "; ".join(row.values.get("absent", {}).values())
            or "its bound was not measured"
        )
        return Result(goal.name, model, target, scheme, wanted, None, UNKNOWN, reason)
    met = found >= goal.bound if goal.least else found <= goal.bound
    return Result(goal.name, model, target, scheme, wanted, found, MET if met else MISSED)
