"""Computes the figures of a report from its raw times: percentiles per stage, and the
metrics that reports and comparisons use.

A metric has a name, a unit, a better direction, a value, and usually one value per
answer. The spread of the values per answer gives the metric's noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.bench.report import STAGES, AnswerTimes, Report

__all__ = [
    "METRICS",
    "Metric",
    "drift_percent",
    "noise_percent",
    "quarters",
    "stage_times",
    "summary",
    "throttling",
]

_DRIFT, _LEAST_ANSWERS = (
    10.0,
    8,
)  # drift in percent that is reported; fewest answers that are split into quarters

Values = Callable[[Report], float | None]
Each = Callable[[AnswerTimes], float]


@dataclass(frozen=True)
class Metric:
    """One figure. `each` gives its value for a single answer, and `percent` is the
    percentile over answers. `each` is None if the figure is measured only once.
    """

    name: str
    unit: str
    higher_is_better: bool
    help: str
    value: Values
    each: Each | None = None
    percent: float = 50


def _steps(report: Report) -> list[float]:
    return [step for answer in report.answers for step in answer.step_ms]


def _percentile(values: Sequence[float], percent: float) -> float | None:
    return float(np.percentile(values, percent)) if values else None


def _other(answer: AnswerTimes) -> float:
    """Returns the rest of the time to first text: reading token embeddings, decoding
    text, and steps whose token showed no text.
    """
    return max(0.0, answer.ttft_ms - sum(answer.stages_ms.values()))


def _over_answers(name: str, help: str, each: Each, percent: float = 50) -> Metric:
    return Metric(
        name,
        "ms",
        False,
        help,
        lambda report: _percentile([each(answer) for answer in report.answers], percent),
        each,
        percent,
    )


def _stage(name: str, help: str) -> Metric:
    return _over_answers(name, help, lambda answer: answer.stages_ms[name])


def _inter_token(percent: float) -> Metric:
    def each(answer: AnswerTimes) -> float:
        return _percentile(answer.step_ms, percent) or 0.0

    help = (
        f"time between tokens after the first, "
        f"{'median' if percent == 50 else f'{percent}th percentile'} over all steps of all "
        f"answers"
    )
    return Metric(
        f"inter_token_p{percent}",
        "ms",
        False,
        help,
        lambda report: _percentile(_steps(report), percent),
        each,
    )


def _rate(answer: AnswerTimes) -> float:
    spent = sum(answer.step_ms)
    return 1e3 * len(answer.step_ms) / spent if spent else 0.0


def _tokens_per_s(report: Report) -> float | None:
    return (
        float(np.median([_rate(answer) for answer in report.answers])) if _steps(report) else None
    )


def _images_per_s(report: Report) -> float | None:
    spent = sum(answer.total_ms for answer in report.answers)
    return 1e3 * len(report.answers) / spent if spent else None


def _of_limit(work: Values, milliseconds: Values, limit: str) -> Values:
    """Builds a function that gives work per time as a percentage of a machine limit.
    `work` is in 10^9 bytes or operations; the limit is the best of all measurements.
    """

    def value(report: Report) -> float | None:
        amount, time, reached = (
            work(report),
            milliseconds(report),
            max(getattr(limits, limit) for limits in report.limits),
        )
        return 1e2 * amount / (time * 1e-3) / reached if amount and time and reached else None

    return value


def _bytes_per_step(report: Report) -> float | None:
    """Returns the 10^9 bytes that a decode step reads: the weights, and the cache rows
    that are filled half way through the answer.
    """
    rows = (
        report.conditions.prompt_tokens
        + float(np.mean([len(answer.step_ms) for answer in report.answers])) / 2
    )
    return (report.work.decoder_weight_bytes + rows * report.work.cache_row_bytes) / 1e9


def _median_stage(name: str) -> Values:
    return lambda report: _percentile([answer.stages_ms[name] for answer in report.answers], 50)


def _flop(name: str) -> Values:
    return lambda report: float(getattr(report.work, name)) / 1e9


def _share(name: str, help: str, work: Values, time: Values, limit: str) -> Metric:
    return Metric(name, "%", True, help, _of_limit(work, time, limit))


_METRICS = (
    _over_answers("ttft", "time from image to first text, median", lambda answer: answer.ttft_ms),
    _over_answers(
        "ttft_p90",
        "time from image to first text, 90th percentile",
        lambda answer: answer.ttft_ms,
        90,
    ),
    _stage("decode_image", "decoding the image file to RGB"),
    _stage("preprocess", "resizing and normalising for the vision tower"),
    _stage("vision", "vision tower and pool-adapter"),
    _stage("prefill", "the decoder's call for the prompt"),
    _over_answers("other", "rest of ttft: token embeddings, text", _other),
    _inter_token(50),
    _inter_token(90),
    _inter_token(99),
    _over_answers("total", "time from image to last text, median", lambda answer: answer.total_ms),
    Metric(
        "tokens_per_s",
        "1/s",
        True,
        "decode steps per second of decoding, median over answers",
        _tokens_per_s,
        _rate,
    ),
    Metric(
        "images_per_s",
        "1/s",
        True,
        "complete answers per second, one after another",
        _images_per_s,
        lambda answer: 1e3 / max(answer.total_ms, 1e-9),
    ),
    Metric(
        "load",
        "ms",
        False,
        "time to open the bundle and its engine, once",
        lambda report: report.load_ms,
    ),
    Metric(
        "peak_rss_mb",
        "MB",
        False,
        "peak resident memory, without the limit and energy measurements",
        lambda report: report.peak_rss_mb,
    ),
    _share(
        "decode_of_read_limit",
        "bytes read per step / inter_token_p50, in percent of the read limit",
        _bytes_per_step,
        lambda report: _percentile(_steps(report), 50),
        "read_gbs",
    ),
    _share(
        "prefill_of_fp32_limit",
        "matrix products of the prompt, in percent of the float32 limit",
        _flop("prefill_flop"),
        _median_stage("prefill"),
        "fp32_gflops",
    ),
    _share(
        "prefill_of_int8_limit",
        "matrix products of the prompt, in percent of the 8-bit limit",
        _flop("prefill_flop"),
        _median_stage("prefill"),
        "int8_gops",
    ),
    _share(
        "vision_of_fp32_limit",
        "matrix products of the tower, in percent of the float32 limit",
        _flop("vision_flop"),
        _median_stage("vision"),
        "fp32_gflops",
    ),
    _share(
        "vision_of_int8_limit",
        "matrix products of the tower, in percent of the 8-bit limit",
        _flop("vision_flop"),
        _median_stage("vision"),
        "int8_gops",
    ),
    Metric(
        "gpu_memory_mb",
        "MB",
        False,
        "GPU memory used by this process",
        lambda report: report.gpu.memory_mb if report.gpu else None,
    ),
    Metric(
        "power_w",
        "W",
        False,
        "mean power while answering, including idle power",
        lambda report: report.energy.power_w if report.energy else None,
    ),
    Metric(
        "joules_per_image",
        "J",
        False,
        "energy up to the first token",
        lambda report: report.energy.joules_per_image if report.energy else None,
    ),
    Metric(
        "joules_per_token",
        "J",
        False,
        "energy per token after the first",
        lambda report: report.energy.joules_per_token if report.energy else None,
    ),
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _METRICS}


def noise_percent(metric: Metric, report: Report) -> float | None:
    """Returns a metric's uncertainty in plus or minus percent.

    It is half of the 95 % interval of the percentile, computed from ranks, or the
    difference between the two halves of the answers if that is larger. None if the
    metric has no value per answer or there are fewer than four answers.
    """
    if metric.each is None or len(report.answers) < 4:
        return None
    values = np.array([metric.each(answer) for answer in report.answers])
    share = metric.percent / 100
    reach = 2 * math.sqrt(share * (1 - share) / len(values))
    low, middle, high = (
        float(v)
        for v in np.quantile(values, (max(0.0, share - reach), share, min(1.0, share + reach)))
    )
    if middle <= 0:
        return None
    halves = abs(
        float(
            np.quantile(values[: len(values) // 2], share)
            - np.quantile(values[len(values) // 2 :], share)
        )
    )
    return 1e2 * max((high - low) / 2, halves) / middle


def quarters(report: Report) -> tuple[float, float] | None:
    """Returns the median milliseconds per answer in the first and the last quarter of
    the answers; None for fewer than 8 answers.
    """
    totals = [answer.total_ms for answer in report.answers]
    size = len(totals) // 4
    return (
        (float(np.median(totals[:size])), float(np.median(totals[-size:])))
        if len(totals) >= _LEAST_ANSWERS
        else None
    )


def drift_percent(report: Report) -> float | None:
    """Returns how much slower the last quarter of answers is than the first, in
    percent.
    """
    found = quarters(report)
    return 1e2 * (found[1] / found[0] - 1) if found and found[0] else None


def throttling(report: Report) -> str:
    """Returns one sentence that says whether the machine slowed down during the
    measurement, and the evidence.
    """
    thermal, drift = report.thermal, drift_percent(report)
    counted = (
        "this CPU has no throttling counters"
        if thermal.throttle_events is None
        else f"{thermal.throttle_events} throttle events of the CPU"
    )
    drifted = (
        "too few answers for a trend"
        if drift is None
        else f"last quarter of answers {drift:+.1f} % against the first"
    )
    facts = [
        drifted,
        counted,
        *([f"GPU: {', '.join(thermal.gpu_reasons)}"] if thermal.gpu_reasons else []),
    ]
    hot = bool(thermal.throttle_events or thermal.gpu_reasons)
    verdict = (
        "throttled"
        if hot
        else "slowed down (heat, or other programs)"
        if drift is not None and drift > _DRIFT
        else "no throttling noticed"
    )
    return f"{verdict}: {'; '.join(facts)}"


def stage_times(report: Report) -> dict[str, dict[str, float]]:
    """Returns p50, p90, p99 and best milliseconds of every stage, in the order of the
    stages. `inter_token` is present only if there are decode steps.
    """
    rows: dict[str, list[float]] = {
        name: [answer.stages_ms[name] for answer in report.answers] for name in STAGES
    }
    rows["other"] = [_other(answer) for answer in report.answers]
    rows["ttft"] = [answer.ttft_ms for answer in report.answers]
    if steps := _steps(report):
        rows["inter_token"] = steps
    rows["total"] = [answer.total_ms for answer in report.answers]
    return {
        name: {f"p{p}": float(np.percentile(values, p)) for p in (50, 90, 99)}
        | {"best": min(values)}
        for name, values in rows.items()
    }


def summary(report: Report) -> dict[str, object]:
    """Returns every figure, for readers of the JSON file who do not want to compute
    them: stages, metrics (null if not measured) and a sentence on throttling.
    """
    return {
        "stages_ms": stage_times(report),
        "metrics": {name: metric.value(report) for name, metric in METRICS.items()},
        "throttling": throttling(report),
    }
