"""Proves a finished bundle equal to its checkpoint: what it stores, how it computes, and
how it answers the calls that users make.

1. constants: specification, tokenizer, token embeddings, prompts and pixels.
2. tensors: every stored tensor follows from the checkpoint's.
3. structure: every block of every graph computes what PyTorch's does, to float accuracy.
4. kernels: every block's own kernels agree with a PyTorch block that rounds alike.
5. rounding: no stored range costs much more than the data's own.
6. calls: segments, steps, drafts, batches and beams give PyTorch's logits.
7. answers: the runtime's loops choose the tokens that PyTorch finds most likely.
8. goldens: the results that a device compares itself with are PyTorch's.

The comparison of whole answers, whose tolerance must cover all rounding together, follows
in `export.gate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from calibration.blocks import StreamedModel, Trace
from calibration.samples import Case
from export.parity.calibration_check import Origin, check_calibrated
from export.parity.constants import constant_faults, flag_faults
from export.parity.finding import Finding
from export.parity.float_view import float_view
from export.parity.references import goldens_of
from export.parity.runtime_check import check_calls, rounding_kinds
from export.parity.stored_weights import UnknownFormError
from export.parity.structure import (
    BlockError,
    Kernels,
    compare_decoder,
    compare_vision,
)
from export.parity.tensor_check import check_tensors
from export.planning.limits import CALLS_MODEL
from export.targets import find_lowering
from runtime.contract.bundle import (
    DECODER,
    DECODER_FUSED,
    GOLDENS,
    PREFILL,
    VISION,
    VISION_FUSED,
    Bundle,
)
from runtime.generation.token_embeddings import open_token_embeddings
from runtime.parity import read_checked_goldens, stage_errors
from trainer.checkpoint import StoredCheckpoint

__all__ = ["prove"]

_GOLDENS = 1e-4  # between PyTorch's results on two machines
_LONGEST = 2048  # rows of the case that fills the context
_KERNELS: Mapping[str, float] = {  # error of a block's kernels, by how they round their input
    "float": 1e-3,
    "half": 1e-2,
    "block": 0.03,
    "int8-row": 0.03,
    "int8-tensor": 0.03,
    "int8-static": 0.03,
    "int8-signed": 0.12,  # rounded to half precision first, so that many levels are ties
}
Progress = Callable[[int, int, str], None]
"""Receives how many comparisons are done, how many there are, and the next one's name."""


def prove(
    bundle: Bundle,
    checkpoint: StoredCheckpoint,
    cases: Sequence[Case],
    progress: Progress = lambda done, total, text: None,
    origin: Origin | None = None,
) -> list[Finding]:
    """Returns all comparisons of a bundle with its checkpoint, on the given cases. Later
    comparisons are left out once an earlier one fails, because they build on it.

    A build gives its calibration as `origin`: tensors must then be exactly those, and the
    golden results, which it has just made, are not made again.
    """
    findings: list[Finding] = []
    first = [_constants, partial(_calibrated, origin)] if origin else [_constants, _goldens]
    steps = (*first, _tensors, _structure, _kernels, _calls)
    for index, step in enumerate(steps):
        name = getattr(step, "__name__", "_calibrated").strip("_")
        progress(index, len(steps), name)
        try:
            findings += step(bundle, checkpoint, cases)
        except UnknownFormError as error:
            findings.append(Finding(name, str(bundle.path), False, str(error)))
        if not all(finding.passed for finding in findings):
            break
    return findings


def _constants(
    bundle: Bundle, checkpoint: StoredCheckpoint, cases: Sequence[Case]
) -> Iterator[Finding]:
    decoders = [float_view(bundle.file(file), bundle.spec) for file in _decoders(bundle)]
    faults = constant_faults(bundle, checkpoint) + flag_faults(bundle, decoders)
    if not faults:
        yield Finding("constants", "manifest, tokenizer, token embeddings", True)
    for fault in faults:
        yield Finding("constants", fault.split(":")[0], False, fault)


def _calibrated(
    origin: Origin, bundle: Bundle, checkpoint: StoredCheckpoint, cases: Sequence[Case]
) -> Iterator[Finding]:
    for file in (*_visions(bundle), *_decoders(bundle)):
        view = float_view(bundle.file(file), bundle.spec)
        faults = list(check_calibrated(view, origin, file == PREFILL))
        yield Finding("calibration", file, not faults, str(faults[0]) if faults else "")


def _goldens(
    bundle: Bundle, checkpoint: StoredCheckpoint, cases: Sequence[Case]
) -> Iterator[Finding]:
    """Runs the stored golden cases in PyTorch and compares their stored results."""
    goldens = read_checked_goldens(bundle)
    stored = [
        Case(
            f"golden {index}",
            golden.pixels,
            golden.pool_size,
            tuple(golden.before.tolist()),
            tuple(golden.after.tolist()),
            tuple(golden.tokens.tolist()),
        )
        for index, golden in enumerate(goldens)
    ]
    traces = StreamedModel(checkpoint.spec, checkpoint.read).run_blockwise(stored)
    results = [(golden.image_embeds, golden.prefill, golden.steps) for golden in goldens_of(traces)]
    allowed = dict.fromkeys(("vision", "prefill", "decode"), _GOLDENS)
    worst = max(stage_errors(goldens, results, allowed), key=lambda stage: stage.error)
    yield Finding("goldens", GOLDENS, worst.passed, worst.stage, worst.error, _GOLDENS)


