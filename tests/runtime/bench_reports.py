"""Helpers shared by `test_bench.py` and `test_bench_reports.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from runtime.bench.measure import BenchOptions, measure
from runtime.bench.report import (
    STAGES,
    AnswerTimes,
    Report,
)

ANSWERS = 8


@pytest.fixture(scope="module")
def report(built: Callable[[str], Path]) -> Report:
    return measure(
        BenchOptions(built("fp32"), repetitions=ANSWERS, warmup=1, new_tokens=6, threads=1)
    )


def answer(
    total: float = 40.0, steps: tuple[float, ...] = (2.0, 2.0, 4.0), vision: float = 20.0
) -> AnswerTimes:
    stages = dict(zip(STAGES, (1.0, 2.0, vision, 5.0), strict=True))
    return AnswerTimes(stages, 9.0 + vision, total, steps, len(steps) + 1)


def with_answers(report: Report, *answers: AnswerTimes) -> Report:
    return replace(report, answers=answers)
