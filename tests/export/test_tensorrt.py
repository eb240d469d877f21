"""TensorRT's own parser and compiler take every graph of the target: each scheme, each
part, three shapes, both forms. No GPU is needed for that.

What the finished engines compute in is read from the compiler's log; its inspector
would need a GPU. The compiler is TensorRT-RTX's, under the bindings of TensorRT 11.4.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from export.schemes import TARGET_SCHEMES
from runtime.contract.graphs import key_cache, present
from runtime.contract.spec import ModelSpec
from runtime.engines.tensorrt.graph_variants import MOST_TOKENS
from tests.compile_only import HERE, compiler
from tests.tensorrt_graphs import short, write_graphs

ROOT = Path(__file__).parents[2] / ".tensorrt"
SHAPES = ("nano", "edge", "7b")
CASES = [(shape, precision) for shape in SHAPES for precision in TARGET_SCHEMES["tensorrt"].schemes]

# Operators that TensorRT 8.4's parser already had (onnx-tensorrt, docs/operators.md at commit
# 009d654), and LayerNormalization, which came with 8.6: the plain graphs use nothing else, so
# that 10.3 takes them.
OLD_OPERATORS = {
    *(
        "Abs",
        "Add",
        "Cast",
        "Concat",
        "Constant",
        "Conv",
        "DequantizeLinear",
        "Div",
        "Equal",
        "Erf",
        "Expand",
        "Gather",
        "Less",
        "LessOrEqual",
    ),
    *(
        "MatMul",
        "Mul",
        "QuantizeLinear",
        "Range",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceSum",
        "Reshape",
        "Shape",
        "Sigmoid",
        "Slice",
    ),
    *(
        "Softmax",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Transpose",
        "Unsqueeze",
        "Where",
        "LayerNormalization",
    ),
}

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """`results(shape, precision)` is what became of each graph, compiled once."""
    environment, done = compiler(ROOT), dict[tuple[str, str], Results]()

    def get(shape: str, precision: str) -> Results:
        if (shape, precision) not in done:
            folder = tmp_path_factory.mktemp(f"{shape}-{precision}")
            done[shape, precision] = _compile(short(shape), precision, folder, environment)
            for large in folder.glob("*.weights"):
                large.unlink()
        return done[shape, precision]

    yield get


def _compile(spec: ModelSpec, precision: str, folder: Path, environment: dict[str, str]) -> Results:
    graphs = write_graphs(spec, precision, folder)
    (folder / "spec.json").write_text(json.dumps(spec.to_json()))
    arguments = [str(folder), str(folder / "spec.json"), str(spec.decoder.context), *graphs]
    run = subprocess.run(
        [sys.executable, str(HERE / "engines.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-1000:]
    found = [
        json.loads(line.removeprefix("RESULT "))
        for line in run.stdout.splitlines()
        if line.startswith("RESULT ")
    ]
    operators = {
        name: {node.op_type for node in ir.load(folder / f"{name}.onnx").graph} for name in graphs
    }
    return {row["graph"]: row | {"operators": operators[row["graph"]]} for row in found}


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "precision"), CASES)
def test_every_graph_becomes_an_engine(shape: str, precision: str, results: Any) -> None:
    spec, found = short(shape), results(shape, precision)
    assert set(found) == {"vision", "vision-fused", "decoder", "decoder-fused"}
    for name, row in found.items():
        assert "error" not in row and not row["errors"], (name, row.get("error"), row["errors"])
        assert row["bytes"] > 1 << 20
    for name in ("vision", "decoder"):
        assert found[name]["operators"] <= OLD_OPERATORS, found[name]["operators"] - OLD_OPERATORS
    _check_ports(spec, found)
    _check_kernels(spec, precision, found)


def _check_ports(spec: ModelSpec, found: Results) -> None:
    """Inputs, outputs, their types and which is whose memory, as parsed."""
    decoder, names = spec.decoder, spec.decoder.cache_names
    for form, rows in (("decoder", -1), ("decoder-fused", decoder.context)):
        inputs, outputs = found[form]["inputs"], found[form]["outputs"]
        cache = [-1, decoder.kv_heads, rows, decoder.head_dim]
        assert all(
            inputs[name] == ["HALF", cache] and outputs[present(name)] == ["HALF", cache]
            for name in names
        )
        assert (
            inputs["inputs_embeds"] == ["HALF", [-1, -1, decoder.hidden]]
            and inputs["position_ids"][0] == inputs["logits_rows"][0] == "INT64"
        )
        assert outputs["logits"] == ["FLOAT", [-1, decoder.vocab_size]]
        assert outputs["next_token"][0] == "INT64" and outputs["logits_mass"][0] == "FLOAT"
    assert (
        found["decoder-fused"]["updates"] == {present(name): name for name in names}
        and not found["decoder"]["updates"]
    )
    assert found["decoder"]["softmax"] == ["FLOAT"] and found["vision"]["softmax"] == ["FLOAT"]
    assert found["vision"]["outputs"] == {"image_embeds": ["FLOAT", [-1, -1, decoder.hidden]]}


def _check_kernels(spec: ModelSpec, precision: str, found: Results) -> None:
    """What linear layers read: weights stay as small as the scheme stores them, in both
    profiles of the decoder, and are never unpacked apart.
    """
    wanted = {
        "fp16": {"vision": ["Half x Half"], "decoder": ["Half x Half"]},
        "int8": {"vision": ["Int8 x Int8"], "decoder": ["Int8 x Int8"]},
        "int8-weights": {"vision": ["Half x Int8"], "decoder": ["Half x Int8"]},
        "int4": {"vision": ["Int8 x Int8"], "decoder": ["Half x Int4", "Int8 x Int8"]},
    }[precision]
    # Projections may be merged: at least this many products per layer, and the adapter's or the
    # head.
    least = {"vision": 4 * spec.vision.layers + 2, "decoder": 4 * spec.decoder.layers + 1}
    for name, row in found.items():
        part = name.removesuffix("-fused")
        profiles = row["kernels"]
        assert len(profiles) == (2 if part == "decoder" else 1), profiles
        for kernels in profiles.values():
            products = {kind: count for kind, count in kernels.items() if " x " in kind}
            assert set(wanted[part]) <= set(products) or precision == "fp16", (name, kernels)
            integers = sum(count for kind, count in products.items() if kind in wanted[part])
            if precision == "fp16":  # a single row may be multiplied by other kernels than these
                continue
            assert (
                integers
                >= least[part]
                - (precision == "int8-weights" and part == "vision") * least[part] // 3
            ), (name, kernels)
            if part == "decoder":
                assert not any("unpacked" in kind for kind in kernels), (name, kernels)
    assert all("attention" in kernels for kernels in found["decoder-fused"]["kernels"].values())
    assert all(
        "attention" in kernels
        for form in ("vision", "vision-fused")
        for kernels in found[form]["kernels"].values()
    )


@pytest.mark.slow
def test_weights_without_company_are_unpacked_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why `companion_row` is there; if this fails, the compiler has learnt it and the
    pass can go.
    """
    from dataclasses import replace

    from export.targets import LOWERING

    monkeypatch.setitem(LOWERING, "tensorrt", replace(LOWERING["tensorrt"], byte_weights=()))
    found = _compile(short("edge"), "int8-weights", tmp_path, compiler(ROOT))
    decode = found["decoder-fused"]["kernels"]["0"]
    assert any("Int8 unpacked" in kind for kind in decode), decode


def test_a_call_is_bounded(tmp_path: Path) -> None:
    """Scores take memory by the length of a call times that of the cache: see
    `MOST_TOKENS`.
    """
    from runtime.engines.tensorrt.graph_variants import decoder_variant

    spec = short("7b")
    prefill = decoder_variant(spec, False, spec.decoder.context).profiles(spec.decoder.context)[1]
    assert (
        prefill["inputs_embeds"][2][1] == MOST_TOKENS < spec.decoder.context
        and prefill[key_cache(0)][2][2] == spec.decoder.context
    )