def _visions(bundle: Bundle) -> list[str]:
    return [file for file in (VISION, VISION_FUSED) if file in bundle.files]


def _decoders(bundle: Bundle) -> list[str]:
    return [file for file in (DECODER, PREFILL, DECODER_FUSED) if file in bundle.files]


def _tensors(
    bundle: Bundle, checkpoint: StoredCheckpoint, cases: Sequence[Case]
) -> Iterator[Finding]:
    for part, files in (("vision", _visions(bundle)), ("decoder", _decoders(bundle))):
        for file in files:
            view = float_view(bundle.file(file), bundle.spec)
            faults = check_tensors(view, checkpoint.spec, part, checkpoint.read)
            if not faults:
                yield Finding("tensors", file, True)
            for fault in faults:
                yield Finding("tensors", file, False, str(fault))


def _structure(
    bundle: Bundle, checkpoint: StoredCheckpoint, cases: Sequence[Case]
) -> Iterator[Finding]:
    yield from _blocks(bundle, checkpoint, [*_every_pooling(checkpoint, cases)], None)


def _kernels(
    bundle: Bundle, checkpoint: StoredCheckpoint, cases: Sequence[Case]
) -> Iterator[Finding]:
    optimise = not find_lowering(bundle.target).compare_on_cpu
    yield from _blocks(bundle, checkpoint, cases, optimise)


def _blocks(
    bundle: Bundle, checkpoint: StoredCheckpoint, cases: Sequence[Case], optimise: bool | None
) -> Iterator[Finding]:
    """Compares all graphs block by block: their structure if `optimise` is None, and
    otherwise their kernels.
    """
    check = "structure" if optimise is None else "kernels"
    spec, read, table = checkpoint.spec, checkpoint.read, open_token_embeddings(bundle)
    traces: list[Trace] = []
    for file in _visions(bundle):
        kernels = _allowed_kernels(bundle, file, optimise)
        errors, found = compare_vision(bundle.file(file), spec, cases, read, kernels)
        traces = traces or found
        yield from _worst(check, file, errors, kernels)
    if optimise is None:
        traces += _long_traces(checkpoint, traces, bundle.capacity)
    for file in _decoders(bundle):
        kernels = _allowed_kernels(bundle, file, optimise)
        path = bundle.file(file)
        errors = compare_decoder(path, spec, traces, read, np.asarray(table, np.float32), kernels)
        yield from _worst(check, file, errors, kernels)


def _allowed_kernels(bundle: Bundle, file: str, optimise: bool | None) -> Kernels | None:
    if optimise is None:
        return None
    return Kernels(
        max(_KERNELS[kind] for kind in rounding_kinds(float_view(bundle.file(file), bundle.spec))),
        optimise,
    )


def _worst(
    check: str, file: str, errors: Sequence[BlockError], kernels: Kernels | None
) -> Iterator[Finding]:
    """Returns the largest error, or the first one beyond its bound."""
    failed = [error for error in errors if not error.passed]
    worst = failed[0] if failed else max(errors, key=lambda error: error.error)
    yield Finding(check, file, not failed, worst.place, worst.error, worst.allowed)
    if kernels is None or not kernels.costs:
        return
    name, cost = max(kernels.costs.items(), key=lambda item: item[1].share / item[1].allowed)
    passed = cost.share <= cost.allowed
    yield Finding("rounding", file, passed, name, cost.share, cost.allowed)


def _every_pooling(checkpoint: StoredCheckpoint, cases: Sequence[Case]) -> Iterator[Case]:
    """Yields the cases, and the first one again with each pool size that none has."""
    yield from cases
    for p in set(checkpoint.spec.pool_sizes) - {case.pool_size for case in cases}:
        yield replace(cases[0], pool_size=p)


def _long_traces(
    checkpoint: StoredCheckpoint, traces: Sequence[Trace], capacity: int
) -> Iterator[Trace]:
    """Yields a sequence that fills the context with random tokens behind a first image."""
    first = traces[0]
    assert first.image_embeds is not None
    case = first.case
    used = len(case.before) + len(case.after) + len(first.image_embeds)
    room = min(capacity, checkpoint.spec.decoder.context, _LONGEST) - used
    ids = np.random.default_rng(11).integers(0, checkpoint.spec.decoder.vocab_size, max(room, 0))
    longer = replace(case, after=(*case.after, *map(int, ids)), answer=())
    yield Trace(longer, first.x, first.image_embeds)


def _calls(
    bundle: Bundle, checkpoint: StoredCheckpoint, cases: Sequence[Case]
) -> Iterator[Finding]:
    """Leaves large models out: their float graphs need several times the bundle's memory."""
    if checkpoint.spec.parameters <= CALLS_MODEL:
        yield from check_calls(bundle, checkpoint, cases)
    else:
        size = f"{checkpoint.spec.parameters / 1e6:.0f} M parameters"
        yield Finding("calls", "runtime", True, f"not replayed: {size} are too many")
