"""Compares a bundle's graphs with PyTorch, block by block: first their structure, then
the arithmetic of their kernels.

Each block gets PyTorch's own input and must reproduce PyTorch's output. PyTorch computes
with the weights that the graph stores, so the rounding of weights plays no part.

- Structure: the graph's float view, as closely as float32 arithmetic allows.
- Kernels: the graph itself, beside a PyTorch model that rounds its activations alike.

A fault is found in its own block, whatever its size, and only one block's weights are in
memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.blocks import Block, Reader, StreamedModel, Trace
from calibration.samples import Case
from export.parity.float_view import FloatView, float_view, read_tensors
from export.parity.form_runner import GraphSession, lengths, view_session
from export.parity.rounding import Costs, round_caches, round_inputs
from export.parity.stored_weights import UnknownFormError
from export.passes.pack_projections import parts_of
from runtime.contract.graphs import (
    IMAGE_EMBEDS,
    INPUTS_EMBEDS,
    LOGITS,
    LOGITS_ROWS,
    LOGITS_TO_KEEP,
    PIXELS,
    POOL,
)
from runtime.contract.pooling import pool_matrix
from runtime.contract.spec import ModelSpec
from runtime.parity import centred

__all__ = [
    "STRUCTURE",
    "BlockError",
    "Kernels",
    "compare_decoder",
    "compare_vision",
    "stored_reader",
    "stored_rotary",
]

STRUCTURE = 5e-5
"""Largest relative error of a row that float32 arithmetic explains."""

_SHARE = 0.1  # a block's update counts as at least this share of the stream it is added to
Array = NDArray[np.float32]


@dataclass(frozen=True)
class BlockError:
    """The largest error of any row of a block's output, relative to the block's own
    update, over all cases. `place` names the block and its half.
    """

    place: str
    error: float

    allowed: float

    @property
    def passed(self) -> bool:
        """True when the error is a number within its bound."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class Kernels:
    """How a target's kernels are compared: the largest error of a block, and whether ONNX
    Runtime may fuse operators, as the CPU's runtime does.
    """

    allowed: float
    optimise: bool
    costs: Costs = field(default_factory=dict)
    """Receives what rounding changes at each place."""


def stored_reader(view: FloatView, read: Reader) -> Reader:
    """Returns a reader of parameters as a graph stores them. The checkpoint, read by
    `read`, supplies the others.
    """
    weights = {part: weight for weight in view.weights.values() for part in parts_of(weight.name)}
    tensors = read_tensors(view)

    def stored(name: str) -> Tensor:
        if name in weights:
            weight = weights[name]
            start = 0
            for part in parts_of(weight.name):
                width = read(part).shape[0]
                if part == name:
                    rows = weight.decoded()[:, start : start + width]
                    return torch.from_numpy(np.array(rows.T, np.float32, order="C"))
                start += width
        if name in tensors:
            return torch.from_numpy(tensors[name]().astype(np.float32))
        return read(name)

    return stored


def compare_vision(
    path: Path,
    spec: ModelSpec,
    cases: Sequence[Case],
    read: Reader,
    kernels: Kernels | None = None,
) -> tuple[list[BlockError], list[Trace]]:
    """Compares a vision graph's blocks on the pixels of all cases: their structure, or
    their kernels. Returns the errors and the traces, which hold PyTorch's image embeddings.
    """
    view = float_view(path, spec)
    model = StreamedModel(spec, stored_reader(view, read))
    if kernels:
        round_inputs(model.model, view, kernels.costs)
    traces = [Trace(case, torch.from_numpy(case.pixels)) for case in cases]
    blocks = [block for block in model.blocks() if not block.name.startswith("decoder.")]
    errors = _compare(path, model, blocks, traces, IMAGE_EMBEDS, kernels)
    return errors, traces


