"""Each of our passes: matches, declines, reports what it modified, is idempotent, and
preserves numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from calibration.calibrate import Calibrated
from calibration.linear import LinearScheme, fake_activation, round_in_pairs
from export.capture import capture
from export.passes import SIMPLIFY, run_passes
from export.passes.group_query_attention import GROUP_QUERY_ATTENTION
from export.passes.integer_kernels import INTEGER_KERNELS
from export.passes.logits_to_keep import KEEP_LOGITS
from export.passes.pack_projections import pack_projections
from export.passes.quantise import quantise_linears, store_half
from export.passes.simplify import CLEAN, FOLD_CONSTANTS, FOLD_TRANSPOSES, INLINE, REWRITE
from export.pipeline import _quiet
from export.schemes import SCHEMES
from runtime.contract.graphs import (
    IMAGE_EMBEDS,
    INPUTS_EMBEDS,
    LOGITS,
    LOGITS_TO_KEEP,
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
            parameter += 0.02 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(12)
            )
    with _quiet():
        graphs = capture(TINY, lambda name: model.get_parameter(name).detach())
    yield lambda: (graphs.vision.clone(), graphs.decoder.clone())


def opened(model: ir.Model, exact: bool = True) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    if exact:
        settings.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )


def run_vision(model: ir.Model) -> np.ndarray:
    session = opened(model)
    return session.run([IMAGE_EMBEDS], {PIXELS: PIX, POOL: pool_matrix(4, 2)})[0]


def run_decoder(model: ir.Model) -> list[np.ndarray]:
    session = opened(model)
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


def test_simplification_preserves_numbers_and_shrinks(
    fresh: Callable[[], tuple[ir.Model, ir.Model]],
) -> None:
    vision, decoder = fresh()
    expected = run_vision(vision), run_decoder(decoder)
    sizes = len(vision.graph), len(decoder.graph)
    with _quiet():
        for model in (vision, decoder):
            run_passes(model, SIMPLIFY)
    assert len(vision.graph) < 0.5 * sizes[0] and len(decoder.graph) < 0.5 * sizes[1]
    assert np.allclose(run_vision(vision), expected[0], atol=1e-5)
    assert all(
        np.allclose(a, b, atol=1e-5) for a, b in zip(run_decoder(decoder), expected[1], strict=True)
    )


@pytest.mark.parametrize(
    "step", [INLINE, FOLD_TRANSPOSES, FOLD_CONSTANTS, REWRITE, CLEAN], ids=lambda s: s.name
)
def test_each_step_is_idempotent_and_keeps_parameter_names(
    step: object, fresh: Callable[[], tuple[ir.Model, ir.Model]]
) -> None:
    for model in fresh():
        named = {
            name
            for name, value in model.graph.initializers.items()
            if value.uses() and "." in name and len(value.shape or ()) == 2
        }
        with _quiet():
            for earlier in SIMPLIFY[: SIMPLIFY.index(step) + 1]:  # type: ignore[arg-type]
                earlier(model)
            again = step(model)  # type: ignore[operator]
        assert again.modified == 0, step
        assert named <= set(model.graph.initializers)


def test_fold_transposes_reports_its_matches(
    fresh: Callable[[], tuple[ir.Model, ir.Model]],
) -> None:
    vision, decoder = fresh()
    assert (
        FOLD_TRANSPOSES(vision).modified == 2 * 4 + 2
        and FOLD_TRANSPOSES(decoder).modified == 2 * 7 + 1
    )
    assert not any(node.op_type == "Gemm" for node in decoder.graph)


def test_fold_transposes_declines_a_weight_used_twice() -> None:
    weight = ir.Value(
        name="w",
        const_value=ir.tensor(np.eye(3, 4, dtype=np.float32), name="w"),
        shape=ir.Shape([3, 4]),
    )
    x = ir.Value(name="x", shape=ir.Shape([2, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    turned = ir.node("Transpose", [weight], {"perm": [1, 0]})
    product = ir.node("MatMul", [x, turned.outputs[0]])
    both = ir.node("MatMul", [product.outputs[0], weight])
    graph = ir.Graph(
        [x],
        [both.outputs[0]],
        nodes=[turned, product, both],
        initializers=[weight],
        opset_imports={"": 23},
    )
    assert FOLD_TRANSPOSES(ir.Model(graph, ir_version=10)).modified == 0 and len(graph) == 3


def test_attention_is_fused_with_equal_numbers(
    fresh: Callable[[], tuple[ir.Model, ir.Model]],
) -> None:
    _, decoder = fresh()
    with _quiet():
        run_passes(decoder, SIMPLIFY)
    expected = run_decoder(decoder)
    result = GROUP_QUERY_ATTENTION(decoder)
    assert result.modified == 2 and not result.refused
    assert [value.name for value in decoder.graph.inputs][:3] == [
        INPUTS_EMBEDS,
        "seqlens_k",
        "total_sequence_length",
    ]
    for found, wanted in zip(run_decoder(decoder), expected, strict=True):
        assert np.allclose(found, wanted, atol=1e-5)
    assert GROUP_QUERY_ATTENTION(decoder).modified == 0


def test_attention_that_looks_different_is_declined_with_a_reason(
    fresh: Callable[[], tuple[ir.Model, ir.Model]],
) -> None:
    vision, decoder = fresh()
    with _quiet():
        run_passes(vision, SIMPLIFY)
        run_passes(decoder, SIMPLIFY)
    refused = GROUP_QUERY_ATTENTION(vision)  # plain self-attention, no cache
    assert refused.modified == 0 and "expected RotaryEmbedding" in refused.refused[0]
    attention = next(node for node in decoder.graph if node.op_type == "Attention")
    attention.replace_input_with(0, decoder.graph.inputs[0])
    before = len(decoder.graph)
    refused = GROUP_QUERY_ATTENTION(decoder)
    assert refused.modified == 0 and refused.refused and len(decoder.graph) == before


def test_several_positions_get_logits(fresh: Callable[[], tuple[ir.Model, ir.Model]]) -> None:
    vision, decoder = fresh()
    with _quiet():
        run_passes(decoder, SIMPLIFY)
    expected = run_decoder(decoder)[0]
    assert KEEP_LOGITS(decoder).modified == 1 and KEEP_LOGITS(decoder).modified == 0
    session = opened(decoder)
    feed = {
        v.name: np.zeros((2, 2, 8, 16), np.float32)
        for v in session.get_inputs()
        if "cache" in v.name
    }
    feed |= {INPUTS_EMBEDS: EMBEDS, POSITION_IDS: np.tile(np.arange(5), (2, 1))}
    (one,), (three,) = (
        session.run([LOGITS], feed | {LOGITS_TO_KEEP: np.array([n])}) for n in (1, 3)
    )
    assert np.allclose(one, expected, atol=1e-6) and three.shape == (6, 960)
    assert np.allclose(three.reshape(2, 3, 960)[:, -1], expected, atol=1e-6)
    for position in (3, 4):
        (shorter,) = session.run(
            [LOGITS],
            feed
            | {
                INPUTS_EMBEDS: EMBEDS[:, :position],
                POSITION_IDS: np.tile(np.arange(position), (2, 1)),
                LOGITS_TO_KEEP: np.array([1]),
            },
        )
        assert np.allclose(three.reshape(2, 3, 960)[:, position - 3], shorter, atol=1e-5)
    refused = KEEP_LOGITS(vision)
    assert refused.modified == 0 and refused.refused


def test_projections_are_packed_with_equal_numbers(
    fresh: Callable[[], tuple[ir.Model, ir.Model]],
) -> None:
    _, decoder = fresh()
    with _quiet():
        run_passes(decoder, SIMPLIFY)
    GROUP_QUERY_ATTENTION(decoder)
    expected = run_decoder(decoder)
    linear = LinearScheme("int8", "int8-tensor")
    quantised = decoder.clone()
    result = pack_projections(lambda name: linear)(decoder)
    assert result.modified == 2 * 2 and not result.refused, (
        "queries, keys and values; gate and up; of two layers"
    )
    assert sum(node.op_type == "MatMul" for node in decoder.graph) == 2 * 4 + 1
    for found, wanted in zip(run_decoder(decoder), expected, strict=True):
        assert np.allclose(found, wanted, atol=1e-5)
    assert pack_projections(lambda name: linear)(decoder).modified == 0
    # Rounded after packing or without it: the same numbers.
    model = InfMLLM(TINY, torch.Generator().manual_seed(11))
    calibrated = Calibrated(lambda name: model.get_parameter(name).detach())
    for graph in (quantised, decoder):
        assert quantise_linears(lambda name: linear, calibrated, INTEGER_KERNELS)(
            graph
        ).modified == (2 * 7 + 1 if graph is quantised else 2 * 4 + 1)
    for found, wanted in zip(run_decoder(decoder), run_decoder(quantised), strict=True):
        assert np.allclose(found, wanted, atol=1e-5)


def test_projections_that_go_different_ways_are_not_packed(
    fresh: Callable[[], tuple[ir.Model, ir.Model]],
) -> None:
    _, decoder = fresh()
    with _quiet():
        run_passes(decoder, SIMPLIFY)
    GROUP_QUERY_ATTENTION(decoder)
    eight, four = LinearScheme("int8"), LinearScheme("int4", block=32)
    result = pack_projections(
        lambda name: four if "v_proj" in name or "gate_proj" in name else eight
    )(decoder)
    assert (
        result.modified == 0 and len(result.refused) == 4 and "different ways" in result.refused[0]
    )


@pytest.mark.parametrize(
    ("scheme", "bound"), [("fp16", 2e-3), ("int8", 0.06), ("int8-weights", 0.06), ("int4-all", 0.5)]
)
def test_schemes_change_every_linear_once_and_little(
    scheme: str, bound: float, fresh: Callable[[], tuple[ir.Model, ir.Model]]
) -> None:
    vision, decoder = fresh()
    with _quiet():
        for model in (vision, decoder):
            run_passes(model, SIMPLIFY)
    expected = run_vision(vision), run_decoder(decoder)[0]
    scheme_of = SCHEMES[scheme].linear
    weights = {
        name: torch.from_numpy(value.const_value.numpy().T.copy())
        for m in (vision, decoder)
        for name, value in m.graph.initializers.items()
        if value.const_value is not None and len(value.const_value.shape) == 2
    }
    steps = [
        store_half(SCHEMES[scheme].half),
        quantise_linears(scheme_of, Calibrated(weights.__getitem__), INTEGER_KERNELS),
    ]
    counts = [
        sum(result.modified for _, result in run_passes(model, steps))
        for model in (vision, decoder)
    ]
    assert counts[1] == (17 if scheme == "fp16" else 15)  # fp16 also stores the two rotary tables
    assert counts[0] >= 10
    for found, wanted in (
        (run_vision(vision), expected[0]),
        (run_decoder(decoder)[0], expected[1]),
    ):
        assert 0 < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < bound
    assert not any(
        result.modified for model in (vision, decoder) for _, result in run_passes(model, steps)
    )


@pytest.mark.parametrize("shape", [(48, 40), (160, 33), (300, 64)])
@pytest.mark.parametrize(
    "scheme",
    [
        LinearScheme("int4", block=32),
        LinearScheme("int4", block=128, rounding="mse"),
        LinearScheme("int8", block=64),
        LinearScheme("int8"),
        LinearScheme("int8", "int8-row"),
        LinearScheme("int8", "int8-tensor"),
        LinearScheme("int8", "int8-static"),
    ],
    ids=lambda s: s.text(),
)
def test_kernels_compute_what_the_reference_arithmetic_says(
    shape: tuple[int, int], scheme: LinearScheme, tmp_path: Path
) -> None:
    """Sizes that fill no whole block, odd widths: the packed kernel against the
    dequantised weight and the rounded activation.
    """
    k, n = shape
    x, weight = (
        RNG.normal(size=(5, k)).astype(np.float32),
        torch.from_numpy(RNG.normal(size=(n, k)).astype(np.float32)),
    )
    np.savez(tmp_path / "block.npz", **{"w|range": np.array([x.min(), x.max()])})
    calibrated = Calibrated(lambda name: weight, tmp_path)
    value = ir.Value(name="x", shape=ir.Shape(["B", k]), type=ir.TensorType(ir.DataType.FLOAT))
    stored = ir.Value(
        name="w.weight",
        const_value=ir.tensor(weight.numpy().T.copy(), name="w.weight"),
        shape=ir.Shape([k, n]),
        type=ir.TensorType(ir.DataType.FLOAT),
    )
    node = ir.node("MatMul", [value, stored])
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = (
        "y",
        ir.Shape(["B", n]),
        ir.TensorType(ir.DataType.FLOAT),
    )
    model = ir.Model(
        ir.Graph(
            [value], node.outputs, nodes=[node], initializers=[stored], opset_imports={"": 23}
        ),
        ir_version=10,
    )
    quantise_linears(lambda name: scheme, calibrated, INTEGER_KERNELS)(model)
    (found,) = opened(model).run(["y"], {"x": x})
    static = (float(x.min()), float(x.max())) if scheme.activation == "int8-static" else None
    wanted = (
        fake_activation(torch.from_numpy(x), scheme.activation, static)
        @ calibrated.quantised("w.weight", scheme).dequantised().T
    )
    error = np.linalg.norm(found - wanted.numpy()) / np.linalg.norm(wanted.numpy())
    assert error < (
        0.01 if scheme.activation == "float" else 1e-5
    )  # the weight-only kernel rounds activations to 8 bit per block


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


def test_integer_products_do_not_saturate() -> None:
    """x86 without VNNI saturates in unsigned-by-signed products; the engine's setting
    must give exact sums on any CPU.
    """
    found, expected = product(
        np.full((4, 256), 255, np.uint8), np.full((256, 16), 127, np.int8), exact=True
    )
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("rows", [1, 3, 4, 9])
@pytest.mark.parametrize(("inputs", "outputs"), [(7, 5), (64, 16), (250, 33), (1024, 48)])
def test_weights_made_to_fit_need_no_exact_kernel(inputs: int, outputs: int, rows: int) -> None:
    """Whatever the activations: the fast kernel's sums are exact for weights in pairs,
    on any CPU.
    """
    rng = np.random.default_rng(inputs + rows)
    for weight in (
        rng.normal(size=(outputs, inputs)),
        np.ones((outputs, inputs)),
        rng.choice([-1.0, 0.9, 1.0], (outputs, inputs)),
    ):
        columns = (
            round_in_pairs(
                torch.from_numpy(weight.astype(np.float32)), LinearScheme("int8", "int8-row")
            )
            .levels.numpy()
            .T.astype(np.int8)
        )
        for activations in (
            np.full((rows, inputs), 255, np.uint8),
            rng.choice([0, 1, 128, 254, 255], (rows, inputs)).astype(np.uint8),
        ):
            found, expected = product(activations, np.ascontiguousarray(columns), exact=False)
            assert np.array_equal(found, expected)
