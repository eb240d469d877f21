"""Graphs for ONNX Runtime's CUDA provider: every node has a kernel there, nothing is
left for the CPU, and each scheme keeps to PyTorch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from export.capture import capture
from export.parity.cpu_reference import reference_session
from export.parity.references import compare_with_checkpoint, draw_fresh
from export.passes import SIMPLIFY, run_passes
from export.passes.cuda_kernels import CUDA_KERNELS, FOLDED
from export.passes.cuda_operators import MULTI_HEAD_ATTENTION, ONE_PICTURE, SIMPLIFIED_NORMS
from export.schemes import TARGET_SCHEMES, find_scheme
from export.steps import _quiet
from export.targets import LOWERING
from runtime.contract.bundle import DECODER, VISION, read_bundle
from runtime.contract.errors import UsageError
from runtime.contract.graphs import (
    INPUTS_EMBEDS,
    LOGITS,
    LOGITS_MASS,
    NEXT_TOKEN,
    PIXELS,
    SEQLENS_K,
    TOTAL_LENGTH,
    key_cache,
)
from runtime.engines.onnxruntime.sessions import session_options
from tests.conftest import TINY
from trainer.checkpoint import open_checkpoint
from trainer.model import InfMLLM

SCHEMES = list(TARGET_SCHEMES["cuda"].schemes)


def since_version(node: ir.Node, opset: int) -> int:
    if node.domain or not onnx.defs.has(node.op_type):
        return 1
    return int(onnx.defs.get_schema(node.op_type, opset).since_version)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("file", [VISION, DECODER])
def test_every_node_has_a_kernel_on_the_gpu(
    scheme: str, file: str, built_for: Callable[[str, str], Path]
) -> None:
    model = ir.load(built_for("cuda", scheme) / file)
    opset = model.opset_imports[""]
    for node in model.graph:
        name = f"{node.domain}::{node.op_type}"
        if name in FOLDED:
            continue
        assert name in CUDA_KERNELS, f"{name} is not known to have a CUDA kernel"
        first = node.inputs[0]
        assert first is not None and first.dtype is not None, (
            f"{name} {node.name} has a first input without a type"
        )
        assert CUDA_KERNELS[name].serves(since_version(node, opset), first.dtype.name), (
            f"{name} of {first.dtype.name} at opset {opset}"
        )


def test_the_table_tells_versions_and_types_apart() -> None:
    reshape, attention = (
        CUDA_KERNELS["::Reshape"],
        CUDA_KERNELS["com.microsoft::GroupQueryAttention"],
    )
    assert (
        reshape.serves(19, "FLOAT16")
        and not reshape.serves(21, "FLOAT16")
        and not reshape.serves(13, "FLOAT16")
    )
    assert not attention.serves(1, "FLOAT") and not CUDA_KERNELS["::MatMul"].serves(14, "FLOAT16")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_keeps_to_pytorch(
    scheme: str, built_for: Callable[[str, str], Path], tiny_checkpoint: Path
) -> None:
    session = reference_session(read_bundle(built_for("cuda", scheme)))
    assert session.bundle.verdict == "VERIFIED" and session.bundle.schemes["cache"] == "fp16"
    stored = open_checkpoint(tiny_checkpoint)
    for stage in compare_with_checkpoint(session, stored, draw_fresh(stored, 3, "synthetic")):
        assert (
            stage.passed and stage.error < (0.95 if "int4" in scheme else 0.8) * stage.tolerance
        ), stage  # random weights are 4 bit's worst case


def test_the_decoder_computes_in_half_precision_and_gives_full_logits(
    built_for: Callable[[str, str], Path],
) -> None:
    graph = ir.load(built_for("cuda", "fp16") / DECODER).graph
    types = {value.name: value.dtype for value in (*graph.inputs, *graph.outputs)}
    half, full = ir.DataType.FLOAT16, ir.DataType.FLOAT
    assert types[INPUTS_EMBEDS] == types[key_cache(0)] == types["present.key_cache.1"] == half
    assert types[LOGITS] == types[LOGITS_MASS] == full and types[NEXT_TOKEN] == ir.DataType.INT64
    assert types[SEQLENS_K] == types[TOTAL_LENGTH] == ir.DataType.INT32
    norms = [node for node in graph if node.op_type == "SimplifiedLayerNormalization"]
    assert len(norms) == 5 and all(
        value is not None and value.dtype == half for node in norms for value in node.inputs
    )


def test_weights_are_in_blocks_with_half_precision_scales(
    built_for: Callable[[str, str], Path],
) -> None:
    graph = ir.load(built_for("cuda", "int4") / DECODER).graph
    layers = [node for node in graph if node.op_type == "MatMulNBits"]
    assert Counter(node.attributes.get_int("bits", 0) for node in layers) == {4: 2 * 4, 8: 1}
    assert all(node.attributes.get_int("accuracy_level", 9) == 0 for node in layers), (
        "activations are never rounded"
    )
    assert all(
        node.inputs[2] is not None
        and node.inputs[2].dtype == ir.DataType.FLOAT16
        and len(node.inputs) == 3
        for node in layers
    )
    assert not any(
        node.op_type == "MatMulNBits" for node in ir.load(built_for("cuda", "int4") / VISION).graph
    )


def test_what_the_target_has_no_kernel_for_is_refused_with_the_choices() -> None:
    with pytest.raises(
        UsageError, match="fp16, int8, int8-weights, int4, int4-all for target cuda"
    ):
        find_scheme("fp32", "cuda")


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ir.Model]:
    with _quiet():
        model = InfMLLM(TINY, torch.Generator().manual_seed(1))
        captured = vars(capture(TINY, lambda name: model.get_parameter(name).detach()))
        for graph in captured.values():
            run_passes(graph, SIMPLIFY)
    return dict(captured)


def image_embeds(model: ir.Model, folder: Path) -> np.ndarray:
    import onnxruntime as ort

    ir.save(model, folder / "vision.onnx")
    session = ort.InferenceSession(
        str(folder / "vision.onnx"), session_options(1), providers=["CPUExecutionProvider"]
    )
    random = np.random.default_rng(4)
    feed = {
        PIXELS: random.normal(size=(1, 3, 32, 32)).astype(np.float32),
        "pool": np.full((4, 16), 1 / 16, np.float32),
    }
    return np.asarray(session.run(None, feed)[0])


def test_the_vision_passes_keep_the_numbers_and_leave_no_shape_arithmetic(
    graphs: dict[str, ir.Model], tmp_path: Path
) -> None:
    lowered = graphs["vision"].clone()
    assert [
        result.modified for _, result in run_passes(lowered, [ONE_PICTURE, MULTI_HEAD_ATTENTION])
    ] == [1, 2]
    assert {"Shape", "Expand", "Attention"}.isdisjoint(node.op_type for node in lowered.graph)
    np.testing.assert_allclose(
        image_embeds(lowered, tmp_path), image_embeds(graphs["vision"], tmp_path), atol=2e-6
    )
    assert [
        result.modified for _, result in run_passes(lowered, [ONE_PICTURE, MULTI_HEAD_ATTENTION])
    ] == [0, 0]


def test_the_norm_pass_keeps_the_numbers(graphs: dict[str, ir.Model]) -> None:
    lowered = graphs["decoder"].clone()
    before = {
        node.inputs[1].name: node.attributes["epsilon"].as_float()
        for node in lowered.graph
        if node.op_type == "RMSNormalization"
    }
    assert run_passes(lowered, [SIMPLIFIED_NORMS])[0][1].modified == len(before) == 5
    norms = [node for node in lowered.graph if node.op_type == "SimplifiedLayerNormalization"]
    assert {node.inputs[1].name: node.attributes["epsilon"].as_float() for node in norms} == before
    assert run_passes(lowered, [SIMPLIFIED_NORMS])[0][1].modified == 0


def test_attention_that_is_not_a_towers_is_refused(graphs: dict[str, ir.Model]) -> None:
    ((_, result),) = run_passes(graphs["decoder"].clone(), [MULTI_HEAD_ATTENTION])
    assert result.modified == 0 and len(result.refused) == 2 and "mask" in result.refused[0]


def test_a_fixed_batch_is_not_asked_of_graphs_that_repeat_something_else(
    graphs: dict[str, ir.Model],
) -> None:
    model = graphs["vision"].clone()
    expand = next(node for node in model.graph if node.op_type == "Expand")
    expand.replace_input_with(
        0, next(node for node in model.graph if node.op_type == "Conv").outputs[0]
    )
    ((_, result),) = run_passes(model, [ONE_PICTURE])
    assert result.modified == 0 and "not one token" in result.refused[0]


def test_the_plan_of_the_target_is_what_its_engine_runs() -> None:
    assert {plan.opset for plan in LOWERING["cuda"].graphs.values()} == {20} and set(
        LOWERING["cuda"].graphs
    ) == {"vision", "decoder"}
