"""The plots of a latency report as inline SVG: stages of the time to first text, times
between tokens, and answers in order.

Colours come from the page and from CSS classes defined here, so that plots are readable
on light and dark screens. Important marks have their number as text beside them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from runtime.bench.metrics import quarters, stage_times
from runtime.bench.report import STAGES, Report
from runtime.bench.tables import figure

__all__ = ["STYLE", "answers_plot", "clock_plot", "histogram_plot", "positions_plot", "stages_plot"]

STYLE = """
:root { --s1: #3b6fb6; --s2: #2a9d8f; --s3: #d9a030; --s4: #d9694a; --s5: #98a2b3; }
@media (prefers-color-scheme: dark) { :root { --s1: #6c9be0; } }
svg { width: 100%; height: auto; display: block; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); paint-order: stroke;
  stroke: var(--paper); stroke-width: 3px; }
svg .dim { fill: var(--dim); }
svg .grid { stroke: var(--line); }
svg .axis { stroke: var(--dim); }
svg .mark { stroke: var(--ink); stroke-dasharray: 4 3; fill: none; }
svg .line { stroke: var(--s1); stroke-width: 1.8; fill: none; }
svg .band { fill: var(--s1); opacity: .2; }
svg .dot { fill: var(--s1); }
svg .late { stroke: var(--s4); stroke-width: 2; } svg .early { stroke: var(--s2); stroke-width: 2; }
""" + " ".join(f"svg .s{i} {{ fill: var(--s{i}); }}" for i in range(1, 6))

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM, _HEIGHT = 640, 52, 16, 14, 40, 240
_BINS = 40
_PARTS = (*STAGES, "other")


def _ticks(top: float) -> list[float]:
    """Returns round numbers from 0 to at least `top`."""
    rough = max(top, 1e-9) / 4
    scale = 10 ** math.floor(math.log10(rough))
    step = next(scale * nice for nice in (1, 2, 2.5, 5, 10) if scale * nice >= rough * 0.999)
    return [step * i for i in range(math.ceil(top / step - 1e-9) + 1)]


class _Frame:
    """A plot's axes: maps data to pixels and draws the grid with its labels. Both axes
    start at 0, unless `low` sets another start of the x axis.
    """

    def __init__(
        self, right: float, top: float, label_x: str, label_y: str, low: float = 0.0
    ) -> None:
        self._low, self._right, self._label = low, max(right, low + 1e-9), (label_x, label_y)
        self._ticks = _ticks(top)
        self.parts: list[str] = []

    def x(self, value: float) -> float:
        return _LEFT + (value - self._low) / (self._right - self._low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - value / self._ticks[-1] * (_HEIGHT - _TOP - _BOTTOM)

    def add(self, markup: str) -> None:
        self.parts.append(markup)

    def line(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in zip(xs, ys, strict=True))

    def svg(self, title: str, ticks_x: Sequence[float]) -> str:
        grid = "".join(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{self.y(tick):.1f}" '
            f'y2="{self.y(tick):.1f}"/>'
            f'<text class="dim" x="{_LEFT - 6}" y="{self.y(tick) + 4:.1f}" '
            f'text-anchor="end">{tick:g}</text>'
            for tick in self._ticks
        )
        below = "".join(
            f'<text class="dim" x="{self.x(t):.1f}" y="{_HEIGHT - _BOTTOM + 16}" '
            f'text-anchor="middle">{t:g}</text>'
            for t in ticks_x
        )
        axis = (
            f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{self.y(0):.1f}" '
            f'y2="{self.y(0):.1f}"/>'
        )
        labels = (
            f'<text class="dim" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" '
            f'text-anchor="middle">{escape(self._label[0])}</text>'
            f'<text class="dim" x="13" y="{(_HEIGHT - _BOTTOM) / 2}" text-anchor="middle" '
            f'transform="rotate(-90 13 {(_HEIGHT - _BOTTOM) / 2})">'
            f"{escape(self._label[1])}</text>"
        )
        return _svg(_HEIGHT, title, grid + below + "".join(self.parts) + axis + labels)


def _svg(height: float, title: str, body: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title>{body}</svg>'
    )


def _whole_ticks(low: int, high: int) -> list[float]:
    step = next(
        s
        for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10**4, 10**5, 10**9)
        if (high - low) / s <= 10
    )
    return [
        float(v)
        for v in range(low, high + 1)
        if v == low or (v % step == 0 and v - low >= step / 2)
    ]


def stages_plot(report: Report) -> str:
    """Draws two stacked bars, the medians of all stages and the slowest answer, with a
    legend that holds the numbers.
    """
    medians = {name: row["p50"] for name, row in stage_times(report).items() if name in _PARTS}
    slowest = max(report.answers, key=lambda answer: answer.ttft_ms)
    slow = {
        **slowest.stages_ms,
        "other": max(0.0, slowest.ttft_ms - sum(slowest.stages_ms.values())),
    }
    scale = (_WIDTH - _LEFT - 16 - 70) / max(sum(medians.values()), sum(slow.values()), 1e-9)
    body = []
    for row, (name, values) in enumerate((("medians", medians), ("slowest", slow))):
        left, y = _LEFT + 16.0, 6 + 40 * row
        body.append(f'<text x="{left - 8}" y="{y + 19}" text-anchor="end">{name}</text>')
        for number, part in enumerate(_PARTS, start=1):
            width = values[part] * scale
            tip = f"{part.replace('_', ' ')}: {figure(values[part])} ms"
            body.append(
                f'<rect class="s{number}" x="{left:.1f}" y="{y}" width="{max(width, 0.5):.1f}" '
                f'height="28"><title>{tip}</title></rect>'
            )
            left += width
        body.append(
            f'<text x="{left + 6:.1f}" y="{y + 19}">{figure(sum(values.values()))} ms</text>'
        )
    total = sum(medians.values()) or 1.0
    for number, part in enumerate(_PARTS, start=1):
        x, y = _LEFT + 16 + (number - 1) % 2 * 270, 106 + 22 * ((number - 1) // 2)
        text = (
            f"{part.replace('_', ' ')} {figure(medians[part])} ms, "
            f"{1e2 * medians[part] / total:.0f} %"
        )
        body.append(
            f'<rect class="s{number}" x="{x}" y="{y - 10}" width="11" height="11"/><text '
            f'x="{x + 17}" y="{y}">{text}</text>'
        )
    return _svg(166, "Time to first text by stage", "".join(body))


def positions_plot(report: Report) -> str:
    """Plots the milliseconds of each decode step over its position: the median over
    answers and the range from the 10th to the 90th percentile. Empty without steps.
    """
    longest = max(len(answer.step_ms) for answer in report.answers)
    if not longest:
        return ""
    columns = [
        [answer.step_ms[i] for answer in report.answers if len(answer.step_ms) > i]
        for i in range(longest)
    ]
    low, middle, high = (
        np.array([np.percentile(column, p) for column in columns]) for p in (10, 50, 90)
    )
    frame, xs = (
        _Frame(longest + 1, float(high.max()), "token of the answer", "ms", 1),
        list(range(2, longest + 2)),
    )
    if longest > 1:
        frame.add(
            f'<polygon class="band" points="{frame.line(xs + xs[::-1], [*high, *low[::-1]])}"/>'
        )
        frame.add(f'<polyline class="line" points="{frame.line(xs, list(middle))}"/>')
    else:
        frame.add(
            f'<circle class="dot" cx="{frame.x(2):.1f}" cy="{frame.y(float(middle[0])):.1f}" '
            f'r="4"/>'
        )
    return frame.svg("Time between tokens over the answer", _whole_ticks(1, longest + 1))


def histogram_plot(report: Report) -> str:
    """Draws a histogram of the times between tokens, with lines at p50, p90 and p99.
    Values far beyond p99 are counted but not drawn. Empty without steps.
    """
    steps = np.array([step for answer in report.answers for step in answer.step_ms])
    if not len(steps):
        return ""
    marks = {p: float(np.percentile(steps, p)) for p in (50, 90, 99)}
    right = min(float(steps.max()), 1.25 * marks[99]) * 1.02 or 1.0
    counts, edges = np.histogram(steps[steps <= right], bins=_BINS, range=(0, right))
    beyond = int((steps > right).sum())
    label = "ms between tokens"
    if beyond:
        label += f" ({beyond} of {len(steps)} lie beyond, up to {figure(float(steps.max()))})"
    frame = _Frame(right, float(counts.max()) * 1.3, label, "steps")
    for count, start, end in zip(counts, edges, edges[1:], strict=False):
        top, width = frame.y(float(count)), frame.x(end) - frame.x(start)
        frame.add(
            f'<rect class="s1" x="{frame.x(start):.1f}" y="{top:.1f}" '
            f'width="{max(0.5, width - 1):.1f}" height="{frame.y(0) - top:.1f}"/>'
        )
    for row, (percent, value) in enumerate(marks.items()):
        x, y = frame.x(value), _TOP + 10 + 14 * row
        right_half = value > 0.8 * right
        frame.add(
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 8}" y2="{frame.y(0):.1f}"/>'
        )
        anchor, shift = ("end", -5) if right_half else ("start", 5)
        frame.add(
            f'<text x="{x + shift:.1f}" y="{y}" text-anchor="{anchor}">p{percent} {figure(value)} '
            f"ms</text>"
        )
    return frame.svg(
        "Distribution of times between tokens", [tick for tick in _ticks(right) if tick <= right]
    )


def answers_plot(report: Report) -> str:
    """Plots the total time of every answer in order, with the medians of the first and
    the last quarter, which show drift and throttling.
    """
    totals = [answer.total_ms for answer in report.answers]
    frame = _Frame(len(totals) + 0.5, max(totals) * 1.05, "answer", "ms for the whole answer", 0.5)
    for number, total in enumerate(totals, start=1):
        tip = f"answer {number}: {figure(total)} ms"
        frame.add(
            f'<circle class="dot" cx="{frame.x(number):.1f}" cy="{frame.y(total):.1f}" '
            f'r="3.2"><title>{tip}</title></circle>'
        )
    if found := quarters(report):
        size = len(totals) // 4
        for css, value, start in (("early", found[0], 0), ("late", found[1], len(totals) - size)):
            left, right, y = frame.x(start + 0.5), frame.x(start + size + 0.5), frame.y(value)
            anchor, x = ("start", left) if css == "early" else ("end", right)
            frame.add(
                f'<line class="{css}" x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
            text = f"{'first' if css == 'early' else 'last'} quarter: {figure(value)} ms"
            frame.add(
                f'<text x="{x:.1f}" y="{min(y + 40, frame.y(0) - 6):.1f}" '
                f'text-anchor="{anchor}">{text}</text>'
            )
    return frame.svg("Answers in the order they were given", _whole_ticks(1, len(totals)))


def clock_plot(report: Report) -> str:
    """Plots the CPU's clock after each answer, with its maximum; empty if the system
    does not report the clock.
    """
    clocks, highest = report.thermal.clock_mhz, report.thermal.max_clock_mhz
    if not clocks:
        return ""
    frame = _Frame(len(clocks) + 0.5, max(*clocks, highest or 0.0), "answer", "MHz", 0.5)
    frame.add(
        f'<polyline class="line" points="{frame.line(list(range(1, len(clocks) + 1)), clocks)}"/>'
    )
    if highest:
        y = frame.y(highest)
        frame.add(
            f'<line class="mark" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        frame.add(
            f'<text x="{_WIDTH - _RIGHT}" y="{max(y - 5, 10):.1f}" text-anchor="end">highest '
            f"{highest:.0f} MHz</text>"
        )
    return frame.svg("Clock of the CPU", _whole_ticks(1, len(clocks)))
