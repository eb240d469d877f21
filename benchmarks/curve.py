"""Draws the curve of a training run as an SVG image, from its `log.jsonl`.

python benchmarks/curve.py .mine.training/log.jsonl curve.svg [--figure answer]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

_WIDTH, _HEIGHT, _MARGIN = 720, 260, 46
_GRID = 4


def svg(points: Sequence[tuple[int, float]], title: str) -> str:
    """Returns the SVG text of a curve over steps, with axes from zero."""
    last, top = max(step for step, _ in points), max(value for _, value in points)

    def place(step: float, value: float) -> tuple[float, float]:
        return _MARGIN + (_WIDTH - 2 * _MARGIN) * step / last, _HEIGHT - _MARGIN - (
            _HEIGHT - 2 * _MARGIN
        ) * value / top

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="sans-serif" font-size="12">'
    ]
    parts.append(
        f'<rect width="100%" height="100%" fill="#fff"/><text x="{_MARGIN}" y="22" '
        f'font-size="14">{escape(title)}</text>'
    )
    for index in range(_GRID + 1):
        x, y = place(last * index / _GRID, top * index / _GRID)
        parts.append(
            f'<line x1="{_MARGIN}" x2="{_WIDTH - _MARGIN}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="#e3e7ee"/>'
        )
        parts.append(
            f'<text x="{_MARGIN - 6}" y="{y + 4:.1f}" '
            f'text-anchor="end">{top * index / _GRID:.2g}</text>'
        )
        parts.append(
            f'<text x="{x:.1f}" y="{_HEIGHT - _MARGIN + 18}" '
            f'text-anchor="middle">{last * index // _GRID}</text>'
        )
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    parts.append(
        f'<polyline points="{line}" fill="none" stroke="#2a6f4e" stroke-width="1.6"/></svg>'
    )
    return "\n".join(parts) + "\n"


def main() -> None:
    """Writes the SVG image."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--figure", default="answer", help="a key of the log's lines")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.log.read_text().splitlines()]
    points = [(row["total_step"], row[arguments.figure]) for row in rows if arguments.figure in row]
    if not points:
        raise SystemExit(
            f"{arguments.log} has no figure {arguments.figure!r}; it has: "
            f"{', '.join(sorted(rows[-1]))}"
        )
    stages = " and ".join(dict.fromkeys(row["stage"] for row in rows if arguments.figure in row))
    arguments.out.write_text(svg(points, f"{arguments.figure} over optimiser steps ({stages})"))


if __name__ == "__main__":
    main()
