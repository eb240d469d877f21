"""Console output of every command. Answers go to standard output and everything else to
standard error; an error is one line and an exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from runtime.contract.errors import InfMLLMError, UsageError

if TYPE_CHECKING:
    import typer
    from rich.progress import Progress

__all__ = [
    "OneLineParser",
    "StepBar",
    "check_output",
    "command_app",
    "note",
    "peak_memory_mib",
    "positive",
    "run_command",
    "step_bar",
    "track",
]

T = TypeVar("T")
_INTERRUPTED = 130


def command_app(help: str) -> typer.Typer:
    """Returns a typer application with the settings that all commands share."""
    import typer

    return typer.Typer(
        help=help,
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        no_args_is_help=False,
    )


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser that raises `UsageError`, so that its errors are one line too."""

    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser.error`."""
        raise UsageError(f"{message}; see: {self.prog} --help")


def positive(text: str) -> int:
    """Parses a whole number of at least 1, as an argparse type."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of 1 or more")
    return value


def note(text: str) -> None:
    """Prints one line for the user on standard error."""
    print(text, file=sys.stderr, flush=True)


def run_command(app: Callable[..., object]) -> None:
    """Runs a command line. An `InfMLLMError` becomes one line and its exit code; an
    interrupt becomes exit code 130.
    """
    try:
        code = (
            app(standalone_mode=False) if hasattr(app, "registered_commands") else app()
        )  # in standalone mode typer would print errors in a box
        if code == _INTERRUPTED:  # click turns an interrupt into this value
            raise KeyboardInterrupt
    except InfMLLMError as error:
        note(f"error: {' '.join(str(error).split())}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        note("interrupted")
        sys.exit(_INTERRUPTED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        if not hasattr(
            error, "format_message"
        ):  # click's usage errors have it; any other exception is a bug
            raise
        note(f"error: {' '.join(str(error.format_message()).split())} See --help")
        sys.exit(UsageError.exit_code)


def peak_memory_mib() -> float:
    """Returns the peak resident memory of this process in MiB.

    On Linux it is read from /proc/self/status. The value of getrusage survives exec, so
    it would include the parent's memory.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
            1024 if sys.platform == "linux" else 1 << 20
        )


def check_output(path: Path | None) -> None:
    """Raises `UsageError` if a file cannot be written. Commands call it early, so that
    they do not fail only after the work is done.
    """
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise UsageError(f"cannot write {path}; choose a file in a writable folder")


def track(items: Iterable[T], total: int, text: str) -> Iterator[T]:
    """Yields the items and shows a progress bar with the remaining time on standard
    error, if that is a terminal.
    """
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as rich_track

    yield from rich_track(items, description=text, total=total, console=Console(stderr=True))


class StepBar:
    """Progress of a task with named steps: a live bar on a terminal, one line per step
    elsewhere.
    """

    def __init__(self, total: int, live: Progress | None) -> None:
        self._total, self._live, self._done, self._started = total, live, 0, time.monotonic()
        self._row = live.add_task("starting", total=total) if live else None

    def step(self, name: str) -> None:
        """Marks the start of the next step."""
        self._done += 1
        if self._live is None or self._row is None:
            note(f"[{self._done}/{self._total}] {name} ({time.monotonic() - self._started:.0f} s)")
        else:
            self._live.update(self._row, description=name, completed=self._done - 1)
        self._name = name

    def detail(self, done: int, total: int, text: str) -> None:
        """Shows the progress within the current step; does nothing without a terminal."""
        if self._live is not None and self._row is not None:
            self._live.update(
                self._row,
                description=f"{self._name}: {text}",
                completed=self._done - 1 + done / max(1, total),
            )


@contextlib.contextmanager
def step_bar(total: int) -> Iterator[StepBar]:
    """Yields a `StepBar`: a live bar with the remaining time if standard error is a
    terminal, else one that prints a line per step.
    """
    if not sys.stderr.isatty():
        yield StepBar(total, None)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as live:
        yield StepBar(total, live)