def compare_decoder(
    path: Path,
    spec: ModelSpec,
    traces: Sequence[Trace],
    read: Reader,
    table: Array,
    kernels: Kernels | None = None,
) -> list[BlockError]:
    """Compares a decoder graph's blocks on the whole sequence of every case: its text,
    the image embeddings of its trace, and its answer. `table` holds the token embeddings.
    The logits of PyTorch become those of the traces.
    """
    view = float_view(path, spec)
    stored = stored_reader(view, read)

    def with_table(name: str) -> Tensor:
        if name == "decoder.embed_tokens.weight":
            return torch.from_numpy(np.array(table, np.float32))
        return stored(name)

    model = StreamedModel(spec, with_table, stored_rotary(view))
    if kernels:
        round_inputs(model.model, view, kernels.costs)
        round_caches(model, view, kernels.costs)
    started = []
    for trace in traces:
        assert trace.image_embeds is not None, "the vision graph ran before"
        started.append(replace(trace, x=torch.from_numpy(trace.image_embeds)[None]))
    blocks = [block for block in model.blocks() if block.name.startswith("decoder.")]
    with torch.no_grad(), model.loaded(blocks[0]):
        for trace in started:
            blocks[0].run(trace)
    errors = _compare(path, model, blocks[1:], started, LOGITS, kernels)
    for trace, run in zip(traces, started, strict=True):
        trace.logits = run.logits
    return errors


def stored_rotary(view: FloatView) -> tuple[Tensor, Tensor] | None:
    """Returns a decoder graph's tables of rotations [C, D/2], cosine and sine."""
    tensors = read_tensors(view)
    found = [tensors.get(f"decoder.rotary_{name}") for name in ("cos", "sin")]
    if found[0] is None or found[1] is None:
        return None
    cos, sin = (torch.from_numpy(read().astype(np.float32)) for read in found if read)
    return cos, sin


def _compare(
    path: Path,
    model: StreamedModel,
    blocks: Sequence[Block],
    traces: Sequence[Trace],
    last: str,
    kernels: Kernels | None,
) -> list[BlockError]:
    """Runs the blocks in PyTorch and in the graph, and returns the error of every tensor
    between them.
    """
    whole = ir.load(path) if kernels else float_view(path, model.spec).model
    streams = _norm_streams(whole, [norm for block in blocks for norm in block.norms])
    companion = "companion.last" in whole.graph.initializers
    errors: list[BlockError] = []
    for index, block in enumerate(blocks):
        following = next((b.norms[0] for b in blocks[index + 1 :] if b.norms), "")
        ends = {norm: streams[norm] for norm in block.norms[1:]}
        ends[""] = streams[following] if following else last
        first = streams[block.norms[0]] if block.norms else ""
        starts = [first] if first and index else []
        parts = (starts, list(ends.values()))
        session = (
            GraphSession(ir.load(path), *parts, optimise=kernels.optimise)
            if kernels
            else view_session(float_view(path, model.spec), *parts)
        )
        worst = dict.fromkeys(ends, 0.0)
        with torch.no_grad(), model.loaded(block):
            for trace in traces:
                given, seen = trace.x.numpy().copy(), dict[str, Array]()
                with _watch(seen, block, model):
                    block.run(trace)
                expected = {
                    **{norm: seen[norm] for norm in block.norms[1:]},
                    "": _result(trace, last, ends[""]),
                }
                feed = _feed(session, trace, given, model.spec)
                for name in starts:
                    rows = [given, given[:, -1:]] if companion else [given]
                    feed[f"{name}.given"] = np.concatenate(rows, axis=1)
                found = session.run(feed)
                before = given if block.norms and ends[""] != last else None
                for norm, tensor in ends.items():
                    by_row = _row_errors(found[tensor], expected[norm], before)
                    # A level that rounds the other way changes one row; a wrong kernel most rows.
                    error = np.sqrt((by_row * by_row).mean()) if kernels else by_row.max()
                    worst[norm] = max(worst[norm], float(error))
                    before = expected[norm]
        places = _places(block, list(ends))
        allowed = kernels.allowed if kernels else STRUCTURE
        errors += [BlockError(places[norm], error, allowed) for norm, error in worst.items()]
        del session
    return errors


def _result(trace: Trace, last: str, end: str) -> Array:
    if end == LOGITS:
        assert trace.logits is not None
        return centred(trace.logits)
    return np.asarray(trace.x.numpy(), np.float32)


