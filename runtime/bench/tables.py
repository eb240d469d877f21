"""Formats a report as text for a terminal, as CSV for spreadsheets, and as Markdown for
notes and pull requests.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence

from runtime.bench.metrics import METRICS, noise_percent, stage_times, throttling
from runtime.bench.report import Report

__all__ = [
    "condition_lines",
    "csv_table",
    "figure",
    "markdown_table",
    "markdown_tables",
    "print_report",
]

_HEAD = ("stage", "p50 ms", "p90 ms", "p99 ms", "best ms")
_RATES = (
    "tokens_per_s",
    "images_per_s",
    "load",
    "peak_rss_mb",
    "gpu_memory_mb",
    "power_w",
    "joules_per_image",
    "joules_per_token",
)
_SHARES = (
    "decode_of_read_limit",
    "prefill_of_fp32_limit",
    "prefill_of_int8_limit",
    "vision_of_fp32_limit",
    "vision_of_int8_limit",
)


def figure(value: float | None) -> str:
    """Formats a number with two or three significant digits; None becomes a dash."""
    if value is None:
        return "–"
    return (
        f"{value:.0f}"
        if abs(value) >= 100
        else f"{value:.1f}"
        if abs(value) >= 10
        else f"{value:.3g}"
        if abs(value) >= 1
        else f"{value:.2g}"
    )


def csv_table(report: Report) -> str:
    """Formats the stages in milliseconds, then all metrics with value, unit and noise;
    values that were not measured are empty.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(("stage", "p50_ms", "p90_ms", "p99_ms", "best_ms"))
    writer.writerows(
        (name, *(round(value, 4) for value in row.values()))
        for name, row in stage_times(report).items()
    )
    writer.writerow(())
    writer.writerow(("metric", "value", "unit", "noise_percent"))
    for name, metric in METRICS.items():
        value, noise = metric.value(report), noise_percent(metric, report)
        writer.writerow(
            (
                name,
                "" if value is None else round(value, 6),
                metric.unit,
                "" if noise is None else round(noise, 2),
            )
        )
    return buffer.getvalue()


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Builds a Markdown table; vertical bars inside cells are escaped."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines
    )


def _stage_rows(report: Report) -> list[tuple[str, ...]]:
    return [
        (name.replace("_", " "), *(f"{value:.2f}" for value in row.values()))
        for name, row in stage_times(report).items()
    ]


def markdown_tables(report: Report) -> str:
    """Formats stages, metrics and conditions as Markdown."""
    metrics = [
        (f"`{name}`", figure(metric.value(report)), metric.unit, metric.help)
        for name, metric in METRICS.items()
    ]
    conditions = "".join(f"- {line}\n" for line in condition_lines(report))
    return (
        f"## Latency of {report.bundle.name}\n\n{markdown_table(_HEAD, _stage_rows(report))}\n"
        f"{markdown_table(('metric', 'value', 'unit', 'meaning'), metrics)}\n{conditions}"
    )


def condition_lines(report: Report) -> Iterator[str]:
    """Yields one sentence for each condition of the figures and for each part that
    could not be measured.
    """
    given, limits = report.conditions, report.limits
    schemes = ", ".join(f"{part} {scheme}" for part, scheme in report.bundle.schemes.items())
    yield (
        f"{report.bundle.name}: {report.bundle.model} for {report.bundle.target} ({schemes}), "
        f"{report.bundle.verdict}"
    )
    yield (
        f"{' · '.join(filter(None, (given.board, given.cpu)))}, {given.threads} of "
        f"{given.cores} cores used; instructions: {' '.join(given.isa) or 'baseline only'}"
    )
    new = f"{report.answers[-1].tokens} of at most {given.max_new_tokens} new tokens"
    yield (
        f"{given.prompt_tokens} prompt tokens ({given.visual_tokens} visual), {new}; "
        f"{given.picture}"
    )
    yield f"{given.repetitions} answers after {given.warmup} to warm up"
    yield (
        f"infmllm-edge {given.infmllm}, onnxruntime {given.onnxruntime}, Python {given.python}, "
        f"{given.os}, {given.started}"
    )
    rates = [
        " to ".join(figure(getattr(limit, name)) for limit in limits)
        for name in ("read_gbs", "fp32_gflops", "int8_gops")
    ]
    when = "before to after" if len(limits) > 1 else "after"
    yield (
        f"limits of this machine, measured {when}: memory read {rates[0]} GB/s, matrix products "
        f"{rates[1]} GFLOP/s in float32, {rates[2]} GOP/s in 8 bits"
    )
    if given.last_cache_mb and report.work.decoder_weight_bytes < given.last_cache_mb * 1e6:
        yield (
            f"the decoder's weights fit the last-level CPU cache ({given.last_cache_mb:.0f} MB), "
            f"so steps can be faster than the memory read limit"
        )
    yield throttling(report)
    yield from (f"{part} not available: {reason}" for part, reason in report.missing.items())


def print_report(report: Report) -> None:
    """Prints the table on standard output, then one line of rates and one line of
    percentages of the machine's limits.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(*_HEAD)
    for row in _stage_rows(report):
        table.add_row(*row)
    Console().print(table)
    for names in (_RATES, _SHARES):
        print(
            ", ".join(
                _words(name, value)
                for name in names
                if (value := METRICS[name].value(report)) is not None
            )
        )


def _words(name: str, value: float) -> str:
    """Formats a metric in words, such as "load 41 ms" or "decode of read limit 8.1 %".
    Units other than ms and % are left out, because the name states them.
    """
    unit = METRICS[name].unit if METRICS[name].unit in ("ms", "%") else ""
    return f"{name.replace('_', ' ')} {figure(value)} {unit}".rstrip()
