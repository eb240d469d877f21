"""A whole run. Each model gets its checkpoint and PyTorch measurements on this GPU.
Each target and scheme is built, checked, timed alone, and timed beside PyTorch.

Every step runs in a side (a process, or in tests this process), has a time limit and
produces a row. A failed step does not stop the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from runtime.output.console import note
from tests.gpu.record import ABSENT, FAILED, MEASURED, PASSED, Report, Row
from tests.gpu.rounds import Once, interleaved
from tests.gpu.settings import (
    COMPILED,
    EAGER,
    FLOAT,
    OURS,
    PYTORCH,
    Settings,
    is_random,
    model_name,
)
from tests.gpu.sides import Absent, Broken, Side

__all__ = ["Run"]

Found = tuple[str, Mapping[str, Any]]
"""An outcome and its figures."""

_HALF = "float16"
TIME = "time"
"""The kind of `Absent` that only means that the time of the run was up."""


class _Peers:
    """PyTorch in fp16 for one model, loaded at the first request. If loading fails,
    every later call raises the same reason.
    """

    def __init__(self, run: Run, checkpoint: str) -> None:
        self._run, self._checkpoint = run, checkpoint
        self._fault: Absent | None = None
        self.side = run.open("PyTorch")
        self._loaded = False

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Runs a command in PyTorch's process. Raises `Absent` or `Broken`."""
        if not self._loaded and self._fault is None:
            try:
                self._run.ask(
                    self.side,
                    "load",
                    checkpoint=self._checkpoint,
                    dtype=_HALF,
                    device=self._run.settings.device,
                )
                self._loaded = True
            except (Absent, Broken) as error:
                self._fault = Absent(str(error), getattr(error, "kind", ""))
        if self._fault is not None:
            raise Absent(str(self._fault), self._fault.kind)
        return self._run.ask(self.side, do, **arguments)

    def contenders(self, steps: int) -> dict[str, Once]:
        """Returns PyTorch's two contenders, eager and compiled."""
        return {
            name: partial(self.ask, "round", steps=steps, variant=name)
            for name in (EAGER, COMPILED)
        }


