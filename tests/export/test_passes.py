"""Each of our passes: matches, declines, reports what it modified, is idempotent, and
preserves numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch

from calibration.calibrate import Calibrated
from calibration.linear import LinearScheme
from export.passes import SIMPLIFY, run_passes
from export.passes.contract import GraphPass
from export.passes.group_query_attention import GROUP_QUERY_ATTENTION
from export.passes.integer_kernels import INTEGER_KERNELS
from export.passes.logits_to_keep import KEEP_LOGITS
from export.passes.pack_projections import pack_projections
from export.passes.quantise import quantise_linears
from export.passes.simplify import CLEAN, FOLD_CONSTANTS, FOLD_TRANSPOSES, INLINE, REWRITE
from export.steps import _quiet
from runtime.contract.graphs import (
    INPUTS_EMBEDS,
    LOGITS,
    LOGITS_TO_KEEP,
    POSITION_IDS,
)
from tests.conftest import TINY
from tests.export.pass_graphs import (  # noqa: F401
    EMBEDS,
    PIX,
    RNG,
    fresh,
    open_model,
    product,
    run_decoder,
    run_vision,
)
from trainer.model import InfMLLM


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
    step: GraphPass, fresh: Callable[[], tuple[ir.Model, ir.Model]]
) -> None:
    for model in fresh():
        named = {
            name
            for name, value in model.graph.initializers.items()
            if value.uses() and "." in name and len(value.shape or ()) == 2
        }
        with _quiet():
            for earlier in SIMPLIFY[: SIMPLIFY.index(step) + 1]:
                earlier(model)
            again = step(model)
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
    session = open_model(decoder)
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
