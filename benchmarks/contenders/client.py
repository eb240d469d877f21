"""The client of `contenders.worker`: starts the processes of contenders, sends
commands, and keeps as many processes as memory allows.

Processes stay alive between rounds. When memory runs low, the most recently used
process is ended, because its next turn is furthest away.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from contenders import ENGINES, Contender
from contenders.machine import available_gib

__all__ = ["Absent", "Pool"]

_ROOT = Path(__file__).parents[2]
_SPARE_GIB = 3.0  # left for the system and for the page cache of mapped weights
_GROWTH = 2.5  # assumed memory per byte on disk, until the engine's peak is known


class Absent(Exception):
    """A contender cannot be measured here; the message says why and what to do."""


class _Process:
    """A running worker process."""

    def __init__(
        self, folder: Path, contender: Contender, python: str, threads: int, log: Path
    ) -> None:
        paths = [
            str(_ROOT / "benchmarks"),
            str(_ROOT),
            *filter(None, [os.environ.get("PYTHONPATH")]),
        ]
        counts = dict.fromkeys(
            ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)
        )
        environment = {
            **os.environ,
            **counts,
            "PYTHONPATH": os.pathsep.join(paths),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [python, "-m", "contenders.worker", str(folder), contender.name, str(threads)]
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                cwd=_ROOT,
                start_new_session=True,
            )
        self._contender, self._log = contender, log

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Sends one command and returns its answer. Raises `Absent`."""
        process = self._process
        assert process.stdin and process.stdout, "both are pipes"
        try:
            process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            pass  # the missing answer below reports it
        line = process.stdout.readline()
        if not line:
            raise Absent(f"{do}: the process ended with {process.wait()}; see {self._log.name}")
        answer: dict[str, Any] = json.loads(line)
        if "missing" in answer:
            raise Absent(f"{answer['missing']}; {ENGINES[self._contender.engine]}")
        if "error" in answer:
            raise Absent(f"{do}: {answer['error']}")
        return answer

    def end(self) -> None:
        """Ends the process and waits for it."""
        assert self._process.stdin, "a pipe"
        self._process.stdin.close()
        self._process.wait()


class Pool:
    """The processes of the contenders. `pythons` maps an engine to its interpreter if
    it is not the default `python`.
    """

    def __init__(self, folder: Path, pythons: dict[str, str], python: str, threads: int) -> None:
        self._folder, self._pythons, self._python, self._threads = folder, pythons, python, threads
        self._alive: dict[str, _Process] = {}  # in the order of last use
        self._needs: dict[str, float] = {}
        self.loads: dict[str, list[dict[str, Any]]] = {}

    def once(self, contender: Contender, do: str, **arguments: Any) -> dict[str, Any]:
        """Runs one command in a new process that ends afterwards."""
        process = self._start(contender)
        try:
            return process.ask(do, **arguments)
        finally:
            process.end()

    def ask(self, contender: Contender, do: str, **arguments: Any) -> dict[str, Any]:
        """Runs one command in a contender's process, and loads the contender first if
        necessary.
        """
        process = self._alive.pop(contender.name, None)
        if process is None:
            self._make_room(contender)
            process = self._start(contender)
            try:
                answer = process.ask("load")
            except Absent:
                process.end()
                raise
            self.loads.setdefault(contender.name, []).append(answer)
            self._needs[contender.name] = _GROWTH * answer["disk_bytes"] / (1 << 30)
        self._alive[contender.name] = process
        answer = process.ask(do, **arguments)
        if "peak_mib" in answer:
            self._needs[contender.name] = answer["peak_mib"] / 1024
        return answer

    def end(self) -> None:
        """Ends all processes."""
        while self._alive:
            self._alive.popitem()[1].end()

    def _start(self, contender: Contender) -> _Process:
        python = self._pythons.get(contender.engine, self._python)
        return _Process(
            self._folder, contender, python, self._threads, self._folder / f"{contender.engine}.log"
        )

    def _make_room(self, contender: Contender) -> None:
        while self._alive and available_gib() < self._needs.get(contender.name, 5.0) + _SPARE_GIB:
            self._alive.popitem()[1].end()
