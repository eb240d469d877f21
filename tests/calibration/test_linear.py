"""Rounding weights and activations: errors stay within the grid's step, data-aware
rounding and moved scales do better where they should.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.gptq import gptq
from calibration.linear import (
    LinearScheme,
    activation_grid,
    fake_activation,
    grid_for,
    round_in_pairs,
    round_to,
)
from calibration.ranges import RANGES, find_range
from calibration.smoothing import output_error, search_scales

FOUR, EIGHT = LinearScheme("int4", block=32), LinearScheme("int8")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "scheme",
    [FOUR, LinearScheme("int4", block=256), EIGHT, LinearScheme("int8", block=16)],
    ids=lambda s: s.text(),
)
def test_nearest_is_within_half_a_step_and_keeps_zero(scheme: LinearScheme) -> None:
    weight = normal(24, 100) * torch.logspace(-3, 2, 24)[:, None]
    weight[3], weight[:, 7] = 0, 0
    found = round_to(weight, grid_for(weight, scheme))
    step = found.grid.expand(100)[0]
    assert ((found.dequantised() - weight).abs() <= step * 0.5001).all()
    assert (found.dequantised()[:, 7] == 0).all() and (found.dequantised()[3] == 0).all()
    assert found.levels.min() >= found.grid.low and found.levels.max() <= found.grid.high


@pytest.mark.parametrize("scheme", [FOUR, EIGHT], ids=lambda s: s.text())
def test_the_mse_search_is_never_worse_than_the_whole_range(scheme: LinearScheme) -> None:
    weight = normal(16, 96)
    weight[:, 5] *= 8  # outliers, which a shrunken range clips
    errors = []
    for rounding in ("nearest", "mse"):
        found = round_to(
            weight,
            grid_for(weight, LinearScheme(scheme.weight, block=scheme.block, rounding=rounding)),
        )
        errors.append((found.dequantised() - weight).square().sum(1))
    assert (errors[1] <= errors[0] * 1.00001).all()
    assert scheme is EIGHT or errors[1].sum() < 0.99 * errors[0].sum()


def test_gptq_beats_rounding_to_the_nearest_on_correlated_inputs() -> None:
    mixing = normal(96, 96, seed=3)
    inputs = (
        normal(2000, 24, seed=1) @ normal(24, 96, seed=2) + 0.1 * normal(2000, 96, seed=4) @ mixing
    )
    weight = normal(64, 96)
    grid = grid_for(weight, FOUR)
    exact = inputs @ weight.T
    nearest, aware = round_to(weight, grid), gptq(weight, inputs.T @ inputs, grid)
    errors = [
        float((inputs @ q.dequantised().T - exact).square().sum() / exact.square().sum())
        for q in (nearest, aware)
    ]
    assert errors[1] < 0.5 * errors[0]
    assert aware.levels.min() >= 0 and aware.levels.max() <= 15


def test_gptq_without_statistics_rounds_to_the_nearest() -> None:
    weight = normal(8, 64)
    grid = grid_for(weight, FOUR)
    assert torch.equal(
        gptq(weight, torch.zeros(64, 64), grid).levels, round_to(weight, grid).levels
    )


@pytest.mark.parametrize(
    ("inputs", "block"), [(192, 64), (96, 96), (2048, 128), (11008, 128), (64, 64), (100, 100)]
)
def test_whole_blocks_divide_the_inputs(inputs: int, block: int) -> None:
    """An engine that infers a block's size from the number of scales must find the one
    that was meant.
    """
    scheme = LinearScheme("int4", block=128, symmetric=True, whole=True)
    grid = grid_for(normal(4, inputs), scheme)
    assert scheme.grid_block(inputs) == grid.block == block and grid.scale.shape == (
        4,
        inputs // block,
    )


@pytest.mark.parametrize("kind", ["int8-row", "int8-tensor", "int8-static"])
def test_activations_are_rounded_within_half_a_step(kind: str) -> None:
    x = normal(7, 50)
    found = fake_activation(x, kind, (float(x.min()), float(x.max())))
    step = x.abs().amax(1, keepdim=True) / 127 if kind == "int8-row" else (x.max() - x.min()) / 255
    assert ((found - x).abs() <= step * 1.01).all() and not torch.equal(
        found, x
    )  # one-sided grids also round their zero point


@settings(max_examples=50, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_activation_grids_hold_zero_and_span_the_range(a: float, b: float) -> None:
    scale, zero = activation_grid(min(a, b), max(a, b))
    assert scale > 0 and 0 <= zero <= 255
    assert (0 - zero) * scale <= min(a, b, 0) + scale and (255 - zero) * scale >= max(
        a, b, 0
    ) - scale


def test_moved_scales_remove_planted_outliers() -> None:
    """Three channels 60 times the rest, as LLaMA has: 8-bit activations lose everything
    else, moved scales give it back.
    """
    rows, weight = normal(200, 64), normal(48, 64, seed=1)
    rows[:, [3, 20, 41]] *= 60
    weight[:, [3, 20, 41]] /= 60
    for kind in ("int8-row", "int8-tensor"):
        scheme = LinearScheme("int8", kind, smooth=True)
        scales, strength = search_scales(rows, [(weight, [scheme])])
        assert scales is not None and strength > 0
        assert output_error(rows, weight, scheme, scales) < 0.02 * output_error(
            rows, weight, scheme
        )
    assert output_error(rows, weight, LinearScheme(), scales) < 1e-10  # exact without rounding


def test_smoothing_is_left_out_where_it_cannot_help() -> None:
    flat = torch.ones(20, 32)  # every channel alike: nothing to move
    assert search_scales(flat, [(torch.ones(8, 32), [EIGHT])]) == (None, 0.0)
    assert search_scales(torch.zeros(20, 32), [(torch.zeros(8, 32), [EIGHT])]) == (None, 0.0)


@pytest.mark.parametrize("method", RANGES)
def test_every_range_holds_zero_and_most_values(method: str) -> None:
    values = np.random.default_rng(0).normal(1.0, 1.0, 20000).astype(np.float32)
    low, high = find_range(values, method)
    assert low <= 0 <= high and np.mean((values >= low) & (values <= high)) > 0.9
    assert find_range(np.abs(values) + 1, method)[0] == 0.0


def test_methods_differ_on_a_lone_outlier_as_they_should() -> None:
    values = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    values[7] = 30.0
    found = {method: find_range(values, method) for method in RANGES}
    assert (
        found["min-max"][1] == 30.0 and found["percentile"][1] < 5.0 and found["mse"][1] < 30.0
    ), found

    def squared(bounds: tuple[float, float]) -> float:
        step = (bounds[1] - bounds[0]) / 255
        return float(np.square(np.rint(np.clip(values, *bounds) / step) * step - values).mean())

    assert squared(found["mse"]) == min(map(squared, found.values()))
    assert (
        5.0 < found["entropy"][1] < 30.0
    )  # it clips, less than it should where one value lies alone
    assert find_range(np.full(1000, 5.0, np.float32), "entropy") == (0.0, 5.0)


def test_symmetric_weights_have_no_zero_points_and_lose_little() -> None:
    weight = normal(32, 256)
    plain, symmetric = (
        round_to(weight, grid_for(weight, LinearScheme("int4", block=64, symmetric=kind)))
        for kind in (False, True)
    )
    assert (
        (symmetric.grid.zero == 8).all()
        and symmetric.levels.min() >= 0
        and symmetric.levels.max() <= 15
    )
    errors = [(q.dequantised() - weight).square().mean() for q in (plain, symmetric)]
    assert errors[0] < errors[1] < 1.6 * errors[0]
    assert LinearScheme("int4", symmetric=True).text() != LinearScheme("int4").text(), (
        "calibrations of both are kept apart"
    )


@pytest.mark.parametrize("columns", [7, 64, 193])
def test_pairs_fit_16_bits_and_cost_less_than_a_bit(columns: int) -> None:
    """255 * (a + b) must stay within 16 bits for neighbours of one sign, at less than
    the error of 7-bit weights (twice that of 8).
    """
    weight = normal(64, columns) * torch.logspace(-3, 2, 64)[:, None]
    weight[5], weight[6] = 0, 1
    scheme = LinearScheme("int8", "int8-row")
    found, plain = round_in_pairs(weight, scheme), round_to(weight, grid_for(weight, scheme))
    levels = torch.nn.functional.pad(found.levels, (0, columns % 2)).int().unflatten(1, (-1, 2))
    assert int((255 * levels.clamp(min=0).sum(2)).max()) < 2**15 and int(
        (255 * levels.clamp(max=0).sum(2)).min()
    ) >= -(2**15)
    wide = (
        torch.nn.functional.pad(plain.levels, (0, columns % 2))
        .int()
        .unflatten(1, (-1, 2))
        .sum(2)
        .abs()
        .max()
    )
    assert int(wide) > 128, "unfitted weights would saturate"
    errors = [
        ((q.dequantised() - weight) / q.grid.scale).norm(dim=1) * q.grid.scale[:, 0]
        for q in (found, plain)
    ]
    kept = torch.ones(64, dtype=torch.bool)
    kept[5:7] = False  # constant rows are exact in 8 bits
    assert float((errors[0][kept] / errors[1][kept]).mean()) < 1.7
    assert (found.dequantised()[5] == 0).all()


def test_gptq_is_the_published_algorithm() -> None:
    """float64, against the algorithm in its plain form (arXiv 2210.17323, equations 2 and
    3): round a column, spread its error by the inverse of the Hessian, and eliminate the
    column from that inverse. No factorisation, no panels.
    """
    rng = torch.Generator().manual_seed(4)
    mixing = torch.randn(160, 160, generator=rng)
    inputs = torch.randn(400, 160, generator=rng) @ mixing
    weight = torch.randn(24, 160, generator=rng)
    hessian = inputs.T @ inputs
    grid = grid_for(weight, LinearScheme("int4", block=32))
    found = gptq(weight, hessian.clone(), grid)

    wide, inverse_of = weight.double().clone(), hessian.double()
    inverse_of = inverse_of + 0.01 * inverse_of.diagonal().mean() * torch.eye(160).double()
    inverse = torch.linalg.inv(inverse_of)
    scale, zero = (t.double() for t in grid.expand(160))
    expected = torch.zeros(24, 160)
    for column in hessian.diagonal().argsort(descending=True).tolist():
        level = (wide[:, column] / scale[:, column] + zero[:, column]).round().clamp(0, 15)
        expected[:, column] = level.float()
        error = wide[:, column] - (level - zero[:, column]) * scale[:, column]
        wide -= torch.outer(error / inverse[column, column], inverse[column])
        removed = inverse[column].clone()
        inverse -= torch.outer(removed, removed) / removed[column]
        inverse[column] = 0.0
        inverse[:, column] = 0.0
        inverse[column, column] = 1.0
    differing = (found.levels != expected).float().mean()
    assert differing < 0.01  # ties that float32 decides otherwise, and what follows from them
    reference = ((expected - zero) * scale - weight).float() @ inputs.T
    assert (found.dequantised() - weight).matmul(inputs.T).norm() < 1.01 * reference.norm()
