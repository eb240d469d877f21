"""Extracts parts of a graph as separate graphs, to find where a graph goes wrong, or to
run one that does not fit in memory at once.

Every transformer block begins with a norm over the residual stream, which is a single
tensor. Graphs are cut there. All parts refer to the same weight file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from export.planning.limits import PIECE_BYTES
from runtime.contract.bundle import DECODER, PREFILL, VISION
from runtime.contract.goldens import Golden
from runtime.contract.graphs import (
    IMAGE_EMBEDS,
    INPUTS_EMBEDS,
    LOGITS,
    LOGITS_TO_KEEP,
    PIXELS,
    POOL,
    SEQLENS_K,
    TOTAL_LENGTH,
)
from runtime.contract.pooling import pool_matrix
from runtime.contract.spec import ModelSpec
from runtime.engines.onnxruntime.sessions import session_options
from runtime.parity import StageError, stage_errors

__all__ = ["cut_out", "cut_points", "opened_part", "replay_in_pieces", "run_part"]

Array = NDArray[np.float32]
Feed = dict[str, NDArray[np.generic]]


def cut_points(model: ir.Model) -> list[tuple[str, str]]:
    """Returns (norm's module name, tensor in front of it) for every norm of a graph, in
    order. Leaves out norms over a graph input.
    """
    found = []
    for node in model.graph:
        if node.op_type in ("LayerNormalization", "RMSNormalization"):
            stream, weight = node.inputs[0], node.inputs[1]
            assert stream is not None and weight is not None and stream.name and weight.name
            if not stream.is_graph_input():
                found.append((weight.name.removesuffix(".weight"), stream.name))
    return found


def part(path: Path, starts: Collection[str], ends: Collection[str]) -> ir.Model:
    """Returns the part of a graph file that computes the tensors `ends` from graph
    inputs and the tensors `starts`.
    """
    return cut_out(ir.load(path), starts, ends)


def cut_out(model: ir.Model, starts: Collection[str], ends: Collection[str]) -> ir.Model:
    """Reduces a model, in place, to the part that computes the tensors `ends` from graph
    inputs and the tensors `starts`, which become inputs named "….given".
    """
    graph = model.graph
    values = {output.name: output for node in graph for output in node.outputs}
    wanted = [values[name] for name in ends]
    for name in starts:
        given = ir.Value(
            name=f"{name}.given",
            shape=ir.Shape([None] * len(values[name].shape or ())),
            type=values[name].type or ir.TensorType(ir.DataType.FLOAT),
        )
        ir.convenience.replace_all_uses_with(values[name], given)
        graph.inputs.append(given)
    graph.outputs[:] = wanted
    used = set(wanted)
    for node in reversed(list(graph)):
        if any(output in used for output in node.outputs):
            used.update(x for x in node.inputs if x is not None)
        else:
            graph.remove(node, safe=True)
    graph.inputs[:] = [x for x in graph.inputs if x in used]
    for name in [name for name, x in graph.initializers.items() if x not in used]:
        del graph.initializers[name]
    return model


@contextmanager
def opened_part(
    path: Path, starts: Collection[str], ends: Collection[str]
) -> Iterator[ort.InferenceSession]:
    """Opens a session of a part. The part's file lies beside the weights only while the
    session is open.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part") as file:
        file.write(ir.to_proto(part(path, starts, ends)).SerializeToString())
        file.flush()
        session = ort.InferenceSession(
            file.name, session_options(None, exact=False), providers=["CPUExecutionProvider"]
        )
        try:
            yield session
        finally:
            del session


def run_part(
    session: ort.InferenceSession, inputs: Feed, cache: tuple[int, ...]
) -> dict[str, NDArray[np.generic]]:
    """Runs a part and returns all its outputs. Caches that are not among `inputs` start
    empty with shape `cache`.
    """
    feed: Feed = {}
    inputs = {LOGITS_TO_KEEP: np.array([1], np.int64), **inputs}
    for value in session.get_inputs():
        empty = np.zeros(cache, np.int8 if value.type == "tensor(int8)" else np.float32)
        feed[value.name] = inputs.get(value.name, empty)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def _segments(path: Path, most: int) -> list[tuple[list[str], list[str]]]:
    """Returns consecutive (starts, ends) of a decoder, cut in front of layers. Each has
    at most `most` bytes of weights, unless a single layer has more.
    """
    model = ir.load(path)
    cuts = {tensor for name, tensor in cut_points(model) if name.endswith("input_layernorm")}
    segments: list[tuple[list[str], list[str]]] = []
    start: list[str] = []
    held = pending = 0
    last = ""
    for node in model.graph:
        pending += sum(
            x.const_value.nbytes for x in node.inputs if x is not None and x.const_value is not None
        )
        for output in node.outputs:
            if output.name in cuts:
                if held and held + pending > most:
                    segments.append((start, [last]))
                    start, held = [last], 0
                held, pending, last = held + pending, 0, output.name
    if held and held + pending > most:
        segments.append((start, [last]))
        start = [last]
    return [*segments, (start, [LOGITS])]


def replay_in_pieces(
    folder: Path,
    spec: ModelSpec,
    table: NDArray[np.floating],
    goldens: Sequence[Golden],
    tolerance: dict[str, float],
    most: int = PIECE_BYTES,
) -> list[StageError]:
    """Does the work of `replay_goldens` for graphs that are too large for memory. Each
    part runs all cases before the next part is opened.

    The golden tokens are known, so a part can run every step of a case in turn. `table`
    holds the token embeddings [V,H].
    """
    found: list[tuple[Array, Array, Array]] = []
    with opened_part(folder / VISION, (), [IMAGE_EMBEDS]) as session:
        embeds = [
            run_part(
                session, {PIXELS: g.pixels, POOL: pool_matrix(spec.vision.grid, g.pool_size)}, ()
            )[IMAGE_EMBEDS][0]
            for g in goldens
        ]
        del session
    streams = []
    for golden in goldens:
        prompt = np.concatenate(
            [table[golden.before], golden.image_embeds, table[golden.after]], dtype=np.float32
        )[None]
        streams.append(
            [prompt, *(np.asarray(table[[token]], np.float32)[None] for token in golden.tokens)]
        )
    file = folder / DECODER
    for starts, ends in _segments(file, most):
        caches = sorted(_caches_of(part(file, starts, ends)))
        first = folder / PREFILL if (folder / PREFILL).exists() else file
        keep = [*ends, *(f"present.{name}" for name in caches)]
        streams = _through(file, first, starts, keep, caches, streams, spec)
    for vectors, golden_embeds in zip(streams, embeds, strict=True):
        steps = (
            np.concatenate(vectors[1:])
            if len(vectors) > 1
            else np.zeros((0, spec.decoder.vocab_size), np.float32)
        )
        found.append((np.asarray(golden_embeds, np.float32), vectors[0][0], steps))
    return stage_errors(goldens, found, tolerance)


def _through(
    file: Path,
    first: Path,
    starts: Sequence[str],
    ends: Sequence[str],
    caches: Sequence[str],
    streams: Sequence[Sequence[Array]],
    spec: ModelSpec,
) -> list[list[Array]]:
    """Runs all cases through one part: the prompt with the graph `first`, then the
    tokens after it one by one. The first of `ends` is the stream that leaves the part.
    """
    held: list[Feed] = []
    results: list[list[Array]] = []
    for graph, decoding in ((first, False), (file, True)) if first != file else ((file, None),):
        with opened_part(graph, starts, ends) as session:
            for index, rows in enumerate(streams):
                if not decoding:
                    total = rows[0].shape[1] + len(rows) - 1
                    shape = (1, spec.decoder.kv_heads, total, spec.decoder.head_dim)
                    outputs = run_part(session, _lengths(starts, rows[0], rows[0].shape[1]), shape)
                    results.append([np.asarray(outputs[ends[0]], np.float32)])
                    held.append({name: outputs[f"present.{name}"] for name in caches})
                for step, row in enumerate(rows[1:] if decoding is not False else (), 1):
                    outputs = run_part(
                        session,
                        {**_lengths(starts, row, rows[0].shape[1] + step), **held[index]},
                        (),
                    )
                    results[index].append(np.asarray(outputs[ends[0]], np.float32))
                    held[index] = {name: outputs[f"present.{name}"] for name in caches}
            del session  # free this part before the next one is opened
    return results


def _caches_of(model: ir.Model) -> list[str]:
    return [str(value.name) for value in model.graph.inputs if "cache" in str(value.name)]


def _lengths(starts: Sequence[str], rows: Array, filled: int) -> Feed:
    """Returns the stream under the name of the part's input, and the number of cache
    rows filled after the call.
    """
    name = f"{starts[0]}.given" if starts else INPUTS_EMBEDS
    return {
        name: rows,
        SEQLENS_K: np.array([filled - 1], np.int32),
        TOTAL_LENGTH: np.array(filled, np.int32),
    }
