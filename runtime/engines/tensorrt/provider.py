"""Provides a graph's engine: chooses the variant of the graph, then opens its engine
from the cache or builds it now.

If TensorRT rejects a variant, or the variant failed its validation on this machine, the
next variant is used and a note is printed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.contract.bundle import GOLDENS, Bundle
from runtime.contract.errors import EngineError
from runtime.contract.graphs import present
from runtime.contract.onnx_guard import external_locations
from runtime.engines import EngineOptions
from runtime.engines.tensorrt.build_engine import RefusedError, build, workspace_bytes
from runtime.engines.tensorrt.engine_cache import EngineCache, fingerprint
from runtime.engines.tensorrt.graph_variants import (
    GraphVariant,
    check_tensors,
    decoder_variant,
    vision_variant,
)
from runtime.engines.tensorrt.trt import Machine
from runtime.hardware.system import read_memory
from runtime.output.console import note

__all__ = ["EngineProvider", "Part", "decoder_variants", "vision_variants"]

_COPIES = 3


class Part:
    """One of the two graphs: its remaining variants, of which the first is in use, and
    the engine of that variant.

    `stages` are the validation stages that depend on this graph. `proved` is true once
    it has passed them on this machine.
    """

    def __init__(self, stages: Sequence[str], forms: Sequence[GraphVariant]) -> None:
        self.stages, self.forms = stages, list(forms)
        self.engine: Any = None
        self.proved = False

    @property
    def form(self) -> GraphVariant:
        """The variant in use."""
        return self.forms[0]


def vision_variants(bundle: Bundle, machine: Machine) -> list[GraphVariant]:
    """Returns the vision graph's variants that this bundle contains and this TensorRT
    supports, fastest first.
    """
    forms = [vision_variant(bundle.spec, fused) for fused in (True, False)]
    return _available(forms, bundle, machine)


def decoder_variants(bundle: Bundle, machine: Machine, context: int | None) -> list[GraphVariant]:
    """Returns the decoder's variants in the same way. The caches of the fused variant
    have the size the bundle was built with, so a smaller `context` rules it out.
    """
    most = bundle.capacity
    rows = min(context or most, most)
    forms = _available(
        [decoder_variant(bundle.spec, fused, rows) for fused in (True, False)], bundle, machine
    )
    if rows < most and forms[0].fused:
        note(
            f"--context {rows} uses the slower plain decoder; the faster fused decoder needs the "
            f"full context of {most}: leave out --context to use it"
        )
        forms = forms[1:]
    return forms


def _available(
    forms: Sequence[GraphVariant], bundle: Bundle, machine: Machine
) -> list[GraphVariant]:
    return [
        form for form in forms if form.file in bundle.files and machine.has(form.operators.values())
    ]


class EngineProvider:
    """Opens or builds the engines of one bundle on one machine."""

    def __init__(self, bundle: Bundle, machine: Machine, options: EngineOptions) -> None:
        self._bundle, self._machine, self._options = bundle, machine, options
        self._store = EngineCache(options.engine_cache)
        judged = json.dumps([bundle.files[GOLDENS][1], dict(bundle.tolerance)], sort_keys=True)
        self._validation_key = hashlib.sha256(
            judged.encode()
        ).hexdigest()  # a validation result holds only for these goldens and tolerances

    def fill(self, part: Part) -> None:
        """Gives a part the engine of its first usable variant. Raises `EngineError` or
        `BundleError`.
        """
        while part.engine is None:
            name = self._name(part.form)
            try:
                if reason := self._store.refused(name):
                    raise RefusedError(
                        f"{reason} (remembered; remove {self._store.folder(name)} to try again)",
                        lasting=False,
                    )
                part.engine = self._open(name, part.form) or self._build(name, part.form)
            except RefusedError as error:
                self._next(part, error)
        part.proved = self._store.passed(self._name(part.form), self._validation_key)

    def conclude(self, parts: Sequence[Part], failed: Mapping[str, str]) -> None:
        """Accepts the parts whose stages passed. A part that failed gets the engine of
        its next variant, which must then be validated.

        Raises `EngineError` if there is no other variant.
        """
        for part in parts:
            reasons = [failed[stage] for stage in part.stages if stage in failed]
            if not reasons:
                self._store.accept(self._name(part.form), self._validation_key)
                part.proved = True
                continue
            found = (
                f"{part.form.file} gives wrong results for the bundle's golden cases on "
                f"{self._machine.name}: {', '.join(reasons)}"
            )
            part.engine = None
            self._next(part, RefusedError(found, lasting=True))
        for part in parts:
            self.fill(part)

    def _next(self, part: Part, error: RefusedError) -> None:
        """Removes the variant in use. Raises the error, with advice, if it was the last
        one.
        """
        if error.lasting:
            self._store.refuse(self._name(part.form), str(error))
        if len(part.forms) == 1:
            raise EngineError(
                f"{error}; update TensorRT and the driver, or build the bundle with --target cpu"
            ) from None
        note(f"{error}; {part.forms[1].file} takes its place")
        del part.forms[0]

    def _name(self, form: GraphVariant) -> str:
        return fingerprint(self._bundle, self._machine, form)

    def _open(self, name: str, form: GraphVariant) -> Any:
        """Returns the cached engine, or None. Removes an engine that TensorRT can no
        longer read.
        """
        content = self._store.read(name)
        if content is None:
            return None
        engine = self._machine.open_serialized(content)
        if engine is None:
            note(
                f"the saved engine of {form.file} cannot be loaded "
                f"({self._machine.journal.read()}); building it again"
            )
            self._store.drop(name)
            return None
        return self._check(engine, form)

    def _build(self, name: str, form: GraphVariant) -> Any:
        with self._store.making(name):
            if engine := self._open(name, form):  # another process may just have made it
                return engine
            self._store.drop(
                name
            )  # a validation result of an earlier engine does not apply to a new one
            workspace = workspace_bytes(self._machine, self._options.workspace_mb)
            self._tell_of_memory(form)
            content = build(
                self._machine,
                self._bundle.file(form.file),
                form,
                workspace,
                self._store.timings(self._machine),
            )
            self._store.write(name, content)
        engine = self._machine.open_serialized(content)
        if engine is None:
            raise self._machine.refusal(f"the engine of {form.file}, built a moment ago,")
        return self._check(engine, form)

    def _tell_of_memory(self, form: GraphVariant) -> None:
        """Warns if the system may kill the build for lack of memory: weights are held
        three times, as read, as compiled and as written.
        """
        needed = (
            _COPIES
            * sum(
                self._bundle.files[name][0]
                for name in external_locations(self._bundle.file(form.file))
            )
            / 1e6
        )
        there = read_memory(Path("/")).available_mb
        if there < needed:
            note(
                f"building the engine needs about {needed:.0f} MB of memory, {there:.0f} MB are "
                f"available; if it is killed, close other programs or add swap"
            )

    def _check(self, engine: Any, form: GraphVariant) -> Any:
        """Returns the engine if its inputs and outputs match the variant. Raises
        `BundleError` or `RefusedError`.
        """
        trt = self._machine.trt
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        for mode, expected in (
            (trt.TensorIOMode.INPUT, form.inputs),
            (trt.TensorIOMode.OUTPUT, form.outputs),
        ):
            mine = [name for name in names if engine.get_tensor_mode(name) == mode]
            found = {
                name: (
                    trt.nptype(engine.get_tensor_dtype(name)),
                    tuple(engine.get_tensor_shape(name)),
                )
                for name in mine
            }
            check_tensors(found, expected, self._bundle.path / form.file)
        shared = (
            {name: engine.get_aliased_input_tensor(name) for name in form.outputs}
            if form.updates_caches
            else {}
        )
        apart = [
            name
            for name, source in shared.items()
            if source != name.removeprefix(present("")) and name.startswith(present(""))
        ]
        if apart:
            raise RefusedError(
                f"TensorRT {self._machine.release} does not update {apart[0]} of {form.file} in "
                f"place",
                lasting=True,
            )
        return engine