def _places(block: Block, ends: Sequence[str]) -> dict[str, str]:
    """Names the part of the block that computes each of its ends."""
    if len(ends) == 1:
        return {ends[0]: block.name}
    halves = ("attention", "MLP")
    return {end: f"{block.name} ({half})" for end, half in zip(ends, halves, strict=True)}


def _feed(
    session: GraphSession, trace: Trace, given: Array, spec: ModelSpec
) -> dict[str, NDArray[Any]]:
    decoder, rows = spec.decoder, given.shape[1]
    capacity = session.fixed_rows(decoder.cache_names) or rows
    cache = np.zeros((1, decoder.kv_heads, capacity, decoder.head_dim), np.float32)
    kept = len(trace.case.answer) + 1
    return {
        PIXELS: trace.case.pixels,
        POOL: pool_matrix(spec.vision.grid, trace.case.pool_size),
        INPUTS_EMBEDS: given,
        LOGITS_TO_KEEP: np.array([kept], np.int64),
        LOGITS_ROWS: np.arange(rows - kept, rows, dtype=np.int64),
        **dict.fromkeys(decoder.cache_names, cache),
        **lengths(0, rows),
    }


def _row_errors(found: Array, expected: Array, before: Array | None) -> Array:
    """Returns the error of each row, relative to what the block added to it. The
    companion of the last row, if the graph has one, is compared with that row.
    """
    found = found.astype(np.float32)
    if found.ndim == 2:
        found = centred(found)
    rows = expected.shape[-2]
    if found.shape[-2] == rows + 1:
        found = found[..., :rows, :] if _same_row(found) else np.full_like(expected, np.nan)
    if found.shape != expected.shape or not np.isfinite(found).all():
        return np.full(1, np.inf, np.float32)
    stream = np.linalg.norm(expected, axis=-1)
    if before is None or before.shape != expected.shape:
        scale = stream
    else:
        scale = np.maximum(np.linalg.norm(expected - before, axis=-1), _SHARE * stream)
    distance = np.linalg.norm(found - expected, axis=-1)
    errors: Array = distance / np.maximum(scale, 1e-12)
    return errors


def _same_row(found: Array) -> bool:
    return bool(np.allclose(found[..., -1, :], found[..., -2, :], rtol=1e-4, atol=1e-5))


@contextmanager
def _watch(seen: dict[str, Array], block: Block, model: StreamedModel) -> Iterator[None]:
    def keep(norm: str, module: torch.nn.Module, arguments: tuple[Tensor]) -> None:
        seen[norm] = arguments[0].numpy().copy()

    handles = [
        model.model.get_submodule(norm).register_forward_pre_hook(partial(keep, norm))
        for norm in block.norms
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _norm_streams(model: ir.Model, norms: Sequence[str]) -> dict[str, str]:
    """Returns the name of the tensor in front of each norm. Raises `UnknownFormError`."""
    uses: dict[str, list[ir.Node]] = {}
    for node in model.graph:
        for value in node.inputs:
            if value is not None and value.name and value.producer() is None:
                plain = value.name.removesuffix("|float").removesuffix(".fp16")
                uses.setdefault(plain, []).append(node)
    found = {}
    for norm in norms:
        users = uses.get(f"{norm}.weight", [])
        if len(users) != 1:
            raise UnknownFormError(f"{norm}.weight has {len(users)} uses, expected one")
        found[norm] = _stream_of(users[0], norm)
    return found


def _stream_of(node: ir.Node, norm: str) -> str:
    value = node.inputs[0]
    if node.op_type == "Mul":  # a norm in plain operators: x / sqrt(mean(x * x) + eps) * weight
        quotient = value.producer() if value is not None else None
        if quotient is None or quotient.op_type != "Div":
            raise UnknownFormError(f"{norm} is not a norm that this toolchain writes")
        value = quotient.inputs[0]
    while value is not None and (cast := value.producer()) is not None and cast.op_type == "Cast":
        value = cast.inputs[0]
    if value is None or not value.name:
        raise UnknownFormError(f"{norm} has no input")
    return value.name
