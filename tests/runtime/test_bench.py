"""The latency report: measured on a real bundle, kept raw, read strictly, shown, and
compared.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest

from runtime.bench.diff import Change, changes, different_conditions, parse_limit
from runtime.bench.html_report import report_page
from runtime.bench.limits import measure_limits
from runtime.bench.measure import BenchOptions, bundle_work, measure
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
    AnswerTimes,
    Limits,
    Report,
    parse_report,
    read_report,
    to_json,
)
from runtime.bench.tables import condition_lines, csv_table, markdown_tables
from runtime.contract.bundle import read_bundle
from runtime.contract.errors import DataError, UsageError
from runtime.hardware.probe_model import one_node_model
from runtime.hardware.readings import Energy, Thermal
from tests.runtime.test_cli import check_fault, command

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


def _edited(report: Report, *keys: str | int, value: Any) -> Any:
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
        (("limits", 0), 7, "limits[0] is int"),
    ],
)
def test_reading_is_strict(
    report: Report, keys: tuple[str | int, ...], value: Any, words: str
) -> None:
    with pytest.raises(DataError) as found:
        parse_report(_edited(report, *keys, value=value), "r.json")
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
        and "counts no throttling here" in throttling(calm)
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


def test_tables(report: Report) -> None:
    stages, metrics = csv_table(report).split("\n\n")
    rows = list(csv.DictReader(io.StringIO(stages)))
    assert [row["stage"] for row in rows][:5] == [*STAGES, "other"] and float(
        rows[2]["p50_ms"]
    ) == pytest.approx(METRICS["vision"].value(report), abs=1e-4)
    figures = {row["metric"]: row for row in csv.DictReader(io.StringIO(metrics))}
    assert (
        set(figures) == set(METRICS)
        and figures["gpu_memory_mb"]["value"] == ""
        and float(figures["load"]["value"]) > 0
    )
    text = markdown_tables(report)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert (
        all(line.count("|") in (6, 5) for line in lines)
        and "| `joules_per_token` | – | J |" in text
    )
    conditions = "\n".join(condition_lines(report))
    assert (
        f"{ANSWERS} answers after 1 to warm up" in conditions
        and "GPU not available: the bundle runs on the CPU" in conditions
    )


def plots(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_the_page_is_well_formed_and_fetches_nothing(report: Report) -> None:
    bundle = replace(report.bundle, name="<b>&'\"", verdict="UNVERIFIED")
    energy = Energy(
        "INA3221 rails", {"VDD_IN": 5.0, "VDD_SOC": 1.0}, ("VDD_IN",), 2.0, 5.0, 0.4, None, 9
    )
    page = report_page(
        replace(
            report, bundle=bundle, energy=energy, thermal=Thermal(0, (900.0, 950.0), 1000.0, {}, ())
        )
    )
    assert not re.search(r"(?:src|href)\s*=|url\(|@import|<script|http", page)
    ElementTree.fromstring(re.sub(r"<meta[^>]*>", "", page.removeprefix("<!doctype html>")))
    assert "<b>&'" not in page and "UNVERIFIED" in page and "prefers-color-scheme: dark" in page
    assert len(plots(page)) == 5 and "within another" in page and "0.4 J" in page


def test_plots_show_the_raw_times(report: Report) -> None:
    made = with_answers(report, *(answer(total=40.0 if i < 6 else 50.0) for i in range(8)))
    page = report_page(made)
    by_name = {plot.attrib["aria-label"]: plot for plot in plots(page)}
    bars = by_name["Time to first text by stage"].findall("rect")[:5]
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert widths[2] / widths[0] == pytest.approx(20, rel=0.02) and widths[3] / widths[
        1
    ] == pytest.approx(2.5, rel=0.02)
    assert (
        len(by_name["Answers in the order they were given"].findall("circle")) == 8
        and "last quarter: 50.0 ms" in page
    )
    assert (
        "p99 4 ms" in page and len(plots(report_page(with_answers(report, answer(steps=()))))) == 2
    )


def test_limits_are_read() -> None:
    assert (parse_limit("ttft>+5%").of, parse_limit(" tokens_per_s < -3.5 % ").number) == (
        "percent",
        -3.5,
    )
    assert (
        parse_limit("peak_rss_mb>+50").of,
        parse_limit("ttft>20").of,
        parse_limit("decode_of_read_limit<50%").of,
    ) == ("change", "value", "value")
    for text, words in (
        ("ttft", "is no limit"),
        ("ttft>=5", "is no limit"),
        ("speed>+5%", "choose one of: ttft,"),
        ("ttft>5%", "'ttft>+5%'"),
    ):
        with pytest.raises(UsageError, match=re.escape(words)):
            parse_limit(text)


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("ttft>+9%", True),
        ("ttft>+11%", False),
        ("ttft<-1", False),
        ("ttft>+1.9", True),
        ("ttft>22.1", False),
        ("ttft>21.9", True),
        ("ttft<+20%", True),
    ],
)
def test_limits_hold_or_break(text: str, broken: bool) -> None:
    change = Change("ttft", "ms", 20.0, 22.0, 10.0, 4.0, "worse")
    words = parse_limit(text).broken([change])
    assert bool(words) == broken and (not broken or "20.0 to 22.0 ms, +10.0 %" in words)


def test_limits_on_what_was_not_measured_are_refused() -> None:
    with pytest.raises(UsageError, match="a report does not hold joules_per_token"):
        parse_limit("joules_per_token>+5%").broken([])
    with pytest.raises(UsageError, match="no change in percent"):
        parse_limit("power_w>+5%").broken([Change("power_w", "W", 0.0, 1.0, None, None, "")])


def test_changes_tell_noise_from_more(report: Report) -> None:
    before = with_answers(report, *(answer(vision=20 + 0.01 * (i % 3)) for i in range(20)))
    after = with_answers(
        report, *(answer(vision=30 + 0.01 * (i % 3), steps=(1.0, 1.0)) for i in range(20))
    )
    found = {change.name: change for change in changes(before, after)}
    assert (
        found["vision"].verdict == found["ttft"].verdict == "worse"
        and found["tokens_per_s"].verdict == "better"
    )
    assert (
        found["prefill"].verdict == "within noise"
        and found["load"].verdict == "no spread known"
        and "power_w" not in found
    )
    assert different_conditions(before, after) == []
    other = replace(after, conditions=replace(after.conditions, threads=2, python="4.0"))
    assert different_conditions(before, other) == ["threads 1 and 2"]


def test_the_diff_command(report: Report, tmp_path: Path) -> None:
    def save(name: str, made: Report) -> Path:
        (tmp_path / name).write_text(to_json(made, {}))
        return tmp_path / name

    a, b = (save(f"{v}.json", with_answers(report, *[answer(vision=v)] * 8)) for v in (20.0, 30.0))
    other = save("other.json", replace(report, conditions=replace(report.conditions, threads=9)))
    good = command(
        "runtime.bench.cli",
        "diff",
        a,
        b,
        "--fail-if",
        "ttft>+50%",
        "--json",
        tmp_path / "d.json",
        "--markdown",
        tmp_path / "d.md",
    )
    assert good.returncode == 0 and b"inter_token_p50" in good.stdout and b"worse" in good.stdout
    assert "| vision | ms | 20.0 | 30.0 | +50.0 % |" in (tmp_path / "d.md").read_text()
    assert json.loads((tmp_path / "d.json").read_text())["changes"][0]["name"] == "ttft"
    bad = command(
        "runtime.bench.cli", "diff", a, b, "--fail-if", "ttft>+5%", "--fail-if", "load>+1%"
    )
    assert bad.returncode == 1 and bad.stderr.decode().startswith(
        "error: 1 of 2 limits broken: ttft>+5% (29.0 to 39.0 ms, +34.5 %"
    )
    assert len(bad.stderr.splitlines()) == 1
    for faults, words in (
        ((a, b, "--fail-if", "tft>+5%"), "unknown metric"),
        ((a, other, "--fail-if", "ttft>+5%"), "threads 1 and 9"),
        ((a,), "after"),
        ((a, tmp_path / "none.json"), "cannot read"),
    ):
        fault = command("runtime.bench.cli", "diff", *faults)
        check_fault(fault, words)
        assert fault.returncode == (1 if "cannot" in words else 2)
    warned = command("runtime.bench.cli", "diff", a, other)
    assert (
        warned.returncode == 0 and b"warning: conditions differ: threads 1 and 9" in warned.stderr
    )
    assert (
        command(
            "runtime.bench.cli", "diff", a, other, "--fail-if", "ttft>+100000%", "--allow-different"
        ).returncode
        == 0
    )
    assert b"--fail-if" in command("runtime.bench.cli", "diff", "--help").stdout


def test_the_bench_command(built: Callable[[str], Path], scene_png: Path, tmp_path: Path) -> None:
    files = {kind: tmp_path / f"b.{kind}" for kind in ("json", "csv", "markdown", "html")}
    options = [part for kind, path in files.items() for part in (f"--{kind}", path)]
    shape = (
        "--repetitions",
        2,
        "--warmup",
        0,
        "--new-tokens",
        3,
        "--visual-tokens",
        4,
        "--threads",
        1,
    )
    result = command("runtime.bench.cli", built("fp32"), "--image", scene_png, *shape, *options)
    assert (
        result.returncode == 0
        and b"prefill" in result.stdout
        and b"2 answers after 0" in result.stderr
        and all(map(Path.exists, files.values()))
    )
    report = read_report(files["json"])
    assert (
        report.conditions.visual_tokens == 4
        and report.conditions.picture.startswith("scene.png ")
        and len(report.answers) == 2
    )
    assert files["csv"].read_text().startswith("stage,") and files["html"].read_text().startswith(
        "<!doctype html>"
    )
    check_fault(command("runtime.bench.cli", built("fp32"), "--repetitions", "0"), "repetitions")
    check_fault(
        command("runtime.bench.cli", built("fp32"), "--image", tmp_path / "none.png"), "none.png"
    )
    check_fault(
        command("runtime.bench.cli", built("fp32"), "--html", tmp_path / "no" / "x.html"),
        "writable folder",
    )
    check_fault(command("runtime.bench.cli", tmp_path), "no bundle at")
