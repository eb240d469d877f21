"""Helpers shared by `test_passes.py` and `test_kernels.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from export.capture import capture
from export.steps import _quiet
from runtime.contract.graphs import (
    IMAGE_EMBEDS,
    INPUTS_EMBEDS,
    LOGITS,
    PIXELS,
    POOL,
    POSITION_IDS,
    present,
)
from runtime.contract.pooling import pool_matrix
from tests.conftest import TINY
from trainer.model import InfMLLM

RNG = np.random.default_rng(0)


PIX = RNG.normal(size=(2, 3, 32, 32)).astype(np.float32)


EMBEDS = RNG.normal(size=(2, 5, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def fresh() -> Iterator[Callable[[], tuple[ir.Model, ir.Model]]]:
    """Copies of the captured graphs of one model."""
    model = InfMLLM(TINY, torch.Generator().manual_seed(11))
    with torch.no_grad():
        for parameter in model.parameters():
            generator = torch.Generator().manual_seed(12)
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    with _quiet():
        graphs = capture(TINY, lambda name: model.get_parameter(name).detach())
    yield lambda: (graphs.vision.clone(), graphs.decoder.clone())


def open_model(model: ir.Model, exact: bool = True) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    if exact:
        settings.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )


def run_vision(model: ir.Model) -> np.ndarray:
    session = open_model(model)
    return session.run([IMAGE_EMBEDS], {PIXELS: PIX, POOL: pool_matrix(4, 2)})[0]


def run_decoder(model: ir.Model) -> list[np.ndarray]:
    session = open_model(model)
    names = {value.name for value in session.get_inputs()}
    feed: dict[str, np.ndarray] = {INPUTS_EMBEDS: EMBEDS}
    caches = sorted(name for name in names if "cache" in name)
    feed |= {name: np.zeros((2, 2, 8, 16), np.float32) for name in caches}
    if POSITION_IDS in names:
        feed[POSITION_IDS] = np.tile(np.arange(5), (2, 1))
    else:
        feed |= {
            "seqlens_k": np.full(2, 4, np.int32),
            "total_sequence_length": np.array(5, np.int32),
        }
    found = session.run([LOGITS, *(present(name) for name in caches)], feed)
    return [found[0], *(cache[:, :, :5] for cache in found[1:])]


def product(rows: np.ndarray, columns: np.ndarray, exact: bool) -> tuple[np.ndarray, np.ndarray]:
    """(what the engine's kernel makes of unsigned rows [M,K], zero point 128, times
    signed columns [K,N], what it should).
    """
    from runtime.engines.onnxruntime.sessions import session_options

    a = ir.Value(name="a", shape=ir.Shape(rows.shape), type=ir.TensorType(ir.DataType.UINT8))
    b = ir.Value(
        name="b",
        shape=ir.Shape(columns.shape),
        type=ir.TensorType(ir.DataType.INT8),
        const_value=ir.tensor(columns, name="b"),
    )
    zero = ir.Value(
        name="z",
        shape=ir.Shape([]),
        type=ir.TensorType(ir.DataType.UINT8),
        const_value=ir.tensor(np.array(128, np.uint8), name="z"),
    )
    node = ir.node("MatMulInteger", [a, b, zero])
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(ir.DataType.INT32)
    graph = ir.Graph(
        [a], node.outputs, nodes=[node], initializers=[b, zero], opset_imports={"": 23}
    )
    proto = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(
        proto, session_options(1, exact=exact), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"a": rows})[0], (rows.astype(np.int64) - 128) @ columns.astype(
        np.int64
    )
