"""Renders a report as one HTML page: the verdict first, then goals, parity, speed
beside PyTorch, latency, absent items with reasons, and the conditions.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from runtime.bench.tables import figure
from runtime.output.html import html_page
from tests.gpu.goals import MISSED, UNKNOWN, decode_share, median_ratio, results
from tests.gpu.record import ABSENT, FAILED, MEASURED, Report
from tests.gpu.settings import COMPILED, EAGER, OURS
from tests.gpu.verdict import equal_answers, name_of, verdict

__all__ = ["report_page"]

_STYLE = """
.heads { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; }
.heads div { background: var(--soft); border-radius: 8px; padding: .6rem 1rem; }
.heads b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.heads span, .note { color: var(--dim); font-size: .88rem; }
.verdict { font-weight: 600; font-size: 1.15rem; overflow-wrap: anywhere; }
.bad { color: var(--bad); font-weight: 600; }
.dim { color: var(--dim); }
.wide { overflow-x: auto; } td { white-space: nowrap; } th, td { padding: .25rem .55rem; }
th.left, td:nth-child(-n+3), th:nth-child(-n+3), td.left { text-align: left; }
td.words, th.words { text-align: left; white-space: normal; }
td.words:not(:empty) { min-width: 16rem; }
ul { padding-left: 1.2rem; } li { margin: .15rem 0; overflow-wrap: anywhere; }
"""
_STAGES = ("vision", "prefill", "decode", "choice")
_LATENCY = (
    "ttft",
    "vision",
    "prefill",
    "inter_token_p50",
    "inter_token_p90",
    "tokens_per_s",
    "load",
    "peak_rss_mb",
    "gpu_memory_mb",
)

_PARITY_NOTE = (
    "Relative RMS errors against PyTorch fp32 on the CPU, and what is allowed; choice is how "
    "often the token taken on the device is not the "
    "most likely of its logits. PyTorch's own rows say what a precision costs on this GPU. Answers "
    "are equal if they are PyTorch fp32's on the same "
    "GPU token for token; they are not judged, since near ties turn them."
)
_ROUNDS_NOTE = (
    "Medians over rounds in which all contenders take turns; ratios are medians of ratios within "
    "a round, above 1 where ours is faster. Of copy "
    "bound: the time that copying within the GPU's memory (a byte read and a byte written count "
    "as two) takes for the decoder's weights and the "
    "prompt's cache rows, over the time of a step. "
    f"{EAGER} and {COMPILED} run the trainer's model in fp16, its cache just long enough and "
    f"written in place."
)

Cell = tuple[str, str]
"""The text of a table cell, and its CSS class."""


def report_page(report: Report) -> str:
    """Returns the HTML text of the page."""
    text, code = verdict(report)
    body = (
        f"<h1>GPU check</h1><p "
        f'class="verdict{" bad" if code else ""}">{escape(text)}</p>{_heads(report)}'
        f"<h2>Goals</h2>{_goals(report)}<h2>Parity</h2>{_parity(report)}<h2>Beside "
        f"PyTorch</h2>{_rounds(report)}"
        f"<h2>Latency</h2>{_latency(report)}<h2>Absent</h2>{_absent(report)}"
        f"<h2>Conditions</h2>{_conditions(report)}"
    )
    return html_page("GPU check", body, _STYLE)


def _heads(report: Report) -> str:
    copied = report.find("bandwidth")
    cells = {
        "GPU": ", ".join(
            f"{gpu['name']} ({gpu['capability']})" for gpu in report.machine.get("gpus", ())
        )
        or "none",
        "driver, CUDA": ", ".join(
            filter(None, (report.machine.get("driver"), report.machine.get("cuda")))
        )
        or "none",
        "copies in its memory, GB/s": figure(copied.values["gbs"])
        if copied and copied.outcome == MEASURED
        else "–",
    }
    boxes = "".join(
        f"<div><b>{escape(value)}</b><span>{name}</span></div>" for name, value in cells.items()
    )
    return f'<div class="heads">{boxes}</div>'


def _table(head: Sequence[str], rows: Iterable[Sequence[Cell]], empty: str) -> str:
    lines = [
        "<tr>" + "".join(f'<td class="{kind}">{escape(text)}</td>' for text, kind in row) + "</tr>"
        for row in rows
    ]
    if not lines:
        return f'<p class="note">{escape(empty)}</p>'
    kinds = {"why": "words", "contender": "left"}
    names = "".join(f'<th class="{kinds.get(name, "")}">{escape(name)}</th>' for name in head)
    return f'<div class="wide"><table><tr>{names}</tr>{"".join(lines)}</table></div>'


def _plain(*texts: str) -> list[Cell]:
    return [(text, "") for text in texts]


def _goals(report: Report) -> str:
    """Lists the measured goals in full, and one line per reason for the others."""
    found = results(report)
    rows = [
        [
            *_plain(
                goal.model, goal.target, goal.scheme, goal.goal, goal.wanted, figure(goal.found)
            ),
            (goal.outcome, "bad" if goal.outcome == MISSED else ""),
        ]
        for goal in found
        if goal.outcome != UNKNOWN
    ]
    unknown: dict[str, list[str]] = {}
    for goal in found:
        if goal.outcome == UNKNOWN:
            unknown.setdefault(f"{goal.model} {goal.target}: {goal.reason}", []).append(
                f"{goal.goal} ({goal.scheme})"
            )
    table = _table(
        ("model", "target", "scheme", "goal", "wanted", "found", "outcome"),
        rows,
        "None of the goals was measured.",
    )
    return table + _list(
        (f"not measured: {where}", f"{len(goals)} goals") for where, goals in unknown.items()
    )


def _list(items: Iterable[tuple[str, str]]) -> str:
    lines = "".join(
        f"<li>{escape(text)}{f' <span class=dim>({escape(aside)})</span>' if aside else ''}</li>"
        for text, aside in items
    )
    return f'<ul class="note">{lines}</ul>' if lines else ""


def _parity(report: Report) -> str:
    """Shows relative RMS errors over their tolerances, and how many answers equal those
    of PyTorch fp32 token for token.
    """
    rows = []
    for row in report.of("parity"):
        if row.outcome == ABSENT:
            continue
        stages = {stage["stage"]: stage for stage in row.values.get("stages", ())}
        judged = row.outcome != MEASURED
        equal = equal_answers(report, row)
        answers = f"{equal[0]} of {equal[1]}" if equal else "–"
        cells = [_error(stages.get(name), judged) for name in _STAGES]
        why = "; ".join(filter(None, (row.reason, *row.values.get("notes", ()))))
        rows.append(
            [
                *_plain(row.model, row.target, row.scheme),
                *cells,
                *_plain(answers),
                (row.outcome, "bad" if row.outcome == FAILED else ""),
                (why, "words"),
            ]
        )
    head = ("model", "target", "scheme", *_STAGES, "equal answers", "outcome", "why")
    return _table(head, rows, "No engine could be held against PyTorch.") + (
        f'<p class="note">{escape(_PARITY_NOTE)}</p>' if rows else ""
    )


def _error(stage: Mapping[str, Any] | None, judged: bool) -> Cell:
    if stage is None:
        return "–", "dim"
    found = "not finite" if stage["error"] is None else f"{stage['error']:.2g}"
    return (
        (f"{found} / {stage['tolerance']:.2g}", "" if stage["passed"] else "bad")
        if judged
        else (found, "")
    )


def _rounds(report: Report) -> str:
    rows, lost = [], dict[str, list[str]]()
    for row in report.of("rounds"):
        times = row.values.get("contenders", {})
        for name, stages in times.items():
            medians = {stage: statistics.median(values) for stage, values in stages.items()}
            ratios = (
                [
                    median_ratio(row, (name, stage), (OURS, stage))
                    for stage in ("vision", "prefill", "step")
                ]
                if OURS in times
                else [None] * 3
            )
            share = decode_share(report, row) if name == OURS else None
            where = (
                _plain(row.model, row.target, row.scheme)
                if name in (OURS, EAGER) and name == next(iter(times))
                else _plain("", "", "")
            )
            cells = [figure(medians[stage]) for stage in ("vision", "prefill", "step")]
            compared = [figure(ratio) if ratio and name != OURS else "–" for ratio in ratios]
            shown = "–" if share is None else f"{share:.2f}"
            rows.append(
                [
                    *where,
                    (name, "left"),
                    *_plain(*cells, figure(1e3 / medians["step"]), shown, *compared),
                ]
            )
        for name, reason in row.values.get("absent", {}).items():
            lost.setdefault(f"{name} absent: {reason}", []).append(name_of(row))
    head = (
        "model",
        "target",
        "scheme",
        "contender",
        "image ms",
        "prefill ms",
        "step ms",
        "tokens/s",
        "of copy bound",
        "ours × image",
        "× prefill",
        "× step",
    )
    return (
        _table(head, rows, "Nothing was timed.")
        + _list((reason, ", ".join(names)) for reason, names in lost.items())
        + (f'<p class="note">{escape(_ROUNDS_NOTE)}</p>' if rows else "")
    )


def _latency(report: Report) -> str:
    rows = []
    for row in report.of("latency"):
        if row.outcome == MEASURED:
            rows.append(
                [
                    *_plain(
                        row.model,
                        row.target,
                        row.scheme,
                        *(figure(row.values["metrics"][name]) for name in _LATENCY),
                    )
                ]
            )
    head = (
        "model",
        "target",
        "scheme",
        "first token ms",
        "image",
        "prefill",
        "token p50",
        "p90",
        "tokens/s",
        "load ms",
        "RSS MB",
        "GPU MB",
    )
    return _table(head, rows, "No latency report could be made.")


def _absent(report: Report) -> str:
    """Lists the reasons for absent rows, each with the affected items."""
    reasons: dict[str, list[str]] = {}
    for row in report.rows:
        if row.outcome == ABSENT:
            reasons.setdefault(row.reason, []).append(name_of(row))
    rows = [[(", ".join(names), "words"), (reason, "words")] for reason, names in reasons.items()]
    return _table(("what", "why"), rows, "Nothing was absent.")


def _conditions(report: Report) -> str:
    machine = report.machine
    packages = ", ".join(
        f"{name} {version}" for name, version in machine.get("packages", {}).items()
    )
    place = ", ".join(str(machine[key]) for key in ("board", "cpu", "os") if machine.get(key))
    runs = [
        (f"{run['command']}", f"{run['started']}, commit {run['commit'] or 'unknown'}")
        for run in report.runs
    ]
    return _list([(f"{place}, Python {machine.get('python', '')}", ""), (packages, ""), *runs])