class Run:
    """One run over everything that `settings` names. `keep` receives the report after
    every row; `problems` has the doctor's problem for each target.
    """

    def __init__(
        self,
        settings: Settings,
        report: Report,
        problems: Mapping[str, str],
        open_side: Callable[[str, Path], Side],
        commit: str,
        keep: Callable[[Report], None],
    ) -> None:
        self.settings, self.report, self._problems = settings, report, problems
        self._open, self._commit, self._keep = open_side, commit, keep
        self._until = None if settings.seconds is None else time.monotonic() + settings.seconds
        self._refused: dict[str, str] = {}  # targets whose engine cannot load here, and why

    def whole(self) -> Report:
        """Runs everything in order and returns the final report."""
        for source in self.settings.sources:
            with self._side("Builder") as builder:
                self._model(source, builder)
        return self.report

    def open(self, role: str) -> Side:
        """Opens a side with that role."""
        return self._open(role, self.settings.out / "log.txt")

    def ask(self, side: Side, do: str, **arguments: Any) -> dict[str, Any]:
        """Returns the answer to a command, limited by the step's time and by the
        remaining time of the run. Raises `Absent` or `Broken`.
        """
        left = (
            self.settings.step_seconds
            if self._until is None
            else min(self.settings.step_seconds, self._until - time.monotonic())
        )
        if left <= 0:
            raise Absent(
                "the time given was up before this; run the same command again with --resume", TIME
            )
        return side.ask(do, left, **arguments)

    @contextmanager
    def _side(self, role: str) -> Iterator[Side]:
        side = self.open(role)
        try:
            yield side
        finally:
            side.end()

    def _row(self, key: tuple[str, str, str, str], step: Callable[[], Found]) -> bool:
        """Runs a step and keeps its row. Returns False if it gave no usable figures."""
        old = self.report.find(*key)
        if self.settings.resume and old and old.outcome != ABSENT and old.commit == self._commit:
            return old.outcome != FAILED
        begun, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
        note(f"{datetime.now():%H:%M:%S} {' '.join(filter(None, key))}")
        values: Mapping[str, Any] = {}
        try:
            outcome, values = step()
            reason = str(values.get("fault", ""))
        except Absent as error:
            if error.kind == TIME and old:
                return False  # keeps the older row, which has more information
            outcome, reason = ABSENT, str(error)
        except Broken as error:
            outcome, reason = FAILED, str(error)
        if outcome in (ABSENT, FAILED):
            note(f"         {outcome}: {reason or 'out of tolerance'}")
        self.report = self.report.with_row(
            Row(
                *key,
                outcome,
                reason,
                values,
                round(time.monotonic() - begun, 1),
                self._commit,
                started,
            )
        )
        self._keep(self.report)
        return outcome in (PASSED, MEASURED)

    def _model(self, source: str | Path, builder: Side) -> None:
        model, settings = model_name(source), self.settings
        try:
            checkpoint = (
                str(source) if isinstance(source, Path) else self._checkpoint(builder, source)
            )
        except (Absent, Broken) as error:
            self._row(
                ("parity", model, PYTORCH, ""),
                partial(_absent, f"no checkpoint: {error}"),
            )
            return
        peers, proved = _Peers(self, checkpoint), False
        try:
            self._row(("bandwidth", "", "", ""), lambda: self._bandwidth(peers))
            for target in settings.targets:
                for scheme in settings.schemes_of(target):
                    bundle = self._bundle(builder, checkpoint, source, target, scheme)
                    if bundle and not proved:
                        self._pytorch(checkpoint, model, str(bundle), peers)
                        proved = True
                    if bundle:
                        self._engine(model, target, scheme, bundle, peers)
            if not any(
                row.part == "rounds" and row.model == model and row.outcome == MEASURED
                for row in self.report.rows
            ):
                self._row(("rounds", model, PYTORCH, "fp16"), lambda: self._rounds({}, peers, ""))
        finally:
            peers.side.end()

    def _checkpoint(self, builder: Side, preset: str) -> str:
        note(f"{datetime.now():%H:%M:%S} weights of {preset}")
        folder = self.settings.out / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        return str(self.ask(builder, "checkpoint", preset=preset, folder=str(folder))["path"])

    def _bandwidth(self, peers: _Peers) -> Found:
        """Measures the copy bandwidth with PyTorch, or with cuda-python if PyTorch
        fails. If both fail, the reason names both errors.
        """
        try:
            return MEASURED, {
                **self.ask(peers.side, "copy", device=self.settings.device),
                "by": PYTORCH,
            }
        except (Absent, Broken) as error:
            with self._side("Ours") as ours:
                try:
                    return MEASURED, {**self.ask(ours, "copy"), "by": "cuda-python"}
                except (Absent, Broken) as other:
                    raise Absent(f"{error}; {other}", getattr(other, "kind", "")) from None

    def _bundle(
        self, builder: Side, checkpoint: str, source: str | Path, target: str, scheme: str
    ) -> Path | None:
        """Returns the bundle, and builds it unless existing bundles are kept. If there
        is none, returns None and the parity row has the reason.
        """
        model, effort, key = (
            model_name(source),
            self.settings.effort,
            ("parity", model_name(source), target, scheme),
        )
        if target in self._refused:
            self._row(key, lambda: _absent(self._refused[target]))
            return None
        out = self.settings.out / "bundles" / f"{model}-{target}-{scheme}"
        out.parent.mkdir(parents=True, exist_ok=True)
        if self.settings.keeps_bundles and (out / "manifest.json").is_file():
            return out
        note(f"{datetime.now():%H:%M:%S} building {out.name}")
        arguments = {"checkpoint": checkpoint, "target": target, "scheme": scheme, "out": str(out)}
        try:
            self.ask(
                builder,
                "build",
                **arguments,
                samples=effort.samples,
                questions=effort.questions,
                random=is_random(source),
            )
            return out
        except (Absent, Broken) as error:
            self._row(key, partial(_raise, error, f"no bundle: {error}"))
            return None

    def _pytorch(self, checkpoint: str, model: str, bundle: str, peers: _Peers) -> None:
        """Runs PyTorch itself on the goldens. All engines' answers are compared with
        its fp32 answers.
        """
        given, new_tokens = self.settings, self.settings.effort.new_tokens

        def full() -> Found:
            with self._side("PyTorch") as side:
                self.ask(side, "load", checkpoint=checkpoint, dtype="float32", device=given.device)
                return MEASURED, {
                    **self.ask(side, "stages", bundle=bundle),
                    **self.ask(side, "answers", bundle=bundle, new_tokens=new_tokens),
                }

        def half() -> Found:
            return MEASURED, {
                **peers.ask("stages", bundle=bundle),
                **peers.ask("answers", bundle=bundle, new_tokens=new_tokens),
            }

        self._row(("parity", model, PYTORCH, "fp32"), full)
        self._row(("parity", model, PYTORCH, "fp16"), half)

    def _engine(self, model: str, target: str, scheme: str, bundle: Path, peers: _Peers) -> None:
        """Checks an engine. If it passes, times it alone and beside the other
        contenders.
        """
        effort, where = self.settings.effort, (model, target, scheme)
        with self._side("Ours") as ours:
            if not self._row(("parity", *where), lambda: self._prove(ours, target, bundle)):
                self._forget_times(where)
                return
        with self._side("Ours") as ours:
            arguments = {
                "bundle": str(bundle),
                "repetitions": effort.repetitions,
                "new_tokens": effort.new_tokens,
            }
            self._row(("latency", *where), lambda: (MEASURED, self.ask(ours, "bench", **arguments)))
        bundles = {OURS: bundle} | (
            {FLOAT: bundle.with_name(f"{model}-{target}-fp16")} if scheme != "fp16" else {}
        )
        self._row(("rounds", *where), lambda: self._rounds(bundles, peers, target))

    def _forget_times(self, where: tuple[str, str, str]) -> None:
        """Drops the timings of an earlier run if the engine is now known to be wrong."""
        known = self.report.find("parity", *where)
        if known and known.outcome == FAILED:
            rows = tuple(
                row for row in self.report.rows if row.part == "parity" or row.key[1:] != where
            )
            self.report = replace(self.report, rows=rows)
            self._keep(self.report)

    def _prove(self, ours: Side, target: str, bundle: Path) -> Found:
        try:
            found = self.ask(ours, "prove", bundle=str(bundle), target=target)
        except Absent as error:
            if error.kind != "EngineError":
                raise
            if not self._problems[target]:
                raise Broken(
                    f"{error} (the doctor sees nothing that keeps {target} from running)"
                ) from None
            self._refused[target] = str(error)
            raise
        if not _proves(found):
            return FAILED, found
        return PASSED, {
            **found,
            **self.ask(ours, "answers", new_tokens=self.settings.effort.new_tokens),
        }

    def _rounds(self, bundles: Mapping[str, Path], peers: _Peers, target: str) -> Found:
        """Times this project's bundles and PyTorch in turn. Raises `Absent` or `Broken`
        if the row's own contender failed.
        """
        steps, sides = self.settings.effort.steps, {name: self.open("Ours") for name in bundles}
        try:
            contenders: dict[str, Once] = {}
            for name, bundle in bundles.items():
                if name == OURS or (bundle / "manifest.json").is_file():
                    contenders[name] = self._contender(sides[name], bundle, target, steps)
            found = interleaved(contenders | peers.contenders(steps), self.settings.effort.rounds)
        finally:
            for side in sides.values():
                side.end()
        wanted = OURS if bundles else EAGER
        if wanted in found["broken"]:
            raise Broken(found["absent"][wanted])
        if wanted in found["absent"]:
            raise Absent(found["absent"][wanted])
        return MEASURED, found

    def _contender(self, side: Side, bundle: Path, target: str, steps: int) -> Once:
        opened: list[bool] = []

        def once() -> Mapping[str, float]:
            if not opened:
                found = self.ask(side, "prove", bundle=str(bundle), target=target)
                if not _proves(found):
                    raise Broken(
                        found["fault"] or "does not reproduce the goldens; see its row of parity"
                    )
                opened.append(True)
            return self.ask(side, "round", steps=steps)

        return once


def _proves(found: Mapping[str, Any]) -> bool:
    return not found["fault"] and all(stage["passed"] for stage in found["stages"])


def _absent(reason: str) -> Found:
    raise Absent(reason)


def _raise(fault: Absent | Broken, reason: str) -> Found:
    """Raises `Broken` for a build that broke down or missed its tolerance, and `Absent`
    for one that cannot be made here.
    """
    if isinstance(fault, Broken) or fault.kind in ("ParityError", "BuildError"):
        raise Broken(reason)
    raise Absent(reason, fault.kind)
