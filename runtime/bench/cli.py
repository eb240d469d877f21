"""`infmllm-bench`: measures a bundle's latency on this machine and writes the report.
`infmllm-bench diff A B` compares two reports, also in CI.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from runtime.bench.diff import changes, different_conditions, parse_limit, rows
from runtime.bench.html_report import report_page
from runtime.bench.metrics import summary
from runtime.bench.report import read_report, to_json
from runtime.bench.tables import (
    condition_lines,
    csv_table,
    markdown_table,
    markdown_tables,
    print_report,
)
from runtime.contract.bundle import default_bundle
from runtime.contract.errors import RegressionError, UsageError
from runtime.output.console import check_output, command_app, note, run_command

__all__ = ["main"]

app = command_app("Measure a bundle's latency.")
diff_app = command_app("Compare two latency reports.")
_HEAD = ("metric", "unit", "before", "after", "change", "noise", "")
_TABLE_WIDTH = 112  # used for pipes and logs, which have no terminal width
_EXAMPLES = """
Examples:

    infmllm-bench infmllm-bundle --json report.json --html report.html

    infmllm-bench infmllm-bundle --repetitions 100 --threads 1 --markdown report.md

    infmllm-bench diff before.json after.json --fail-if "ttft>+5%"
"""
_DIFF_EXAMPLES = """
Examples:

    infmllm-bench diff before.json after.json

    infmllm-bench diff before.json after.json --fail-if "ttft>+5%" --fail-if "peak_rss_mb>+50"
"""


@app.command(epilog=_EXAMPLES)
def run(
    bundle: Annotated[
        Path | None,
        typer.Argument(help="Bundle folder. Default: $INFMLLM_BUNDLE, then ./infmllm-bundle."),
    ] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Number of measured answers.")] = 20,
    warmup: Annotated[int, typer.Option(min=0, help="Unmeasured answers before them.")] = 3,
    new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens per answer.")] = 30,
    visual_tokens: Annotated[
        int | None,
        typer.Option(help="Number of visual tokens. Default: the model's preferred number."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads. Default: all available cores.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="Image to describe. Default: a generated 640x480 image.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the full report here; `diff` reads it.")
    ] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write tables as CSV.")] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", help="Write the tables as Markdown.")
    ] = None,
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write an HTML page with plots.")
    ] = None,
) -> None:
    """Measures the time of each stage of an answer, prints a table and writes reports.
    `infmllm-bench diff A.json B.json` compares two reports (see its own --help).
    """
    from runtime.bench.measure import BenchOptions, measure

    for path in (json_file, csv_file, markdown_file, html_file):
        check_output(path)
    report = measure(
        BenchOptions(
            bundle or default_bundle(),
            repetitions,
            warmup,
            new_tokens,
            visual_tokens,
            threads,
            image,
        )
    )
    print_report(report)
    for line in condition_lines(report):
        note(line)
    _write(json_file, lambda: to_json(report, summary(report)))
    _write(csv_file, lambda: csv_table(report))
    _write(markdown_file, lambda: markdown_tables(report))
    _write(html_file, lambda: report_page(report))


@diff_app.command(epilog=_DIFF_EXAMPLES)
def diff(
    before: Annotated[Path, typer.Argument(help="Old report, written by --json.")],
    after: Annotated[Path, typer.Argument(help="New report, written by --json.")],
    fail_if: Annotated[
        list[str] | None,
        typer.Option(help="Fail if this holds, such as 'ttft>+5%'; may be repeated."),
    ] = None,
    allow_different: Annotated[
        bool,
        typer.Option("--allow-different", help="Check limits even if machine or settings differ."),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the changes as JSON.")
    ] = None,
    markdown_file: Annotated[
        Path | None, typer.Option("--markdown", help="Write the table as Markdown.")
    ] = None,
) -> None:
    """Prints every metric of both reports with its change. Exit code 1 and a one-line
    error if a --fail-if limit is exceeded.
    """
    limits = [parse_limit(text) for text in fail_if or ()]
    check_output(json_file)
    check_output(markdown_file)
    first, second = read_report(before), read_report(after)
    differing = different_conditions(first, second)
    if differing and limits and not allow_different:
        raise UsageError(
            f"--fail-if needs reports measured under the same conditions; different are: "
            f"{'; '.join(differing)}; measure again, or add --allow-different"
        )
    found = changes(first, second)
    broken = [broken for limit in limits if (broken := limit.broken(found))]
    _print_table(rows(found))
    if differing:
        note(f"warning: conditions differ: {'; '.join(differing)}")
    _write(
        json_file,
        lambda: (
            json.dumps(
                {"conditions_differ": differing, "changes": [asdict(change) for change in found]},
                indent=1,
            )
            + "\n"
        ),
    )
    _write(markdown_file, lambda: markdown_table(_HEAD, rows(found)))
    if broken:
        raise RegressionError(f"{len(broken)} of {len(limits)} limits broken: {'; '.join(broken)}")


def _print_table(cells: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*_HEAD)
    for row in cells:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else _TABLE_WIDTH).print(table)


def _write(path: Path | None, text: Callable[[], str]) -> None:
    """Writes the file if a path was given. Raises `UsageError` if it cannot be written."""
    if path is None:
        return
    try:
        path.write_text(text())
    except OSError as error:
        raise UsageError(f"cannot write {path} ({error.strerror}); choose another file") from None
    note(f"wrote {path}")


def _compare() -> object:
    """Runs `diff` with the arguments that follow it."""
    return diff_app(args=sys.argv[2:], prog_name="infmllm-bench diff", standalone_mode=False)


def main() -> None:
    """Entry point of `infmllm-bench`. The first argument `diff` compares reports, so a
    bundle folder called diff must be given as ./diff.
    """
    run_command(_compare if sys.argv[1:2] == ["diff"] else app)
