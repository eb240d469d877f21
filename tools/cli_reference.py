"""Writes docs/cli.md: the `--help` text of every command, at a fixed width.

usage: python tools/cli_reference.py [--write]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

__all__ = ["PAGE", "reference"]

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"
COMMANDS = {
    "infmllm-run": ("runtime.cli.run", ((),)),
    "infmllm-eval": ("runtime.evaluation.cli", ((),)),
    "infmllm-bench": ("runtime.bench.cli", ((), ("diff",))),
    "infmllm-export": (
        "export.cli",
        ((), *((name,) for name in ("build", "parity", "plan", "inspect", "import", "doctor"))),
    ),
    "infmllm-train": ("trainer.cli", ((),)),
}
_HEAD = """# Command reference

This page is generated from the commands' own `--help` by `python tools/cli_reference.py --write`.
A test checks that it is current.
"""


def reference() -> str:
    """Returns the page."""
    parts = [_HEAD]
    for command, (module, subcommands) in COMMANDS.items():
        for words in subcommands:
            title = " ".join((command, *words))
            parts.append(f"## {title}\n\n```text\n{_help(command, module, words)}\n```\n")
    return "\n".join(parts)


def _help(command: str, module: str, words: tuple[str, ...]) -> str:
    code = f"import sys; sys.argv[0] = {command!r}; from {module} import main; main()"
    plain = {"COLUMNS": "88", "TERMINAL_WIDTH": "88", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--help"],
        cwd=PAGE.parents[1],
        env=os.environ | plain,
        capture_output=True,
        text=True,
        check=True,
    )
    return "\n".join(line.rstrip() for line in done.stdout.strip("\n").splitlines())


def main() -> None:
    """Prints the page, or writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="write docs/cli.md")
    if parser.parse_args().write:
        PAGE.write_text(reference())
    else:
        print(reference(), end="")


if __name__ == "__main__":
    main()
