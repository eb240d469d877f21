"""The latency report: measured on a real bundle, kept raw, read strictly, shown, and
compared.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from runtime.bench.limits import measure_limits
from runtime.bench.measure import bundle_work
from runtime.bench.metrics import (
    METRICS,
    drift_percent,
    noise_percent,
    stage_times,
    summary,
    throttling,
)
from runtime.bench.report import (
    STAGES,
    Limits,
    Report,
    parse_report,
    read_report,
    to_json,
)
from runtime.contract.bundle import read_bundle
from runtime.contract.errors import DataError
from runtime.hardware.probe_model import one_node_model
from runtime.hardware.readings import Thermal
from tests.runtime.bench_reports import ANSWERS, answer, report, with_answers  # noqa: F401


def test_a_report_holds_raw_times_and_conditions(report: Report) -> None:
    given = report.conditions
    assert (
        len(report.answers) == given.repetitions == ANSWERS
        and given.warmup == 1
        and given.threads == 1
    )
    for one in report.answers:
        assert set(one.stages_ms) == set(STAGES) and all(
            time > 0 for time in one.stages_ms.values()
        )
        assert 1 <= one.tokens <= 6 and len(one.step_ms) in (one.tokens - 1, one.tokens)
        assert sum(one.stages_ms.values()) < one.total_ms and one.ttft_ms <= one.total_ms
    assert (
        given.visual_tokens == 16
        and given.prompt_tokens > 16
        and given.cpu
        and report.bundle.verdict == "VERIFIED"
    )
    assert report.gpu is None and "CPU" in report.missing["GPU"]
    assert all(
        limits.read_gbs > 0 and limits.fp32_gflops > 0 and limits.int8_gops > 0
        for limits in report.limits
    )
    assert 20 < report.peak_rss_mb < 1e5


def test_a_report_survives_its_file(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(to_json(report, summary(report)))
    assert read_report(path) == report
    data = json.loads(path.read_text())
    assert (data["format"], data["version"]) == ("infmllm-bench", 1) and data["summary"]["metrics"][
        "ttft"
    ] == METRICS["ttft"].value(report)


def _edit(report: Report, *keys: str | int, value: Any) -> Any:
    data = json.loads(to_json(report, {}))
    place = data
    for key in keys[:-1]:
        place = place[key]
    if value is KeyError:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    return data


@pytest.mark.parametrize(
    ("keys", "value", "words"),
    [
        (("format",), "other", '"format" is not'),
        (("version",), 2, "version is 2"),
        (("load_ms",), "fast", "report.load_ms is 'fast'"),
        (("load_ms",), float("nan"), "load_ms is nan"),
        (("load_ms",), -1.0, "at least 0"),
        (("extra",), 1, "unknown ['extra']"),
        (("conditions", "threads"), KeyError, "lacks ['threads']"),
        (("conditions", "threads"), True, "threads is True"),
        (("answers",), [], "no answers"),
        (("answers", 2, "step_ms"), [1.0, None], "answers[2].step_ms[1] is None"),
        (("answers", 1, "stages_ms", "vision"), KeyError, "answers[1].stages_ms"),
        (("limits", 0), 7, "limits[0] is a whole number"),
    ],
)
def test_reading_is_strict(
    report: Report, keys: tuple[str | int, ...], value: Any, words: str
) -> None:
    with pytest.raises(DataError) as found:
        parse_report(_edit(report, *keys, value=value), "r.json")
    assert (
        words in str(found.value)
        and str(found.value).startswith("r.json")
        and "\n" not in str(found.value)
    )


def test_unreadable_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    for path, words in (
        (tmp_path / "a.json", "not valid JSON"),
        (tmp_path / "none.json", "cannot read"),
    ):
        with pytest.raises(DataError, match=words):
            read_report(path)


def test_figures_are_those_of_the_raw_times(report: Report) -> None:
    made = with_answers(report, *(answer(total=40.0 + i, vision=20.0 + i) for i in range(8)))
    values = {name: metric.value(made) for name, metric in METRICS.items()}
    assert values["ttft"] == 32.5 and values["vision"] == 23.5 and values["other"] == 1.0
    assert (
        values["inter_token_p50"] == 2.0
        and values["inter_token_p99"] == 4.0
        and values["tokens_per_s"] == pytest.approx(375)
    )
    assert (
        values["images_per_s"] == pytest.approx(8e3 / (8 * 43.5))
        and values["gpu_memory_mb"] is None
    )
    assert stage_times(made)["vision"] == {
        "p50": 23.5,
        "p90": pytest.approx(26.3),
        "p99": pytest.approx(26.93),
        "best": 20.0,
    }
    assert METRICS["inter_token_p50"].value(with_answers(report, answer(steps=()))) is None
    assert "inter_token" not in stage_times(with_answers(report, answer(steps=())))


def test_shares_are_work_over_time_over_the_better_limit(report: Report) -> None:
    made = replace(
        with_answers(report, answer(steps=(2.0, 2.0))),
        limits=(Limits(10, 100, 200), Limits(8, 50, 300)),
    )
    rows = report.conditions.prompt_tokens + 1
    size = report.work.decoder_weight_bytes + rows * report.work.cache_row_bytes
    assert METRICS["decode_of_read_limit"].value(made) == pytest.approx(1e2 * size / 2e-3 / 10e9)
    assert METRICS["vision_of_fp32_limit"].value(made) == pytest.approx(
        1e2 * report.work.vision_flop / 20e-3 / 100e9
    )
    assert METRICS["prefill_of_int8_limit"].value(made) == pytest.approx(
        1e2 * report.work.prefill_flop / 5e-3 / 300e9
    )


def test_work_is_counted_from_the_bundle(built: Callable[[str], Path]) -> None:
    bundle = read_bundle(built("fp32"))
    work, decoder = bundle_work(bundle, 20), bundle.spec.decoder
    assert work.decoder_weight_bytes == bundle.files["decoder.weights"][0]
    # Two layers, two heads of 16 for keys and for values, four bytes each.
    assert work.cache_row_bytes == 2 * 2 * 2 * 16 * 4
    assert (
        bundle_work(
            replace(bundle, schemes={**bundle.schemes, "cache": "fp16"}), 20
        ).cache_row_bytes
        == 2 * 2 * 2 * 16 * 2
    )
    linear = decoder.layers * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    norms = 64 + decoder.layers * 2 * 64
    assert work.prefill_flop == 2 * ((linear + norms) * 20 + 960 * 64)


def test_noise_shrinks_with_answers_and_sees_drift(report: Report) -> None:
    rng = np.random.default_rng(1)
    few, many = (
        with_answers(report, *(answer(vision=20 + v) for v in rng.normal(0, 1, count)))
        for count in (8, 800)
    )
    noise = [noise_percent(METRICS["vision"], made) for made in (few, many)]
    assert (
        noise[0] is not None and noise[1] is not None and noise[1] < noise[0] < 20 and noise[1] < 1
    )
    drifting = with_answers(report, *(answer(vision=20.0 if i < 400 else 30.0) for i in range(800)))
    assert (noise_percent(METRICS["vision"], drifting) or 0) > 30
    assert (
        noise_percent(METRICS["load"], many) is None
        and noise_percent(METRICS["vision"], with_answers(report, answer())) is None
    )


def test_throttling_is_told_by_trend_counters_and_reasons(report: Report) -> None:
    calm = replace(with_answers(report, *[answer()] * 8), thermal=Thermal(None, (), None, {}, ()))
    assert (
        drift_percent(calm) == 0
        and throttling(calm).startswith("no throttling noticed")
        and "no throttling counters" in throttling(calm)
    )
    slower = with_answers(calm, *(answer(total=40.0 if i < 6 else 50.0) for i in range(8)))
    assert (
        drift_percent(slower) == pytest.approx(25)
        and throttling(slower).startswith("slowed down")
        and "+25.0 %" in throttling(slower)
    )
    hot = replace(calm, thermal=Thermal(3, (), None, {}, ("power cap",)))
    assert (
        throttling(hot).startswith("throttled: ")
        and "3 throttle events" in throttling(hot)
        and "power cap" in throttling(hot)
    )
    assert "too few answers" in throttling(with_answers(calm, answer()))


def test_probes_are_valid_graphs() -> None:
    left, right = np.ones((2, 300), np.uint8), np.ones((300, 5), np.int8)
    model = onnx.load_model_from_string(
        one_node_model("MatMulInteger", left, right.shape, right.dtype, np.dtype(np.int32), right)
    )
    onnx.checker.check_model(model, full_check=True)
    assert np.array_equal(onnx.numpy_helper.to_array(model.graph.initializer[0]), right)
    rates = measure_limits(1, 0.0)
    assert (
        0.05 < rates.read_gbs < 1e5
        and 0.05 < rates.fp32_gflops < 1e6
        and 0.05 < rates.int8_gops < 1e7
    )
