"""Goals of a GPU: met, missed and not measured, from figures worked out by hand; and
rounds whose contenders fail.
"""

from __future__ import annotations

import pytest

from tests.gpu.goals import GOALS, Result, decode_share, median_ratio, results
from tests.gpu.page import report_page
from tests.gpu.record import ABSENT, MEASURED, PASSED, Report, Row
from tests.gpu.rounds import interleaved
from tests.gpu.settings import COMPILED, FLOAT, OURS
from tests.gpu.sides import Broken

GPU = {"gpus": [{"name": "NVIDIA L4", "capability": "8.9", "memory_mb": 24000.0}], "packages": {}}
WORK = {"decoder_weight_bytes": 2_000_000_000, "cache_row_bytes": 1_000_000, "rows": 100}


def report(model: str, target: str, scheme: str, **contenders: dict[str, list[float]]) -> Report:
    """Copies at 300 GB/s, so that a step's 2.1 GB take 7 ms."""
    rows = (
        Row("bandwidth", "", "", "", MEASURED, values={"gbs": 300.0}),
        Row("parity", model, target, scheme, PASSED, values={"work": WORK}),
        Row(
            "rounds",
            model,
            target,
            scheme,
            MEASURED,
            values={"contenders": contenders, "absent": {}},
        ),
    )
    return Report(GPU, ({"command": "c", "commit": "", "started": ""},), rows)


def times(vision: float, prefill: float, *step: float) -> dict[str, list[float]]:
    return {"vision": [vision] * len(step), "prefill": [prefill] * len(step), "step": list(step)}


def of(found: Report, name: str, *place: str) -> Result:
    return next(
        goal
        for goal in results(found)
        if goal.goal.startswith(name) and (goal.model, goal.target, goal.scheme) == place
    )


def test_decode_is_held_against_copies_and_pytorch() -> None:
    found = report(
        "edge",
        "cuda",
        "fp16",
        **{OURS: times(1, 1, 8.0, 8.75, 9.5), COMPILED: times(1, 1, 12.0, 11.0, 9.5)},
    )
    row = found.find("rounds", "edge", "cuda", "fp16")
    assert row and decode_share(found, row) == pytest.approx(0.8)
    assert median_ratio(row, (COMPILED, "step"), (OURS, "step")) == pytest.approx(11.0 / 8.75)
    share, faster = (
        of(found, "decode, of", "edge", "cuda", "fp16"),
        of(found, "decode, times", "edge", "cuda", "fp16"),
    )
    assert (share.outcome, share.wanted, share.found) == ("met", "≥ 0.7", pytest.approx(0.8))
    assert (
        faster.outcome == "missed"
        and of(found, "decode, of", "7b", "cuda", "fp16").reason == "not run"
    )
    assert "missed" in report_page(found) and "0.8" in report_page(found)


def test_vision_and_first_token() -> None:
    found = report(
        "7b",
        "rtx",
        "int8",
        **{OURS: times(10, 10, 1.0), FLOAT: times(12, 10, 1.0), COMPILED: times(15, 10.1, 1.0)},
    )
    assert of(found, "vision", "7b", "rtx", "int8").outcome == "met"
    first = of(found, "first token", "7b", "rtx", "int8")
    assert (
        first.outcome == "met"
        and first.found == pytest.approx(20 / 25.1)
        and first.wanted == "≤ 0.8"
    )
    assert not any(
        goal.target == "cuda" and goal.goal.startswith("vision") for goal in results(found)
    ), "its int8 leaves the tower in fp16"


def test_what_was_not_measured_says_why() -> None:
    absent = Report(GPU, (), (Row("parity", "edge", "rtx", "fp16", ABSENT, "no plugin"),))
    assert of(absent, "decode, of", "edge", "rtx", "fp16").reason == "no plugin"
    bare = report("edge", "cuda", "fp16", **{OURS: times(1, 1, 8.0)})
    assert of(bare, "decode, times", "edge", "cuda", "fp16").outcome == "not measured"
    unbound = Report(GPU, (), tuple(row for row in bare.rows if row.part != "bandwidth"))
    assert of(unbound, "decode, of", "edge", "cuda", "fp16").outcome == "not measured"
    assert {goal.bound for goal in GOALS} == {0.7, 1.3, 1.2, 0.8}


def test_rounds_take_turns_and_drop_who_fails() -> None:
    asked: list[str] = []

    def contender(name: str, fails_at: int = 99) -> dict[str, float]:
        asked.append(name)
        if asked.count(name) == fails_at:
            raise Broken(f"{name} died")
        return {"step": float(asked.count(name))}

    found = interleaved(
        {"a": lambda: contender("a"), "b": lambda: contender("b", 3), "c": lambda: contender("c")},
        3,
    )
    assert "".join(asked) == "abc" + "cba" + "abc" + "ca"
    assert found == {
        "contenders": {"a": {"step": [2.0, 3.0, 4.0]}, "c": {"step": [2.0, 3.0, 4.0]}},
        "absent": {"b": "b died"},
        "broken": ["b"],
    }
