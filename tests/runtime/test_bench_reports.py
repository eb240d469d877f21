"""Latency reports as people read them: tables, pages, limits, differences, commands."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from runtime.bench.diff import Change, changes, different_conditions, parse_limit
from runtime.bench.html_report import report_page
from runtime.bench.metrics import (
    METRICS,
)
from runtime.bench.report import (
    STAGES,
    Report,
    read_report,
    to_json,
)
from runtime.bench.tables import condition_lines, csv_table, markdown_tables
from runtime.contract.errors import UsageError
from runtime.hardware.readings import Energy, Thermal
from tests.runtime.bench_reports import ANSWERS, answer, report, with_answers  # noqa: F401
from tests.runtime.test_cli import check_fault, command


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
    with pytest.raises(UsageError, match="joules_per_token is missing"):
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
