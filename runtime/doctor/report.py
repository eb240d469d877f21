"""Formats a diagnosis for people (text or an HTML page) and for programs (JSON)."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from html import escape

from runtime.doctor.checks import Diagnosis, Result
from runtime.doctor.facts import Facts
from runtime.doctor.finding import LEVELS
from runtime.output.html import html_page

__all__ = ["diagnosis_json", "diagnosis_page", "diagnosis_text", "verdict"]

_STYLE = """
table { width: 100%; }
td { text-align: left; vertical-align: top; overflow-wrap: anywhere; }
th { text-align: left; }
td:nth-child(-n+2) { white-space: nowrap; }
.wide { overflow-x: auto; }
code { background: var(--soft); border-radius: 4px; padding: .05rem .3rem; }
.problem td:first-child { color: var(--bad); font-weight: 600; }
.warning td:first-child { font-weight: 600; }
.aside { color: var(--dim); }
"""


def verdict(diagnosis: Diagnosis) -> str:
    """Returns one line: that nothing keeps the targets from running, or the number and
    names of the problems.
    """
    targets = ", ".join(diagnosis.targets)
    if not diagnosis.problems:
        return f"no problem found: {targets} can run on this machine"
    return (
        f"{len(diagnosis.problems)} problem{'s' if len(diagnosis.problems) > 1 else ''} for "
        f"{targets}: " + ", ".join(result.check for result in diagnosis.problems)
    )


def _order(diagnosis: Diagnosis) -> list[Result]:
    """Sorts results for the wanted targets first; otherwise the order of the table
    stays.
    """
    return sorted(diagnosis.results, key=lambda result: result.aside)


def _machine(facts: Facts) -> str:
    python = f"Python {facts.python.version}" + (
        " in a virtual environment" if facts.python.virtual else ""
    )
    place = "a container" if facts.access.container else "WSL" if facts.access.wsl else ""
    return ", ".join(
        part
        for part in (facts.machine.board or facts.machine.cpu, facts.machine.os, python, place)
        if part
    )


def diagnosis_text(facts: Facts, diagnosis: Diagnosis, width: int = 110) -> str:
    """Formats one line per finding, followed by its cause and fix. A finding for other
    targets only gets just its one line.
    """
    lines, aside = [_machine(facts)], False
    for result in _order(diagnosis):
        if result.aside and not aside:
            lines.append("for other targets:")
            aside = True
        lines += _lines(result, width)
    return "\n".join(
        lines if diagnosis.problems else [*lines, verdict(diagnosis)]
    )  # with problems, the command's final error line says the same


def _lines(result: Result, width: int) -> list[str]:
    head = f"{result.finding.level:8} {result.check:23} "
    found = textwrap.wrap(
        result.finding.found,
        width,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_on_hyphens=False,
    )
    if result.finding.cause and not result.aside:
        start = f"{'':9}{'cause':23} "
        found += textwrap.wrap(
            result.finding.cause,
            width,
            initial_indent=start,
            subsequent_indent=" " * len(start),
            break_on_hyphens=False,
        )
        found.append(
            f"{'':9}{'fix':23} {result.finding.fix}"
        )  # never wrapped, so that it can be copied
    return found


def diagnosis_json(facts: Facts, diagnosis: Diagnosis) -> str:
    """Returns all facts as JSON, with the findings and the targets they matter to."""
    findings = [
        {"check": r.check, "targets": r.targets, "aside": r.aside, **asdict(r.finding)}
        for r in diagnosis.results
    ]
    counts = {level: sum(r.finding.level == level for r in diagnosis.results) for level in LEVELS}
    return json.dumps(
        {
            "targets": diagnosis.targets,
            "ok": not diagnosis.problems,
            "counts": counts,
            "findings": findings,
            "facts": asdict(facts),
        }
    )


def diagnosis_page(facts: Facts, diagnosis: Diagnosis) -> str:
    """Builds the HTML page."""
    body = (
        f"<h1>Doctor</h1><p>{escape(_machine(facts))}</p>"
        f"<p><b>{escape(verdict(diagnosis))}</b></p>{_table(_order(diagnosis))}"
    )
    packages = (
        ", ".join(f"{name} {version}" for name, version in facts.packages.items())
        or "none of the relevant packages"
    )
    return html_page("infmllm doctor", f"{body}<h2>Packages</h2><p>{escape(packages)}</p>", _STYLE)


def _table(results: list[Result]) -> str:
    rows = "".join(
        f'<tr class="{result.finding.level}{" aside" if result.aside else ""}">'
        f"<td>{result.finding.level}</td><td>{escape(result.check)}</td>"
        f"<td>{escape(result.finding.found)}</td><td>{escape(result.finding.cause)}</td>"
        f"<td>{f'<code>{escape(result.finding.fix)}</code>' if result.finding.fix else ''}</td>"
        f"<td>{', '.join(result.targets)}</td></tr>"
        for result in results
    )
    head = "".join(
        f"<th>{name}</th>" for name in ("level", "check", "found", "cause", "fix", "targets")
    )
    return f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'
