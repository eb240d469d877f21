"""Turns the results of rounds into tables: medians and best values per contender,
ratios per round, and the measuring conditions.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from contenders import CONTENDERS, PROMPT, STEPS, Contender

__all__ = ["markdown", "ratios", "summary"]

# Smallest allowed cosine to PyTorch; below it the graph is probably wrong. Random weights are the
# worst case for 4 bits, and a wrong graph has a cosine near 0.
_TOLERANCE = {"fp32": 0.999, "bf16": 0.99, "int8": 0.95, "int4": 0.7}
Rounds = Sequence[Mapping[str, Any]]


def rate(contender: Contender, row: Mapping[str, float]) -> dict[str, float]:
    """Returns the figures of a round: tokens per second of prefill and decode, or
    milliseconds per image.
    """
    if contender.part == "vision":
        return {"vision_ms": 1e3 * row["vision_s"]}
    return {"prefill": PROMPT / row["prefill_s"], "decode": STEPS / row["decode_s"]}


def summary(
    name: str, rounds: Rounds, loads: Rounds, check: Mapping[str, float], limits: Rounds
) -> dict[str, Any]:
    """Returns all figures of one contender, with median and best over the rounds."""
    contender = CONTENDERS[name]
    rates = [rate(contender, row) for row in rounds]
    figures: dict[str, Any] = {
        "part": contender.part,
        "family": contender.family,
        "settings": contender.note,
    }
    for kind in rates[0]:
        values = [row[kind] for row in rates]
        figures[kind] = statistics.median(values)
        figures[f"{kind}_best"] = min(values) if kind.endswith("_ms") else max(values)
        figures[f"{kind}_rounds"] = [round(value, 2) for value in values]
    last = loads[-1]
    figures |= {
        "load_s": statistics.median(load["load_s"] for load in loads),
        "load_best_s": min(load["load_s"] for load in loads),
    }
    figures |= {
        "peak_mib": max(row["peak_mib"] for row in rounds),
        "loaded_mib": last["loaded_mib"],
        "imported_mib": last["imported_mib"],
    }
    figures |= {"disk_mb": last["disk_bytes"] / 1e6, "versions": last["versions"], **check}
    if contender.part == "decoder":
        figures["weights_mb"] = last["weight_bytes"] / 1e6
        shares = [
            row["decode"] * last["weight_bytes"] / 1e9 / limit["read_gbs"]
            for row, limit in zip(rates, limits, strict=True)
        ]
        figures["of_bandwidth"] = statistics.median(shares)
    figures["same_graph"] = check["cosine"] >= _TOLERANCE[contender.family]
    return figures


def ratios(rounds: Mapping[str, Rounds]) -> list[dict[str, Any]]:
    """Compares this repository's contenders with each other engine on the same part.
    Both are measured in the same round; the result is the median ratio, above 1 where
    this repository is faster.

    Quantised contenders are compared within their family. Float contenders are also
    compared with all other families.
    """
    rows = []
    for ours in (CONTENDERS[name] for name in rounds if CONTENDERS[name].ours):
        for peer in (CONTENDERS[name] for name in rounds if not CONTENDERS[name].ours):
            comparable = (
                ours.family == peer.family
                or peer.family in ("fp32", "bf16")
                or ours.family == "fp32"
            )
            if ours.part != peer.part or not comparable:
                continue
            pairs = [
                (rate(ours, a), rate(peer, b))
                for a, b in zip(rounds[ours.name], rounds[peer.name], strict=True)
            ]
            row: dict[str, Any] = {"ours": ours.name, "peer": peer.name}
            for kind in pairs[0][0]:
                values = [
                    b[kind] / a[kind] if kind.endswith("_ms") else a[kind] / b[kind]
                    for a, b in pairs
                ]
                row[kind] = statistics.median(values)
            rows.append(row)
    return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )


def _decoder_row(name: str, row: Mapping[str, Any]) -> list[str]:
    speeds = [
        f"{row['prefill']:.0f} ({row['prefill_best']:.0f})",
        f"{row['decode']:.1f} ({row['decode_best']:.1f})",
        f"{row['of_bandwidth']:.2f}",
    ]
    sizes = [
        f"{row['weights_mb']:.0f}",
        f"{row['disk_mb']:.0f}",
        f"{row['load_s']:.2f} ({row['load_best_s']:.2f})",
    ]
    memory = [f"{row['loaded_mib']:.0f}", f"{row['peak_mib']:.0f}"]
    return [name, *speeds, *sizes, *memory, _agreement(row)]


def _vision_row(name: str, row: Mapping[str, Any]) -> list[str]:
    time = f"{row['vision_ms']:.0f} ({row['vision_ms_best']:.0f})"
    return [
        name,
        time,
        f"{row['disk_mb']:.0f}",
        f"{row['load_s']:.2f} ({row['load_best_s']:.2f})",
        f"{row['peak_mib']:.0f}",
        _agreement(row),
    ]


def _agreement(row: Mapping[str, Any]) -> str:
    text = f"{row['cosine']:.4f}" + (f" / {row['top1']:.0%}" if "top1" in row else "")
    return text if row["same_graph"] else f"{text} WRONG GRAPH?"


_DECODER_HEAD = (
    "decoder",
    "prefill tok/s",
    "decode tok/s",
    "of bandwidth",
    "read MB/token",
    "disk MB",
    "load s",
    "loaded MiB",
    "peak MiB",
    "cosine / top-1",
)
_VISION_HEAD = ("vision", "ms", "disk MB", "load s", "peak MiB", "cosine")


def markdown(result: Mapping[str, Any]) -> str:
    """Returns the whole report as Markdown: tables, ratios, absent rows, settings and
    conditions.
    """
    rows, parts = result["rows"], []
    for part, head, cells in (
        ("decoder", _DECODER_HEAD, _decoder_row),
        ("vision", _VISION_HEAD, _vision_row),
    ):
        chosen = [cells(name, row) for name, row in rows.items() if row["part"] == part]
        parts += [_table(head, chosen)] if chosen else []
        compared = [row for row in result["ratios"] if CONTENDERS[row["ours"]].part == part]
        kinds = [
            kind for kind in ("prefill", "decode", "vision_ms") if compared and kind in compared[0]
        ]
        lines = [
            [row["ours"], row["peer"], *(f"{row[kind]:.2f}" for kind in kinds)] for row in compared
        ]
        parts += (
            [
                _table(
                    ("ours over peer", "peer", *(kind.replace("_ms", "") for kind in kinds)), lines
                )
            ]
            if lines
            else []
        )
    parts += (
        ["\n".join(f"- absent: {name}: {reason}" for name, reason in result["absent"].items())]
        if result["absent"]
        else []
    )
    parts.append(
        "\n".join(
            f"- {name}: {row['settings']}; "
            f"{', '.join(f'{k} {v}' for k, v in row['versions'].items())}"
            for name, row in rows.items()
        )
    )
    limits, machine = result["limits"], result["machine"]
    reads = [limit["read_gbs"] for limit in limits]
    products = [limit["gflops"] for limit in limits]
    spans = [
        f"reads {statistics.median(reads):.1f} GB/s ({max(reads):.1f})",
        f"float32 products {statistics.median(products):.0f} GFLOP/s",
    ]
    where = (
        f"{machine['cpu']}, {machine['cores']} cores, {' '.join(machine['flags'])}; "
        f"{machine['system']}; Python {machine['python']}; {result['date']}"
    )
    counts = (
        f"{len(limits)} rounds, {result['threads']} threads, prefill of {PROMPT} tokens, "
        f"{STEPS} greedy tokens behind it; medians (best)"
    )
    parts.append(
        f"{where}. {counts}. In the same minutes: {', '.join(spans)}. `{result['command']}`"
    )
    return "\n\n".join(parts) + "\n"
