"""The passes of GPU targets: each matches, declines with a reason, reports what it
changed, is idempotent, and preserves numbers.
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
from calibration.linear import LinearScheme
from export.capture import capture
from export.passes import SIMPLIFY, run_passes
from export.passes.companion_row import COMPANION_ROW
from export.passes.contract import GraphPass, is_weight
from export.passes.explicit_kernels import EXPLICIT_KERNELS
from export.passes.half import to_half
from export.passes.plain_operators import PLAIN_ATTENTION, PLAIN_GELU, PLAIN_NORMS
from export.passes.quantise import quantise_linears
from export.passes.tensorrt_attention import FUSED_CACHE, PLAIN_CACHE, fixed_capacity
from export.passes.token_outputs import FIRST_TOKEN_OUTPUTS, TOKEN_OUTPUTS
from export.shared_weights import refer_to
from export.steps import _quiet
from runtime.contract.errors import BuildError
from runtime.contract.graphs import (
    IMAGE_EMBEDS,
    INPUTS_EMBEDS,
    LOGITS,
    LOGITS_MASS,
    LOGITS_ROWS,
    NEXT_TOKEN,
    PIXELS,
    POOL,
    POSITION_IDS,
    present,
)
from runtime.contract.pooling import pool_matrix
from tests.conftest import TINY
from trainer.model import InfMLLM

RNG = np.random.default_rng(5)
PICTURE = RNG.normal(size=(1, 3, 32, 32)).astype(np.float32)
EMBEDS = RNG.normal(size=(1, 7, 64)).astype(np.float32)
CACHES = [f"{kind}_cache.{layer}" for layer in range(2) for kind in ("key", "value")]
ROWS = 12
Graphs = Callable[[], tuple[ir.Model, ir.Model]]


@pytest.fixture(scope="module")
def simplified() -> Iterator[Graphs]:
    """Copies of the canonical graphs of one model."""
    model = InfMLLM(TINY, torch.Generator().manual_seed(21))
    with torch.no_grad():
        for parameter in model.parameters():
            generator = torch.Generator().manual_seed(parameter.numel())
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    with _quiet():
        graphs = capture(TINY, lambda name: model.get_parameter(name).detach())
        for graph in vars(graphs).values():
            run_passes(graph, SIMPLIFY)
    yield lambda: (graphs.vision.clone(), graphs.decoder.clone())


def run(model: ir.Model, feed: dict[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    kinds = {
        value.name: np.float16 if "float16" in value.type else np.float32
        for value in session.get_inputs()
        if "float" in value.type
    }
    given = {value.name for value in session.get_inputs()}
    return session.run(
        outputs,
        {
            name: array.astype(kinds.get(name, array.dtype))
            for name, array in feed.items()
            if name in given
        },
    )


def linear_weights(model: ir.Model) -> dict[str, torch.Tensor]:
    """Weights [N,K] by parameter name."""
    found = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if is_weight(value)
    }
    return {
        name: torch.from_numpy(tensor.numpy().T.copy())
        for name, tensor in found.items()
        if tensor is not None
    }


def see(model: ir.Model) -> np.ndarray:
    return run(model, {PIXELS: PICTURE, POOL: pool_matrix(4, 2)}, [IMAGE_EMBEDS])[0]


def decode(
    model: ir.Model, calls: tuple[int, ...] = (5, 1, 1), wanted: int = 1
) -> list[list[np.ndarray]]:
    """Logits of calls of those lengths, one behind the other, over caches kept here;
    and the rows they wrote.
    """
    caches = {name: np.zeros((1, 2, ROWS, 16), np.float32) for name in CACHES}
    names = [str(value.name) for value in model.graph.outputs]
    outputs = [name for name in names if "cache" not in name]
    at, found = 0, []
    for length in calls:
        last = np.arange(length - min(wanted, length), length)
        feed: dict[str, np.ndarray] = {
            INPUTS_EMBEDS: EMBEDS[:, at : at + length],
            POSITION_IDS: np.arange(at, at + length)[None],
            LOGITS_ROWS: last,
            **caches,
        }
        *results, keys0, values0, keys1, values1 = run(
            model, feed, [*outputs, *(present(name) for name in CACHES)]
        )
        for name, rows in zip(CACHES, (keys0, values0, keys1, values1), strict=True):
            if rows.shape[2] == ROWS:
                caches[name] = rows.astype(np.float32)
            else:
                caches[name][:, :, at : at + length] = rows
        at += length
        found.append(results)
    return [*found, [caches[name] for name in CACHES]]


def same(
    found: list[list[np.ndarray]], expected: list[list[np.ndarray]], bound: float = 2e-5
) -> bool:
    """The logits of all calls and the rows of all caches agree, relative to their size."""
    pairs = [(a[0], b[0]) for a, b in zip(found[:-1], expected[:-1], strict=True)] + list(
        zip(found[-1], expected[-1], strict=True)
    )
    return all(np.linalg.norm(a - b) <= bound * np.linalg.norm(b) for a, b in pairs)


@pytest.mark.parametrize(
    ("step", "removed"),
    [(PLAIN_GELU, "Gelu"), (PLAIN_ATTENTION, "Attention")],
    ids=["gelu", "attention"],
)
def test_plain_operators_keep_what_the_tower_sees(
    step: GraphPass, removed: str, simplified: Graphs
) -> None:
    vision, _ = simplified()
    expected, count = see(vision), sum(node.op_type == removed for node in vision.graph)
    assert step(vision).modified == count > 0 and step(vision).modified == 0
    assert np.linalg.norm(see(vision) - expected) < 1e-5 * np.linalg.norm(expected)


def test_plain_norms_keep_what_the_decoder_says(simplified: Graphs) -> None:
    _, decoder = simplified()
    expected = decode(decoder)
    assert PLAIN_NORMS(decoder).modified == 5 and PLAIN_NORMS(decoder).modified == 0
    assert same(decode(decoder), expected)


def test_what_is_not_plain_is_declined(simplified: Graphs) -> None:
    vision, decoder = simplified()
    for node in vision.graph:
        if node.op_type == "Gelu":
            node.attributes["approximate"] = ir.AttrString("approximate", "tanh")
    refused = PLAIN_GELU(vision)
    assert refused.modified == 0 and "approximate" in refused.refused[0]
    assert "mask" in PLAIN_ATTENTION(decoder).refused[0]


@pytest.mark.parametrize("form", [PLAIN_CACHE, FUSED_CACHE], ids=lambda form: form.name)
@pytest.mark.parametrize("calls", [(5, 1, 1), (1, 1, 1), (3, 4), (7,)], ids=str)
def test_both_caches_compute_what_the_canonical_graph_does(
    form: GraphPass, calls: tuple[int, ...], simplified: Graphs
) -> None:
    _, decoder = simplified()
    expected = decode(decoder, calls)
    result = form(decoder)
    assert result.modified == 2 and not result.refused and form(decoder).modified == 0
    decoder.opset_imports[""] = 24
    assert same(decode(decoder, calls), expected)


def test_stale_rows_behind_the_last_are_never_seen(simplified: Graphs) -> None:
    """A cache keeps rows of other answers behind the present one; however large, they
    change nothing.
    """
    for form in (PLAIN_CACHE, FUSED_CACHE):
        _, decoder = simplified()
        form(decoder)
        decoder.opset_imports[""] = 24
        feed = {INPUTS_EMBEDS: EMBEDS[:, :2], POSITION_IDS: np.array([[3, 4]])}
        clean = {name: RNG.normal(size=(1, 2, ROWS, 16)).astype(np.float32) for name in CACHES}
        stale = {name: cache.copy() for name, cache in clean.items()}
        for cache in stale.values():
            cache[:, :, 5:] = 3e4
        first, second = (run(decoder, feed | caches, [LOGITS])[0] for caches in (clean, stale))
        assert np.array_equal(first, second)


@pytest.mark.parametrize("form", [PLAIN_CACHE, FUSED_CACHE], ids=lambda form: form.name)
def test_attention_that_looks_different_is_declined(form: GraphPass, simplified: Graphs) -> None:
    vision, decoder = simplified()
    assert "expected RotaryEmbedding" in form(vision).refused[0]
    next(node for node in decoder.graph if node.op_type == "Attention").replace_input_with(
        0, decoder.graph.inputs[0]
    )
    before = len(decoder.graph)
    assert form(decoder).refused and len(decoder.graph) == before


@pytest.mark.parametrize("step", [FIRST_TOKEN_OUTPUTS, TOKEN_OUTPUTS], ids=lambda step: step.name)
def test_the_chosen_token_is_the_first_of_the_likeliest(
    step: GraphPass, simplified: Graphs
) -> None:
    _, decoder = simplified()
    expected = decode(decoder, (5, 1))
    assert step(decoder).modified == 1 and step(decoder).modified == 0
    assert [value.name for value in decoder.graph.outputs][:3] == [LOGITS, NEXT_TOKEN, LOGITS_MASS]
    found = decode(decoder, (5, 1), wanted=3)
    assert np.allclose(found[0][0][-1], expected[0][0][0], atol=1e-5) and found[0][0].shape == (
        3,
        960,
    )
    for logits, tokens, masses in found[:-1]:
        assert np.array_equal(tokens, logits.argmax(-1)) and np.all(masses > np.abs(logits).sum(-1))
    # A head whose columns are all alike makes all logits equal: the lowest id wins.
    head = decoder.graph.initializers["decoder.lm_head.weight"]
    head.const_value = ir.tensor(np.repeat(head.const_value.numpy()[:, :1], 960, 1), name=head.name)
    (_, tokens, _), *_ = decode(decoder, (5,))
    assert tokens.tolist() == [0]


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_the_mass_is_finite_only_if_everything_is(broken: float, simplified: Graphs) -> None:
    _, decoder = simplified()
    TOKEN_OUTPUTS(decoder)
    feed: dict[str, np.ndarray] = {
        INPUTS_EMBEDS: EMBEDS[:, :3].copy(),
        POSITION_IDS: np.arange(3)[None],
        LOGITS_ROWS: np.array([2]),
    }
    feed |= {name: np.zeros((1, 2, ROWS, 16), np.float32) for name in CACHES}
    assert np.isfinite(run(decoder, feed, [LOGITS_MASS])[0]).all()
    for row in (2, 0):  # also of a row that gets no logits
        spoilt = feed | {INPUTS_EMBEDS: feed[INPUTS_EMBEDS].copy()}
        spoilt[INPUTS_EMBEDS][0, row, 0] = broken
        assert not np.isfinite(run(decoder, spoilt, [LOGITS_MASS])[0]).any()


@pytest.mark.parametrize("form", [PLAIN_CACHE, FUSED_CACHE], ids=lambda form: form.name)
def test_a_companion_row_changes_nothing_but_the_number_of_rows(
    form: GraphPass, simplified: Graphs
) -> None:
    _, decoder = simplified()
    expected = decode(decoder)
    assert COMPANION_ROW(decoder).modified == 6 and COMPANION_ROW(decoder).modified == 0
    run_passes(decoder, [form, PLAIN_NORMS, FIRST_TOKEN_OUTPUTS])
    decoder.opset_imports[""] = 24
    found = decode(decoder)
    assert same(found, expected)
    assert [row[1].tolist() for row in found[:-1]] == [
        row[0].argmax(-1).tolist() for row in expected[:-1]
    ]


def test_a_companion_row_wants_cached_attention(simplified: Graphs) -> None:
    assert COMPANION_ROW(simplified()[0]).refused


def test_half_precision_is_everywhere_but_where_sums_are_long(simplified: Graphs) -> None:
    vision, decoder = simplified()
    expected = see(vision), decode(decoder)
    run_passes(vision, [PLAIN_ATTENTION])
    run_passes(decoder, [PLAIN_CACHE, PLAIN_NORMS, FIRST_TOKEN_OUTPUTS])
    half = to_half({PIXELS, POOL, IMAGE_EMBEDS, LOGITS, LOGITS_MASS})
    assert half(vision).modified > 20 and half(decoder).modified > 20
    assert half(vision).modified == half(decoder).modified == 0
    for model in (vision, decoder):
        for node in model.graph:
            kinds = {
                value.dtype
                for value in (*node.inputs, *node.outputs)
                if value is not None and value.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
            }
            if node.op_type in ("MatMul", "Conv"):
                assert kinds == {ir.DataType.FLOAT16}
            elif node.op_type in ("Softmax", "LayerNormalization", "ReduceMean", "ReduceSum"):
                assert kinds == {ir.DataType.FLOAT}
            assert node.op_type == "Cast" or len(kinds) <= 1, (node.op_type, kinds)
    assert {value.dtype for value in decoder.graph.outputs[3:]} == {ir.DataType.FLOAT16}
    assert np.linalg.norm(see(vision) - expected[0]) < 3e-3 * np.linalg.norm(expected[0])
    assert same(decode(decoder), expected[1], 5e-3)


def test_weights_beyond_half_precision_are_refused(simplified: Graphs) -> None:
    _, decoder = simplified()
    weight = decoder.graph.initializers["decoder.layers.0.mlp.up_proj.weight"]
    weight.const_value = ir.tensor(np.full(weight.shape.numpy(), 7e4, np.float32), name=weight.name)
    to_half({LOGITS})(decoder)
    with pytest.raises(BuildError, match=r"up_proj.weight has values beyond 65504"):
        decoder.graph.initializers["decoder.layers.0.mlp.up_proj.weight.fp16"].const_value.numpy()


def test_a_fixed_capacity_is_written_to_every_cache(simplified: Graphs) -> None:
    _, decoder = simplified()
    FUSED_CACHE(decoder)
    assert fixed_capacity(40)(decoder).modified == 8
    shapes = [
        value.shape
        for value in (*decoder.graph.inputs, *decoder.graph.outputs)
        if "cache" in str(value.name)
    ]
    assert all(shape is not None and shape[2] == 40 for shape in shapes)


def test_a_second_graph_stores_no_weight_again(simplified: Graphs, tmp_path: Path) -> None:
    _, first = simplified()
    _, second = simplified()
    ir.save(first, tmp_path / "first.onnx", external_data="first.weights")
    saved = refer_to(second, tmp_path / "first.onnx")
    ir.save(second, tmp_path / "second.onnx")
    assert saved > 0.9 * (tmp_path / "first.weights").stat().st_size
    assert (tmp_path / "second.onnx").stat().st_size < 0.2 * saved
    again = ir.external_data.load_to_model(ir.load(tmp_path / "second.onnx"))
    assert same(decode(again), decode(simplified()[1]), 1e-6)
    _, other = simplified()
    other.graph.initializers["decoder.lm_head.weight"].name = "decoder.other.weight"
    with pytest.raises(AssertionError, match="is in no weight file"):
        refer_to(other, tmp_path / "first.onnx")


def test_blocks_are_those_an_engine_infers(simplified: Graphs) -> None:
    """TensorRT takes inputs over scales for a block's size and does not look at
    block_size.
    """
    _, decoder = simplified()
    weights = {
        f"{name}": torch.from_numpy(value.const_value.numpy().T.copy())
        for name, value in decoder.graph.initializers.items()
        if is_weight(value)
    }
    scheme = LinearScheme("int4", block=128, symmetric=True, whole=True)
    quantise_linears(lambda name: scheme, Calibrated(weights.__getitem__), EXPLICIT_KERNELS)(
        decoder
    )
    found = [node for node in decoder.graph if node.op_type == "DequantizeLinear"]
    sizes = {node.attributes["block_size"].as_int() for node in found}
    assert len(found) == 15 and sizes == {64, 96}  # all inputs where there are no more than a block
    for node in found:
        levels, scales = (value.shape.numpy() for value in node.inputs[:2])
        assert (
            levels[0] // scales[0] == node.attributes["block_size"].as_int()
            and levels[0] % scales[0] == 0
        )


@pytest.mark.parametrize("peak", [1e-5, 1e-4, 1e-2])
def test_scales_too_small_for_half_precision_are_refused(peak: float, simplified: Graphs) -> None:
    _, decoder = simplified()
    weights = {
        f"{name}": torch.from_numpy(value.const_value.numpy().T.copy())
        for name, value in decoder.graph.initializers.items()
        if is_weight(value)
    }
    name = "decoder.layers.0.mlp.up_proj.weight"
    weights[name] *= peak / weights[name].abs().max()
    quantise_linears(
        lambda name: LinearScheme("int8"), Calibrated(weights.__getitem__), EXPLICIT_KERNELS
    )(decoder)
    to_half({LOGITS})(decoder)
    stored = decoder.graph.initializers[f"{name}.scale.fp16"].const_value
    assert stored is not None
    if peak < 1e-3:
        with pytest.raises(
            BuildError,
            match=r"up_proj.weight.scale has quantisation scales too small for fp16; keep",
        ):
            stored.numpy()
    else:
        assert (stored.numpy() > 0).all()
