"""`python -m tests.gpu`: checks and times this project's engines on this machine's GPU.
All runs into the same folder share one report.

examples:
  python -m tests.gpu --out gpu-report
      the demo and the edge preset, everything that loads; hours of building
  python -m tests.gpu --out gpu-report --preset nano --quick
      the demo alone, few rounds: minutes
  python -m tests.gpu --out gpu-report --preset edge --targets cuda --minutes 9 --resume
      goes on where the last command stopped; repeat until nothing is left
  python -m tests.gpu --out gpu-report --preset 7b --schemes fp16 int8-weights

The folder keeps checkpoints, bundles, compiled engines, `log.txt` (output of
libraries), `report.json` and `report.html`. Exit code: 0 if nothing that ran failed
(also without a GPU, which the verdict then states), 1 if something failed, 2 for an
invalid command.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from runtime.contract.errors import UsageError
from runtime.doctor.facts import Facts, gather
from runtime.output.console import OneLineParser, note, positive, run_command
from tests.gpu import machine
from tests.gpu.page import report_page
from tests.gpu.record import JSON, Report, read_report, write_report
from tests.gpu.run import Run
from tests.gpu.settings import FULL, QUICK, TARGETS, Settings
from tests.gpu.sides import Process, Side
from tests.gpu.verdict import conclusions, verdict

__all__ = ["check", "main"]

HTML = "report.html"


def check(
    settings: Settings,
    facts: Facts,
    open_side: Callable[[str, Path], Side] = Process,
    command: str = "",
) -> Report:
    """Runs the checks once and merges the results into the report in `settings.out`, if
    there is one. Raises `UsageError` if that report is from another machine.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    found, commit = machine.describe(facts), machine.commit()
    path = settings.out / JSON
    report = read_report(path) if path.exists() else Report(found)
    if report.machine.get("gpus") != found["gpus"]:
        names = [
            ", ".join(gpu["name"] for gpu in gpus) or "no GPU"
            for gpus in (report.machine.get("gpus", ()), found["gpus"])
        ]
        raise UsageError(
            f"{path} was measured with {names[0]}, this machine has {names[1]}; choose another "
            f"--out"
        )
    started = datetime.now(UTC).isoformat(timespec="seconds")
    report = replace(
        report,
        machine=found,
        runs=(*report.runs, {"command": command, "commit": commit, "started": started}),
    )

    def keep(report: Report) -> None:
        write_report(path, report, conclusions(report))
        (settings.out / HTML).write_text(report_page(report))

    keep(report)
    return Run(
        settings, report, machine.problems(facts, settings.targets), open_side, commit, keep
    ).whole()


def _settings(arguments: Sequence[str]) -> tuple[Settings, bool]:
    """Returns the parsed settings, and whether to print the report as JSON. Raises
    `UsageError`.
    """
    parser = OneLineParser(
        "python -m tests.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder of the report and of everything that is kept for the next run",
    )
    parser.add_argument(
        "--preset",
        nargs="+",
        help="nano (the demo), edge, 7b: random weights but for nano (default: nano edge)",
    )
    parser.add_argument(
        "--checkpoint", type=Path, help="a checkpoint of your own; alone, or beside --preset"
    )
    parser.add_argument(
        "--targets", nargs="+", default=TARGETS, help=f"of {' '.join(TARGETS)} (default: all)"
    )
    parser.add_argument(
        "--schemes",
        nargs="+",
        default=(),
        help="precisions (default: all a target has; with --quick fp16 int8 int8-weights)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few rounds, answers and calibration images"
    )
    parser.add_argument("--rounds", type=positive, help="timed rounds over all contenders")
    parser.add_argument(
        "--minutes",
        type=float,
        help="start nothing, and end what runs, after this; what is left says so",
    )
    parser.add_argument(
        "--step-minutes",
        type=float,
        default=30.0,
        help="end a single step after this (default: 30)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="do not measure again what the report has of this commit",
    )
    parser.add_argument(
        "--no-build",
        action="store_true",
        help="take bundles in OUT/bundles as they are, such as ones built on another machine",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    given = parser.parse_args(arguments)
    if given.checkpoint and not (given.checkpoint / "config.json").is_file():
        raise UsageError(
            f"no checkpoint at {given.checkpoint} (config.json not found); name a checkpoint's "
            f"folder"
        )
    effort = QUICK if given.quick else FULL
    settings = Settings(
        given.out.resolve(),
        tuple(given.preset or (() if given.checkpoint else ("nano", "edge"))),
        given.checkpoint.resolve() if given.checkpoint else None,
        tuple(given.targets),
        tuple(given.schemes),
        replace(effort, rounds=given.rounds) if given.rounds else effort,
        given.step_minutes * 60,
        None if given.minutes is None else given.minutes * 60,
        given.resume,
        given.quick,
        given.no_build,
    )
    return settings, given.json


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    settings, as_json = _settings(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("INFMLLM_CACHE", str(settings.out / "cache"))
    note(f"{datetime.now():%H:%M:%S} looking at the machine")
    report = check(
        settings,
        gather(),
        command=shlex.join(
            ["python", "-m", "tests.gpu", *(sys.argv[1:] if arguments is None else arguments)]
        ),
    )
    text, code = verdict(report)
    print((settings.out / JSON).read_text() if as_json else text, end="" if as_json else "\n")
    note(f"report: {settings.out / HTML}, {settings.out / JSON}")
    sys.exit(code)


if __name__ == "__main__":
    run_command(main)
