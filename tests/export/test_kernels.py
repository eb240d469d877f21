"""Quantised kernels: they compute what the reference arithmetic says, and never saturate."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from calibration.calibrate import Calibrated
from calibration.linear import LinearScheme, fake_activation, round_in_pairs
from export.passes import SIMPLIFY, run_passes
from export.passes.integer_kernels import INTEGER_KERNELS
from export.passes.quantise import quantise_linears, store_half
from export.schemes import SCHEMES
from export.steps import _quiet
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
    ranges: dict[str, Any] = {"w|range": np.array([x.min(), x.max()])}
    np.savez(tmp_path / "block.npz", **ranges)
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
    (found,) = open_model(model).run(["y"], {"x": x})
    static = (float(x.min()), float(x.max())) if scheme.activation == "int8-static" else None
    wanted = (
        fake_activation(torch.from_numpy(x), scheme.activation, static)
        @ calibrated.quantised("w.weight", scheme).dequantised().T
    )
    error = np.linalg.norm(found - wanted.numpy()) / np.linalg.norm(wanted.numpy())
    assert error < (
        0.01 if scheme.activation == "float" else 1e-5
    )  # the weight-only kernel rounds activations to 8 bit per block


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
