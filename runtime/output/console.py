"""How every command reports: answers on standard output, everything else on standard
error, faults as one line and an exit code.
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
    """A typer application in the house's style."""
    import typer

    return typer.Typer(
        help=help,
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
        no_args_is_help=False,
    )


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose faults are `UsageError`s, one line like all others."""

    def error(self, message: str) -> NoReturn:
        """See `argparse.ArgumentParser.error`."""
        raise UsageError(f"{message}; see {self.prog} --help")


def positive(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def note(text: str) -> None:
    """One line for the person, on standard error."""
    print(text, file=sys.stderr, flush=True)


def run_command(app: Callable[..., object]) -> None:
    """Runs a command line; an `InfMLLMError` becomes one line and its exit code, an
    interrupt exit code 130.
    """
    try:
        code = (
            app(standalone_mode=False) if hasattr(app, "registered_commands") else app()
        )  # typer would print a box of its own
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
        ):  # click's usage errors have it; anything else is a fault of ours
            raise
        note(f"error: {' '.join(str(error.format_message()).split())} See --help")
        sys.exit(UsageError.exit_code)


def peak_memory_mib() -> float:
    """The most memory this process has had resident, in MiB.

    On Linux from its own status: the figure of getrusage survives exec, and so counts
    the parent's memory too.
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
    """Raises `UsageError` now if a file cannot be written there later, after the work
    is done.
    """
    if path is not None and (path.is_dir() or not os.access(path.parent, os.W_OK)):
        raise UsageError(f"cannot write {path}; choose a file in a writable folder")


def track(items: Iterable[T], total: int, text: str) -> Iterator[T]:
    """Passes items through while a progress bar with the time left shows on standard
    error (if that is a terminal).
    """
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as rich_track

    yield from rich_track(items, description=text, total=total, console=Console(stderr=True))


class StepBar:
    """Progress of a job in named steps: a live line on a terminal, one line per step
    elsewhere.
    """

    def __init__(self, total: int, live: Progress | None) -> None:
        self._total, self._live, self._done, self._started = total, live, 0, time.monotonic()
        self._row = live.add_task("starting", total=total) if live else None

    def step(self, name: str) -> None:
        """The next step begins."""
        self._done += 1
        if self._live is None or self._row is None:
            note(f"[{self._done}/{self._total}] {name} ({time.monotonic() - self._started:.0f} s)")
        else:
            self._live.update(self._row, description=name, completed=self._done - 1)
        self._name = name

    def detail(self, done: int, total: int, text: str) -> None:
        """How far the step is."""
        if self._live is not None and self._row is not None:
            self._live.update(
                self._row,
                description=f"{self._name}: {text}",
                completed=self._done - 1 + done / max(1, total),
            )


@contextlib.contextmanager
def step_bar(total: int) -> Iterator[StepBar]:
    """A bar with the time left on standard error (if that is a terminal)."""
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
