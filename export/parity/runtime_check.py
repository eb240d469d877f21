"""Replays users' calls and questions through the runtime: over the float views of a
bundle's graphs, as closely as float32 allows, and over the bundle itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calibration.samples import Case
from export.parity.answer_check import check_answers
from export.parity.calls import CallResult, Conversation, replay_calls
from export.parity.cpu_reference import reference_session
from export.parity.finding import Finding
from export.parity.float_bundle import FloatEngine, float_engine
from export.parity.float_view import FloatView, float_view
from export.parity.rounded_engine import RoundedEngine
from export.parity.structure import compare_vision
from export.targets import find_lowering
from runtime.contract.bundle import (
    DECODER,
    DECODER_FUSED,
    PREFILL,
    VISION,
    VISION_FUSED,
    Bundle,
)
from runtime.contract.errors import ContextError
from runtime.engines import Engine
from runtime.generation.token_embeddings import open_token_embeddings
from runtime.parity import centred
from runtime.session import Session, load
from trainer.checkpoint import StoredCheckpoint

__all__ = ["check_calls", "rounding_kinds"]

_FLOAT = 1e-4  # of whole calls in float: the errors of all blocks together
_MARGIN = 2e-3  # share of a row's deviation by which a token may fall behind the best
_CALLS: Mapping[str, float] = {  # error of whole calls, by how the kernels round their input
    "float": 2e-3,
    "half": 0.03,
    "block": 0.15,
    "int8-row": 0.15,
    "int8-tensor": 0.15,
    "int8-static": 0.15,
    "int8-signed": 0.35,
}


@dataclass(frozen=True)
class _Form:
    """One form of a bundle's graphs: plain or fused."""

    bundle: Bundle
    checkpoint: StoredCheckpoint
    vision: FloatView
    decoder: FloatView
    prefill: FloatView
    fused: bool

    @property
    def views(self) -> dict[str, FloatView]:
        """The views by file name, as the CPU's runtime opens them."""
        found = {VISION: self.vision, DECODER: self.decoder}
        return found if self.prefill is self.decoder else {**found, PREFILL: self.prefill}

    def reference(self, engine: Engine, rounds: bool) -> RoundedEngine:
        """Returns PyTorch as an engine like the given one."""
        found = RoundedEngine(
            self.checkpoint.spec,
            self.vision,
            self.decoder,
            self.prefill,
            self.checkpoint.read,
            engine.capacity,
            rounds,
        )
        found.verifies = engine.verifies
        return found


def rounding_kinds(view: FloatView) -> set[str]:
    """Returns how a graph's kernels round their inputs, and "half" for half precision."""
    found = {weight.activation for weight in view.weights.values()}
    return found | ({"half"} if view.half else set())


def check_calls(
    bundle: Bundle, checkpoint: StoredCheckpoint, cases: Sequence[Case]
) -> Iterator[Finding]:
    """Yields the comparisons of every form of a bundle's graphs."""
    talks = _conversations(bundle, checkpoint, cases)
    for form in _forms(bundle, checkpoint):
        yield from _check_float(form, talks)
        yield from _check_real(form, talks)


def _forms(bundle: Bundle, checkpoint: StoredCheckpoint) -> Iterator[_Form]:
    def view(file: str) -> FloatView:
        return float_view(bundle.file(file), bundle.spec)

    decoder = view(DECODER)
    prefill = view(PREFILL) if PREFILL in bundle.files else decoder
    yield _Form(bundle, checkpoint, view(VISION), decoder, prefill, False)
    if DECODER_FUSED in bundle.files:
        decoder = view(DECODER_FUSED)
        yield _Form(bundle, checkpoint, view(VISION_FUSED), decoder, decoder, True)


def _on_cpu(bundle: Bundle) -> bool:
    return not find_lowering(bundle.target).compare_on_cpu


def _check_float(form: _Form, talks: Sequence[Conversation]) -> Iterator[Finding]:
    bundle, cpu = form.bundle, _on_cpu(form.bundle)
    with tempfile.TemporaryDirectory() as folder:
        engine: Engine = (
            float_engine(bundle, form.views, Path(folder))
            if cpu
            else FloatEngine(bundle, form.vision, form.decoder)  # type: ignore[assignment]
        )
        reference = form.reference(engine, False)
        yield _replay(bundle, engine, reference, talks, cpu, "calls in float", _FLOAT)
        yield _answers(Session(bundle, engine), reference, cpu)


def _answers(session: Session, reference: RoundedEngine, batches: bool) -> Finding:
    """Asks until the first fault. A context that is too short for a conversation ends it."""
    try:
        fault = next(check_answers(session, reference, _MARGIN, batches), None)
    except ContextError:
        return Finding("answers", "runtime", True, "not asked in full: the context is too short")
    return Finding("answers", "runtime", fault is None, str(fault or ""))


def _check_real(form: _Form, talks: Sequence[Conversation]) -> Iterator[Finding]:
    bundle = form.bundle
    session = (
        load(bundle.path, engine_cache=False)
        if _on_cpu(bundle)
        else reference_session(bundle, form.fused)
    )
    kinds = set[str]().union(*(rounding_kinds(view) for view in form.views.values()))
    reference = form.reference(session.engine, True)
    batches = find_lowering(bundle.target).batches
    allowed = max(_CALLS[kind] for kind in kinds)
    yield _replay(bundle, session.engine, reference, talks, batches, "calls", allowed)


def _conversations(
    bundle: Bundle, checkpoint: StoredCheckpoint, cases: Sequence[Case]
) -> list[Conversation]:
    _, traces = compare_vision(bundle.file(VISION), checkpoint.spec, cases[:2], checkpoint.read)
    talks = []
    for trace in traces:
        case, embeds = trace.case, trace.image_embeds
        assert embeds is not None, "the blocks ran"
        parts = (case.pixels, case.pool_size, case.before, case.after, case.answer)
        talks.append(Conversation(*parts, embeds))
    return talks


def _replay(
    bundle: Bundle,
    engine: Engine,
    reference: RoundedEngine,
    talks: Sequence[Conversation],
    batches: bool,
    where: str,
    allowed: float,
) -> Finding:
    table = open_token_embeddings(bundle)
    found, expected = (
        replay_calls(one, table, bundle.spec, talks, batches) for one in (engine, reference)
    )
    worst: dict[str, float] = {}
    for one, other in zip(found, expected, strict=True):
        worst[one.call] = max(worst.get(one.call, 0.0), _distance(one, other))
    failed = [call for call, error in worst.items() if not error <= allowed]
    place = failed[0] if failed else max(worst, key=lambda call: worst[call])
    return Finding("calls", where, not failed, place, worst[place], allowed)


def _distance(found: CallResult, expected: CallResult) -> float:
    """Returns the relative error of a call, with logits centred."""
    a, b = found.values, expected.values
    if a.shape != b.shape or not np.isfinite(a).all():
        return float("inf")
    if found.position >= 0:
        a, b = centred(a), centred(b)
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-12))
