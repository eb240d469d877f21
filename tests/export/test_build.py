"""Builds: every scheme is proved equal to PyTorch within its bound, the gate fails what
drifts, and no failure touches the previous bundle.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from PIL import Image

from export import pipeline
from export.inspection.describe import describe_bundle, format_description
from export.parity.references import check_origin, compare_with_checkpoint, draw_fresh
from export.passes.pack_projections import parts_of
from export.pipeline import STEPS, BuildOptions, build
from export.schemes import SCHEMES, choose_scheme, find_scheme
from runtime.contract.bundle import DECODER, VISION, read_bundle
from runtime.contract.errors import BundleError, ParityError, UsageError
from runtime.contract.goldens import read_goldens
from runtime.contract.graphs import key_cache, present
from runtime.contract.image import to_pixels
from runtime.session import load
from trainer.checkpoint import load_checkpoint, open_checkpoint


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_verified_and_far_from_its_bound(
    scheme: str, built: Callable[[str], Path], tiny_checkpoint: Path
) -> None:
    session = load(built(scheme))
    stored = open_checkpoint(tiny_checkpoint)
    assert session.bundle.verdict == "VERIFIED"
    for stage in [
        *session.replay(tolerance=SCHEMES[scheme].tolerance),
        *compare_with_checkpoint(session, stored, draw_fresh(stored, 3, "synthetic")),
    ]:
        assert (
            stage.passed and stage.error < (0.95 if "int4" in scheme else 0.8) * stage.tolerance
        ), stage  # random weights are 4 bit's worst case
        if scheme == "fp32" and stage.agreement is not None:
            assert stage.agreement == 1.0


@pytest.mark.parametrize("scheme", ["fp32", "fp16", "int8"])
def test_what_is_stored_is_what_the_scheme_says(scheme: str, built: Callable[[str], Path]) -> None:
    description = describe_bundle(read_bundle(built(scheme)))
    for graph in description["graphs"].values():
        stored = {kind: row["parameters"] for kind, row in graph["storage"].items()}
        main = max(stored, key=lambda kind: stored[kind])
        assert main == {"fp32": "float", "fp16": "float16", "int8": "int8"}[scheme], stored
    operators = description["graphs"][DECODER]["operators"]
    assert operators["GroupQueryAttention"] == 2 and "Attention" not in operators
    if scheme == "int8":
        assert (
            "MatMul" not in operators and operators["MatMulInteger"] == 2 * 4 + 1
        )  # projections of one input are one product
        assert (
            description["graphs"][VISION]["operators"]["MatMul"] == 1
        )  # the pooling matrix, which is no weight
    text = format_description(description)
    assert "VERIFIED" in text and "parity vision" in text


def test_int8_and_fp16_bundles_are_smaller(built: Callable[[str], Path]) -> None:
    weights = {
        s: sum((built(s) / f"{g}.weights").stat().st_size for g in ("vision", "decoder"))
        for s in SCHEMES
    }
    assert weights["fp16"] < 0.65 * weights["fp32"] and weights["int8"] < 0.55 * weights["fp32"]
    assert weights["int4-all"] < 0.8 * weights["int4"] < 0.8 * weights["int8"]


def test_weight_names_survive_capture(built: Callable[[str], Path], tiny_checkpoint: Path) -> None:
    parameters = {
        name
        for name, tensor in load_checkpoint(tiny_checkpoint).model.named_parameters()
        if tensor.ndim == 2
    }
    names = {
        part
        for graph in (VISION, DECODER)
        for name in ir.load(built("fp32") / graph).graph.initializers
        for part in parts_of(name)
    }
    assert parameters - names == {"decoder.embed_tokens.weight"}


def test_the_decoder_updates_its_cache_in_place(built: Callable[[str], Path]) -> None:
    graph = onnx.load(built("fp32") / DECODER, load_external_data=False).graph
    fused = [node for node in graph.node if node.op_type == "GroupQueryAttention"]
    assert [node.input[3] for node in fused] == [key_cache(layer) for layer in range(2)]
    assert [node.output[1] for node in fused] == [present(key_cache(layer)) for layer in range(2)]


def test_a_build_can_be_dumped_and_repeated(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = BuildOptions(
        tiny_checkpoint, SCHEMES["fp32"], "cpu", tmp_path / "b", dump=tmp_path / "dump"
    )
    steps: list[str] = []
    first = build(options, steps.append)
    assert steps == [name for name, _ in STEPS]
    dumped = {path.name for path in (tmp_path / "dump").glob("*.onnx")}
    assert {"vision.00-capture.onnx", "decoder.00-capture.onnx"} < dumped and any(
        "group_query_attention" in name for name in dumped
    )
    before = snapshot(tmp_path / "b")
    again = build(replace(options, dump=None, out=tmp_path / "c"))
    after = snapshot(tmp_path / "c")
    assert not again.reused and {name for name in before if before[name] != after[name]} == {
        "manifest.json"
    }  # which records times
    changed = {(graph, step): result.modified for graph, step, result in first.counts}
    assert (
        changed["decoder", "group_query_attention"] == 2
        and changed["vision", "fold_transposes"] == 10
    )


@pytest.mark.parametrize("name", ["capture graphs", "verify against PyTorch"])
def test_a_failure_in_a_step_leaves_the_previous_bundle(
    copied: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    before = snapshot(copied)

    def fail(state: pipeline.Build) -> pipeline.Build:
        raise RuntimeError("killed here")

    monkeypatch.setattr(
        pipeline, "STEPS", [(step, fail if step == name else run) for step, run in STEPS]
    )
    with pytest.raises(RuntimeError, match="killed here"):
        build(BuildOptions(tiny_checkpoint, SCHEMES["fp16"], "cpu", copied))
    assert snapshot(copied) == before
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]


def test_the_gate_refuses_a_wrong_graph_and_names_the_stage(
    copied: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(state: pipeline.Build) -> pipeline.Build:
        norm = state.graphs["decoder"].graph.initializers[
            "decoder.layers.1.post_attention_layernorm.weight"
        ]
        assert norm.const_value is not None
        norm.const_value = ir.tensor(
            norm.const_value.numpy() * np.linspace(0.5, 1.5, 64, dtype=np.float32), name=norm.name
        )
        return state

    before = snapshot(copied)
    steps = [(n, s) for n, s in STEPS]
    monkeypatch.setattr(pipeline, "STEPS", [*steps[:3], ("break", broken), *steps[3:]])
    options = BuildOptions(tiny_checkpoint, SCHEMES["fp32"], "cpu", copied, questions=0)
    with pytest.raises(
        ParityError,
        match=r"tensors: decoder.layers.1.mlp.gate_proj.weight differs.*nothing was written",
    ):
        build(options)
    assert snapshot(copied) == before
    assert build(replace(options, allow_unverified=True)).verdict == "UNVERIFIED"
    assert read_bundle(copied).verdict == "UNVERIFIED"


def test_a_bundle_is_not_compared_with_another_checkpoint(
    built: Callable[[str], Path], tiny_checkpoint: Path
) -> None:
    other = replace(open_checkpoint(tiny_checkpoint), sha256="0" * 64)
    with pytest.raises(BundleError, match="built from checkpoint"):
        check_origin(read_bundle(built("fp32")), other)


def test_unknown_names_list_the_choices(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="int8"):
        find_scheme("int3")
    with pytest.raises(UsageError, match="cpu"):
        build(BuildOptions(tiny_checkpoint, SCHEMES["fp32"], "abacus", tmp_path / "b"))
    assert not list(tmp_path.iterdir())


def test_schemes_choose_by_the_longest_prefix() -> None:
    scheme = choose_scheme("int8", keep=["decoder.lm_head=fp16"])
    assert (
        scheme.linear("decoder.lm_head.weight").weight == "fp16"
        and scheme.linear("decoder.layers.0.x").weight == "int8"
    )


def test_golden_cases_come_from_the_data_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    image = Image.effect_noise((40, 30), 60).convert("RGB")
    image.save(tmp_path / "a.png")
    rows = [
        {"image": "a.png", "task": "vqa", "question": "what?", "answer": "x"},
        {"image": "a.png", "task": "caption", "answer": "x"},
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    build(
        BuildOptions(
            tiny_checkpoint, SCHEMES["fp32"], "cpu", tmp_path / "b", calib=str(tmp_path / "d.jsonl")
        )
    )
    session = load(tmp_path / "b")
    goldens = read_goldens(tmp_path / "b" / "goldens.npz")
    assert all(np.array_equal(golden.pixels, to_pixels(image, session.spec)) for golden in goldens)
    assert (
        session.bundle.provenance["goldens"]["source"] == "d.jsonl"
        and session.bundle.verdict == "VERIFIED"
    )


@pytest.mark.parametrize(
    ("scheme", "graph", "name", "place"),
    [
        (
            "fp32",
            "decoder",
            "decoder.lm_head.weight",
            "tensors: decoder.lm_head.weight differs",
        ),
        (
            "int4-hybrid",
            "prefill",
            "decoder.layers.1.input_layernorm.weight",
            "tensors: decoder.layers.1.self_attn.q_proj.weight has scales",
        ),
        (
            "fp32",
            "vision",
            "pool_adapter.fc2.bias",
            "tensors: pool_adapter.fc2.bias differs",
        ),
    ],
)
def test_a_fault_is_found_where_it_was_planted(
    scheme: str,
    graph: str,
    name: str,
    place: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(state: pipeline.Build) -> pipeline.Build:
        value = state.graphs[graph].graph.initializers[name]
        assert value.const_value is not None
        array = value.const_value.numpy()
        value.const_value = ir.tensor(
            array + np.float32(2) * np.roll(array, 7, axis=-1) + np.float32(0.3), name=name
        )
        return state

    monkeypatch.setattr(pipeline, "STEPS", [*STEPS[:5], ("break", broken), *STEPS[5:]])
    with pytest.raises(ParityError, match=place):
        build(BuildOptions(tiny_checkpoint, SCHEMES[scheme], "cpu", tmp_path / "b", questions=0))


def test_mixtures_may_drift_as_far_as_what_they_mix() -> None:
    assert (
        choose_scheme("fp32", cache="int8").tolerance["decode"]
        == SCHEMES["int8"].tolerance["decode"]
    )
    assert (
        choose_scheme("fp32", cache="int8").tolerance["vision"]
        == SCHEMES["fp32"].tolerance["vision"]
    )
    assert choose_scheme("fp16", keep=["vision_tower=int8"]).tolerance == SCHEMES["int8"].tolerance


def test_names_of_blocks_end_where_their_parts_do() -> None:
    scheme = choose_scheme("int8", keep=["decoder.layers.1=fp16"])
    assert scheme.linear("decoder.layers.1.mlp.up_proj.weight").weight == "fp16"
    assert scheme.linear("decoder.layers.10.mlp.up_proj.weight").weight == "int8"
    assert (
        choose_scheme("int8", keep=["decoder=fp16"]).linear("decoder.lm_head.weight").weight
        == "fp16"
    )
    assert (
        choose_scheme("fp32", keep=["decoder=int8"]).linear("decoder.lm_head.weight").activation
        == "int8-tensor"
    )
    four = choose_scheme("int4", 128, "nearest", keep=["vision_tower=int4-all"])
    assert four.linear("vision_tower.blocks.0.mlp.fc1.weight").text() == "int4/128 smooth"
