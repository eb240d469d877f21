"""Shows a bundle as a self-contained HTML page with one bar per block. A bar's width
shows the block's bytes, and its colours show how the layers are stored.
"""

from __future__ import annotations

import html
from collections import Counter
from typing import Any

from runtime.output.html import html_page

__all__ = ["block_page"]

_COLOURS = {
    "int4": "#2a9d8f",
    "int8 x": "#e9c46a",
    "int8": "#8ab17d",
    "fp16": "#f4a261",
    "fp32": "#e76f51",
}
_OTHER = "#b8b8b8"
_WIDTH = 560
_STYLE = """
td, th { text-align: left; }
.bar{display:flex;height:1.1rem;border-radius:2px;overflow:hidden}
.bar span{display:block;height:100%}
.key span{display:inline-block;width:.9rem;height:.9rem;margin:0 .3rem 0 1rem;vertical-align:-2px;
  border-radius:2px}
.bad{color:var(--bad);font-weight:600} .muted{color:var(--dim)}
"""


def block_page(data: dict[str, Any]) -> str:
    """Returns the page of a bundle's description (see
    `export.inspection.describe.describe_bundle`).
    """
    verdict = html.escape(data["verdict_text"])
    verdict = verdict if data["verdict"] == "VERIFIED" else f'<span class="bad">{verdict}</span>'
    title = f"{data['model']['name']} for {data['target']}, {data['bytes'] / 1e6:.1f} MB"
    stages = "".join(
        f"<tr><td>{html.escape(s['stage'])}</td><td>{s['error']:.3g}</td>"
        f"<td>{s['tolerance']:.3g}</td>"
        f"<td>{_percent(s['agreement'])}</td></tr>"
        for s in data["parity"].get("stages", [])
    )
    parity = (
        f"<table><tr><th>parity</th><th>error</th><th>allowed</th><th>same "
        f"token</th></tr>{stages}</table>"
        if stages
        else ""
    )
    graphs = "".join(_graph(name, graph) for name, graph in data["graphs"].items())
    key = "".join(
        f'<span style="background:{colour}"></span>{_NAMES[kind]}'
        for kind, colour in _COLOURS.items()
    )
    key += f'<span style="background:{_OTHER}"></span>norms, biases, tables'
    refused = [reason for row in data["provenance"].get("passes", []) for reason in row["refused"]]
    declined = (
        "<h2>Refused</h2><ul>"
        + "".join(f"<li>{html.escape(reason)}</li>" for reason in refused)
        + "</ul>"
        if refused
        else ""
    )
    return html_page(
        title,
        f"<h1>{html.escape(title)}: {verdict}</h1>{parity}<p "
        f'class="key">{key}</p>{graphs}{declined}',
        _STYLE,
    )


_NAMES = {
    "int4": "4-bit weights",
    "int8 x": "8-bit weights and activations",
    "int8": "8-bit weights",
    "fp16": "half precision",
    "fp32": "float",
}


def _graph(name: str, graph: dict[str, Any]) -> str:
    largest = max(row["bytes"] for row in graph["blocks"].values())
    rows = "".join(_block(block, row, largest) for block, row in graph["blocks"].items())
    operators = ", ".join(f"{html.escape(op)} {count}" for op, count in graph["operators"].items())
    return (
        f'<h2>{html.escape(name)}</h2><p class="muted">{graph["nodes"]} nodes: '
        f"{operators}</p><table>{rows}</table>"
    )


def _block(block: str, row: dict[str, Any], largest: int) -> str:
    kinds = Counter(_kind(how) for how in row["layers"].values())
    total = sum(kinds.values())
    width = max(3, round(_WIDTH * row["bytes"] / largest))
    parts = "".join(
        f'<span style="width:{100 * count / total:.1f}%;background:{_COLOURS[kind]}"></span>'
        for kind, count in kinds.items()
    )
    parts = parts or f'<span style="width:100%;background:{_OTHER}"></span>'
    layers = "\n".join(f"{name}: {how}" for name, how in row["layers"].items())
    bar = f'<div class="bar" style="width:{width}px" title="{html.escape(layers)}">{parts}</div>'
    hows = ", ".join(
        f"{count} × {html.escape(how)}" for how, count in Counter(row["layers"].values()).items()
    )
    return (
        f"<tr><td>{html.escape(block)}</td><td>{row['bytes'] / 1e3:,.1f} "
        f'kB</td><td>{bar}</td><td class="muted">{hows}</td></tr>'
    )


def _kind(how: str) -> str:
    return next(kind for kind in _COLOURS if how.startswith(kind))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"
