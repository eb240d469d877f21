"""A latency report as one self-contained HTML page without scripts: the main figures,
plots, all tables and the conditions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from runtime.bench.metrics import METRICS, noise_percent, stage_times, throttling
from runtime.bench.plots import (
    STYLE,
    answers_plot,
    clock_plot,
    histogram_plot,
    positions_plot,
    stages_plot,
)
from runtime.bench.report import Report
from runtime.bench.tables import condition_lines, figure
from runtime.output.html import html_page

__all__ = ["report_page"]

_HEADLINES = {
    "ttft": "time to first text",
    "inter_token_p50": "time between tokens",
    "tokens_per_s": "tokens per second",
    "images_per_s": "answers per second",
    "peak_rss_mb": "peak memory",
    "joules_per_image": "energy per image",
}
_STYLE = (
    """
.heads { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.heads div { background: var(--soft); border-radius: 8px; padding: .6rem 1rem; }
.heads b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.heads span, .note { color: var(--dim); font-size: .88rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr));
  gap: .5rem 2rem; }
figure { margin: 0; } figcaption { font-weight: 600; margin: .8rem 0 .3rem; }
.wide { overflow-x: auto; }
td:last-child.what, th:last-child.what { text-align: left; color: var(--dim); }
ul { padding-left: 1.2rem; } li { margin: .15rem 0; overflow-wrap: anywhere; }
"""
    + STYLE
)


def report_page(report: Report) -> str:
    """Builds the page."""
    title = f"Latency of {report.bundle.name}"
    verdict = (
        ""
        if report.bundle.verdict == "VERIFIED"
        else f' <span style="color:var(--bad)">{escape(report.bundle.verdict)}</span>'
    )
    plots = (
        ("Time to first text, by stage", stages_plot(report)),
        ("Time between tokens, by position (median, 10 to 90 %)", positions_plot(report)),
        ("Time between tokens, histogram", histogram_plot(report)),
        ("Total time of each answer, in order", answers_plot(report)),
        ("CPU clock after each answer", clock_plot(report)),
    )
    figures = "".join(
        f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"
        for caption, svg in plots
        if svg
    )
    words = throttling(report)
    conditions = "".join(f"<li>{escape(line)}</li>" for line in condition_lines(report))
    body = (
        f"<h1>{escape(title)}{verdict}</h1>{_headlines(report)}"
        f"<p>{escape(words[:1].upper() + words[1:])}</p>"
        f'<div class="plots">{figures}</div><h2>Stages</h2>{_stages(report)}'
        f"<h2>Metrics</h2>{_metrics(report)}"
        f"{_energy(report)}<h2>Conditions</h2><ul>{conditions}</ul>"
    )
    return html_page(title, body, _STYLE)


def _headlines(report: Report) -> str:
    cells = []
    for name, words in _HEADLINES.items():
        if (value := METRICS[name].value(report)) is not None:
            unit = "" if METRICS[name].unit == "1/s" else f" {METRICS[name].unit}"
            cells.append(f"<div><b>{figure(value)}{unit}</b><span>{words}</span></div>")
    return f'<div class="heads">{"".join(cells)}</div>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], last: str = "") -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        marks = [""] * (len(cells) - 1) + [f' class="{last}"' if last else ""]
        return (
            "<tr>"
            + "".join(
                f"<{tag}{mark}>{escape(cell)}</{tag}>"
                for cell, mark in zip(cells, marks, strict=True)
            )
            + "</tr>"
        )

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table>{line(head, "th")}{body}</table></div>'


def _stages(report: Report) -> str:
    rows = [
        (name.replace("_", " "), *(figure(value) for value in row.values()))
        for name, row in stage_times(report).items()
    ]
    return _table(("stage", "p50 ms", "p90 ms", "p99 ms", "best ms"), rows)


def _metrics(report: Report) -> str:
    def noise(name: str) -> str:
        found = noise_percent(METRICS[name], report)
        return "" if found is None else f"± {found:.1f} %"

    rows = [
        (name, figure(metric.value(report)), metric.unit, noise(name), metric.help)
        for name, metric in METRICS.items()
    ]
    return _table(("metric", "value", "unit", "noise", "meaning"), rows, "what")


def _energy(report: Report) -> str:
    if report.energy is None:
        return ""
    found = report.energy
    rows = [
        (rail, f"{watts:.2f}", "yes" if rail in found.counted else "no, within another rail")
        for rail, watts in found.rails_w.items()
    ]
    rest = (
        f"{found.source}; {found.idle_w:.2f} W idle, {found.power_w:.2f} W over "
        f"{found.answers} answers"
    )
    return (
        f"<h2>Power</h2><p "
        f'class="note">{escape(rest)}</p>{_table(("rail", "W while answering", "counted"), rows)}'
    )
