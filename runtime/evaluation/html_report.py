"""The evaluation as one self-contained HTML page: tables of figures, then every image
with its answer and boxes, worst first.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from runtime.evaluation.evaluate import AnswerRow
from runtime.output.draw_boxes import FOUND, TRUE
from runtime.output.html import html_page

__all__ = ["report_page"]

_MAX_ROWS = 400

_STYLE = """
.bar { display: inline-block; width: 12rem; height: .7rem; background: var(--soft);
  position: relative; vertical-align: middle; }
.bar i { position: absolute; top: 0; bottom: 0; left: 0; background: #7fb08a; }
.bar b { position: absolute; top: 25%; bottom: 25%; background: var(--ink); opacity: .55; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; overflow: hidden; }
figure.wrong { border-color: #d99; }
figure img { width: 100%; height: 11rem; object-fit: contain; background: var(--soft);
  display: block; }
figcaption { padding: .5rem .7rem; font-size: .88rem; overflow-wrap: anywhere; }
figcaption em { color: var(--dim); font-style: normal; }
"""


def _rgb(colour: tuple[int, int, int]) -> str:
    return f"rgb({colour[0]},{colour[1]},{colour[2]})"


def _table(
    figures: Mapping[str, Mapping[str, float]], control: Mapping[str, Mapping[str, float]]
) -> str:
    rows = []
    for name, row in figures.items():
        accuracy, low, high = row["accuracy"], row["low"], row["high"]
        bar = (
            f'<span class="bar"><i style="width:{accuracy:.1f}%"></i><b '
            f'style="left:{low:.1f}%;width:{max(0.5, high - low):.1f}%"></b></span>'
        )
        iou = f"{row['mean_iou']:.3f}" if "mean_iou" in row else ""
        cider = f"{row['cider']:.0f}" if "cider" in row else ""
        blank = f"{control[name]['accuracy']:.1f}" if name in control else ""
        rows.append(
            (
                escape(name),
                f"{row['count']:.0f}",
                f"{accuracy:.1f}",
                f"{low:.1f} to {high:.1f}",
                bar,
                iou,
                cider,
                blank,
            )
        )
    head = (
        "",
        "samples",
        "correct, %",
        "95 % interval",
        "",
        "mean IoU",
        "CIDEr-D",
        "without image, %",
    )
    kept = [column for column in range(len(head)) if any(row[column] for row in rows)]
    lines = ["".join(f"<th>{head[column]}</th>" for column in kept)]
    lines += ["".join(f"<td>{row[column]}</td>" for column in kept) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _figure(row: AnswerRow) -> str:
    data = base64.b64encode(row.thumbnail).decode()
    picture = f'<img alt="{escape(row.name)}" src="data:image/jpeg;base64,{data}">' if data else ""
    sample, value = row.sample, row.scored.value
    overlap = f" IoU {row.scored.iou:.2f}" if row.scored.iou is not None else ""
    expected = "; ".join(dict.fromkeys(sample.references or (sample.answer,)))
    turns = "".join(f"{escape(m.role)}: {escape(m.content)}<br>" for m in sample.messages[:-1])
    return (
        f'<figure class="{"right" if value >= 0.5 else "wrong"}">{picture}'
        f"<figcaption><em>{escape(row.name)} · "
        f"{escape(sample.task)}{overlap}</em><br>{turns}{escape(sample.text)}<br>"
        f"<b>{escape(row.answer) or '(nothing)'}</b>"
        f"{'' if value == 1 else f'<br><em>expected</em> {escape(expected)}'}</figcaption></figure>"
    )


def report_page(result: Mapping[str, Any], rows: Sequence[AnswerRow]) -> str:
    """Builds the page. `result` holds the figures that `infmllm-eval --json` prints.
    The page shows at most 400 answers, the worst first.
    """
    ordered = sorted(
        rows,
        key=lambda row: (row.scored.value, row.scored.iou if row.scored.iou is not None else 1.0),
    )[:_MAX_ROWS]
    tokens = f", {result['visual_tokens']} visual tokens" if result.get("visual_tokens") else ""
    title = f"{result['model']} on {result['data']}{tokens}"
    legend = (
        f'<span style="color:{_rgb(TRUE)}">■</span> true box, <span '
        f'style="color:{_rgb(FOUND)}">■</span> found box'
    )
    shown = (
        f"{len(ordered)} of {len(rows)} answers, worst first"
        if len(ordered) < len(rows)
        else f"All {len(rows)} answers, worst first"
    )
    body = (
        f"<h1>{escape(title)}</h1><h2>Tasks</h2>"
        f"{_table(result['tasks'], result.get('control', {}))}"
        f"<h2>Question kinds</h2>{_table(dict(sorted(result['kinds'].items())), {})}"
        f'<h2>{shown}</h2><p>{legend}</p><div class="grid">{"".join(map(_figure, ordered))}</div>'
    )
    return html_page(title, body, _STYLE)
