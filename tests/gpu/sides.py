"""The client of `workers`: a process with one role that runs commands under a time
limit, or the same role within this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Protocol

from tests.gpu.workers import ROLES, reply

__all__ = ["Absent", "Broken", "Local", "Process", "Side"]

_ROOT = Path(__file__).parents[2]


class Absent(Exception):
    """Something that cannot be measured here. `kind` is the class name of the project's
    error that caused it, if any.
    """

    def __init__(self, reason: str, kind: str = "") -> None:
        super().__init__(reason)
        self.kind = kind


class Broken(Exception):
    """A step that broke down: its process died or raised an unexpected exception."""


class Side(Protocol):
    """A place where a role's commands run."""

    def ask(self, do: str, seconds: float, **arguments: Any) -> dict[str, Any]:
        """Returns the answer to a command. Raises `Absent` or `Broken`."""
        ...

    def end(self) -> None:
        """Ends the side; it accepts no more commands."""
        ...


def _unwrap(found: dict[str, Any]) -> dict[str, Any]:
    if "missing" in found:
        raise Absent(found["missing"])
    if "refused" in found:
        raise Absent(found["refused"], found["kind"])
    if "broken" in found:
        raise Broken(found["broken"])
    answer: dict[str, Any] = found["answer"]
    return answer


class Local:
    """A role within this process, for tests that simulate a GPU here."""

    def __init__(self, role: str, log: Path) -> None:
        self._worker = ROLES[role]()

    def ask(self, do: str, seconds: float, **arguments: Any) -> dict[str, Any]:
        """See `Side.ask`."""
        return _unwrap(json.loads(json.dumps(reply(self._worker, do, **arguments))))

    def end(self) -> None:
        """See `Side.end`."""
        self._worker = None


class Process:
    """A role in its own process, whose messages go to a log."""

    def __init__(self, role: str, log: Path) -> None:
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.gpu.workers", role],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                cwd=_ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
        self._log, self._lines = log, queue.Queue[str]()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout, "a pipe"
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def ask(self, do: str, seconds: float, **arguments: Any) -> dict[str, Any]:
        """See `Side.ask`. A process that exceeds the time limit is killed."""
        assert self._process.stdin, "a pipe"
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the missing answer below reports it
        try:
            line = self._lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            self._process.kill()
            raise Absent(
                f"{do} took longer than {seconds:.0f} s and was ended; run it again, or give it "
                f"more time"
            ) from None
        if not line:
            self._lines.put("")
            raise Broken(
                f"{do}: its process ended with {self._process.wait()}: {self._last_words()}"
            )
        return _unwrap(json.loads(line))

    def _last_words(self) -> str:
        lines = [
            line.strip()
            for line in self._log.read_text(errors="replace").splitlines()
            if line.strip()
        ]
        return f"{lines[-1] if lines else 'no message':.200}"

    def end(self) -> None:
        """See `Side.end`. A process that does not end by itself is killed."""
        assert self._process.stdin, "a pipe"
        with contextlib.suppress(BrokenPipeError):  # it died with a command unread
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
