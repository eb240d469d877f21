"""Compares every tensor that a bundle's graph stores with the checkpoint's.

Calibration may have moved scales between layers (SmoothQuant, AWQ) and rounded weights.
Both leave traces that can be checked without the calibration data: a moved scale is the
ratio of a norm's weight to the checkpoint's, and a rounded weight follows from the
weight, its grid and the method of rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calibration.blocks import LinearGroup, Reader, StreamedModel
from calibration.linear import (
    SHARES,
    Grid,
    LinearScheme,
    Quantised,
    fit_pairs,
    grid_for,
    round_in_pairs,
    round_to,
)
from export.parity.float_view import FloatView, read_tensors
from export.parity.stored_weights import StoredWeight
from export.passes.pack_projections import parts_of
from runtime.contract.spec import ModelSpec
from trainer.decoder import rotary_tables

__all__ = ["TensorFault", "check_tensors", "parameter_names", "weight_part"]

_EXACT, _HALF = 1e-5, 2e-3  # relative differences that float32 and half precision explain
_FLIPPED, _FLIPPED_HALF = 2e-3, 2e-2  # share of levels at a tie that may round the other way
_TIES_HALF = 0.3  # share of blocks whose best range half precision leaves open
_WORSE_THAN_NEAREST = 3.0  # error-feedback rounding has at most this many times its error
_FURTHEST = 10  # levels that error feedback may move a weight of 16 levels
_ELEMENTS = 1 << 22  # weights compared at once
_GAIN = 0.1  # largest departure of a rounded channel's gain from 1
_SMALLEST, _LARGEST = 1e-4, 1e4  # scales that smoothing may move


@dataclass(frozen=True)
class TensorFault:
    """A stored tensor that does not follow from the checkpoint: its name, and how it
    differs.
    """

    name: str
    problem: str

    def __str__(self) -> str:
        return f"{self.name} {self.problem}"


@dataclass
class _Check:
    view: FloatView
    read: Reader
    faults: list[TensorFault] = field(default_factory=list)
    columns: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    half: bool = False

    def fault(self, name: str, problem: str) -> None:
        self.faults.append(TensorFault(name, problem))


def parameter_names(spec: ModelSpec, part: str) -> list[str]:
    """Returns the parameters that a "vision" or "decoder" graph must contain."""
    model = StreamedModel(spec, lambda name: torch.empty(0)).model
    decoder = part == "decoder"
    return [
        name
        for name in model.state_dict()
        if name.startswith("decoder.") == decoder and not name.startswith("decoder.embed_tokens")
    ]


def check_tensors(view: FloatView, spec: ModelSpec, part: str, read: Reader) -> list[TensorFault]:
    """Returns the tensors of a "vision" or "decoder" graph that do not follow from the
    checkpoint, which `read` reads. An empty list means that all of them do.
    """
    stored = read_tensors(view)
    weights = {part: weight for weight in view.weights.values() for part in parts_of(weight.name)}
    check = _Check(view, read)
    names = parameter_names(spec, part)
    groups = [
        feed
        for block in StreamedModel(spec, read).blocks()
        for feed in block.feeds
        if feed.linears[0].startswith("decoder.") == (part == "decoder")
    ]
    norms = {feed.norm for feed in groups if feed.norm}
    for name in names:
        module = name.rpartition(".")[0]
        if name not in weights and name not in stored:
            if not name.endswith(".bias") or bool(read(name).any()):  # zeros may be left out
                check.fault(name, "is not in the graph")
        elif name not in weights and module not in norms:
            _check_plain(check, name, stored[name]())
    for name in sorted(set(weights) - set(names)):
        check.fault(name, "is in the graph, but not in the model")
    if part == "decoder":
        _check_rotary(check, spec, {name: stored[name]() for name in stored if "rotary" in name})
    if check.faults:
        return check.faults
    for group in groups:
        columns = _moved_scales(check, group, {name: stored[name] for name in stored})
        for linear in group.linears:
            name = f"{linear}.weight"
            carries = any(other.rows == linear for other in groups)
            _check_weight(check, weights[name], name, columns, carries)
    return check.faults


def _check_plain(check: _Check, name: str, found: NDArray[np.generic]) -> None:
    expected = check.read(name).numpy().astype(found.dtype)
    if expected.shape != found.shape or not np.array_equal(expected, found):
        check.fault(name, _difference(found, expected))


def _difference(found: NDArray[np.generic], expected: NDArray[np.generic]) -> str:
    if found.shape != expected.shape:
        return f"has shape {list(found.shape)}, expected {list(expected.shape)}"
    wide, reference = found.astype(np.float64), expected.astype(np.float64)
    norm = max(float(np.linalg.norm(reference)), 1e-30)
    return f"differs from the checkpoint's by {np.linalg.norm(wide - reference) / norm:.2g}"


def _check_rotary(check: _Check, spec: ModelSpec, found: Mapping[str, NDArray[np.generic]]) -> None:
    for name, table in zip(("cos", "sin"), rotary_tables(spec.decoder), strict=True):
        whole = f"decoder.rotary_{name}"
        if whole not in found:
            check.fault(whole, "is not in the graph")
            continue
        expected = table.numpy().astype(found[whole].dtype)
        if not np.array_equal(found[whole], expected[: found[whole].shape[0]]):
            check.fault(whole, "is not the model's table of rotations")


def _moved_scales(check: _Check, group: LinearGroup, stored: Mapping[str, object]) -> Tensor | None:
    """Returns the scales [K] that calibration moved into a group's weights, or None."""
    if group.rows:
        return check.rows.get(f"{group.rows}.weight")
    if not group.norm:
        return None
    weight = f"{group.norm}.weight"
    found_raw = stored[weight]()  # type: ignore[operator]
    check.half = found_raw.dtype == np.float16
    found = torch.from_numpy(found_raw.astype(np.float32))
    expected = check.read(weight)
    if found.shape != expected.shape:
        check.fault(weight, f"has shape {list(found.shape)}, expected {list(expected.shape)}")
        return None
    if np.array_equal(found_raw, expected.numpy().astype(found_raw.dtype)):
        scales = None
    else:
        scales = torch.where(expected == 0, torch.ones_like(expected), expected / found)
        if not bool(((scales > _SMALLEST) & (scales < _LARGEST)).all()):
            check.fault(weight, "is not the checkpoint's times a positive scale")
            return None
    bias = f"{group.norm}.bias"
    if bias in stored:
        shift_raw = stored[bias]()  # type: ignore[operator]
        shift, reference = torch.from_numpy(shift_raw.astype(np.float32)), check.read(bias)
        reference = reference if scales is None else reference / scales
        half = shift_raw.dtype == np.float16 or check.half
        if _far(shift, reference, _HALF if half else _EXACT):
            check.fault(bias, _difference(shift.numpy(), reference.numpy()))
    return scales


def _far(found: Tensor, expected: Tensor, relative: float) -> bool:
    """True if any element differs by more than a share of itself and of the largest."""
    floor = relative * 1e-2 * float(expected.abs().max()) if expected.numel() else 0.0
    return bool(((found - expected).abs() > relative * expected.abs() + floor + 1e-9).any())


def _check_weight(
    check: _Check, weight: StoredWeight, name: str, columns: Tensor | None, carries: bool
) -> None:
    """Checks one parameter's part of a stored weight, some rows at a time. `carries` tells
    whether its rows may have absorbed the scales of the next layer's input.
    """
    reference = check.read(name)
    arrays = weight.read()
    first = _first_row(weight, name, check.read)
    if weight.shape[0] != reference.shape[1] or first + len(reference) > weight.shape[1]:
        check.fault(name, f"has shape {list(weight.shape)}, expected {list(reference.shape)[::-1]}")
        return
    half = check.half and columns is not None
    tolerance = _HALF if half or _are_half(arrays[1]) else _EXACT * 10
    moved = []
    step = max(1, _ELEMENTS // reference.shape[1])
    for start in range(0, len(reference), step):
        rows = reference[start : start + step]
        rows = rows if columns is None else rows * columns
        stored = [_rows(array, first + start, len(rows)) for array in arrays]
        if weight.kind in ("fp32", "fp16"):
            problem, scales = _equals(rows, stored[0], carries, weight.kind == "fp16" or check.half)
        else:
            grid = Grid(stored[1], stored[2], *_range_of(weight), weight.block or rows.shape[1])
            problem, scales = _any_follows(weight, rows, stored[0], grid, carries, tolerance, half)
        if problem is not None:
            check.fault(name, problem)
            return
        moved.append(torch.ones(len(rows)) if scales is None else scales)
    whole = torch.cat(moved)
    if carries and bool((whole - 1).abs().max() > _EXACT):
        check.rows[name] = whole


def _any_follows(
    weight: StoredWeight,
    reference: Tensor,
    levels: Tensor,
    grid: Grid,
    carries: bool,
    tolerance: float,
    half: bool,
) -> tuple[str | None, Tensor | None]:
    """Returns (None, moved scales) if any scheme explains the rows, else the last problem."""
    problem: str | None = None
    for scheme in _schemes(weight):
        problem, rows = _follows(reference, levels, grid, scheme, carries, tolerance, half)
        if problem is None:
            return None, rows
    return problem, None


def _equals(
    reference: Tensor, found: Tensor, carries: bool, half: bool
) -> tuple[str | None, Tensor | None]:
    rows = None
    if carries:
        rows = (reference * reference).sum(1) / (reference * found).sum(1).clamp(min=1e-30)
        if bool((rows - 1).abs().max() <= _HALF):
            rows = None
    scaled = reference if rows is None else reference / rows[:, None]
    if _far(found, scaled, _HALF if half else _EXACT):
        return _difference(found.numpy(), scaled.numpy()), None
    return None, rows


def _first_row(weight: StoredWeight, name: str, read: Reader) -> int:
    """Returns where a parameter's outputs begin in a packed weight."""
    start = 0
    for part in parts_of(weight.name):
        if part == name:
            return start
        start += read(part).shape[0]
    raise AssertionError(f"{name} is a part of {weight.name}")


def _rows(array: NDArray[np.float32], start: int, count: int) -> Tensor:
    """Returns outputs [count, …] of an array [..., N]."""
    if np.ndim(array) < 2:
        return torch.from_numpy(np.array(array, np.float32).reshape(1, 1))
    return torch.from_numpy(np.array(array[:, start : start + count].T, np.float32, order="C"))


def weight_part(
    weight: StoredWeight, name: str, array: NDArray[np.float32], read: Reader
) -> Tensor:
    """Returns one parameter's rows [N, …] of an array [..., N] of a packed weight."""
    return _rows(array, _first_row(weight, name, read), read(name).shape[0])


def _are_half(scale: NDArray[np.float32]) -> bool:
    """True if scales are exactly representable in half precision."""
    return bool(np.array_equal(np.float32(np.float16(scale)), scale))


def _range_of(weight: StoredWeight) -> tuple[int, int]:
    if weight.kind == "int4":
        return 0, 15
    return -127, 127


def _schemes(weight: StoredWeight) -> list[LinearScheme]:
    """Returns the schemes that may have produced a stored weight."""
    block = weight.block
    if weight.kind == "int8":
        activation = "float" if weight.activation == "block" else weight.activation
        return [LinearScheme("int8", activation, block)]
    roundings = ("nearest", "mse", "gptq")
    return [
        LinearScheme("int4", "float", block, rounding, symmetric=weight.symmetric)
        for rounding in roundings
    ]


def _follows(
    reference: Tensor,
    levels: Tensor,
    grid: Grid,
    scheme: LinearScheme,
    carries: bool,
    tolerance: float,
    half: bool,
) -> tuple[str | None, Tensor | None]:
    """Returns (None, scales moved into the rows) if a scheme explains the stored levels
    [N, K] and their grid, and otherwise the problem.
    """
    if scheme.bits == 8 and scheme.activation == "float" and grid.block < reference.shape[1]:
        levels = levels - grid.zero.repeat_interleave(grid.block, 1)[:, : levels.shape[1]]
        grid = Grid(grid.scale, torch.zeros_like(grid.zero), -127, 127, grid.block)
    elif scheme.bits == 8:
        levels = levels - grid.zero[:, :1]
        grid = Grid(grid.scale, torch.zeros_like(grid.zero), -127, 127, reference.shape[1])
    expected = (
        round_in_pairs(reference, scheme).grid if scheme.pairs else grid_for(reference, scheme)
    )
    if expected.scale.shape != grid.scale.shape:
        if grid.scale.shape[1] < expected.scale.shape[1] or expected.scale.shape[1] != 1:
            return f"has {grid.scale.shape[1]} scales per channel", None
        expected = Grid(
            expected.scale.expand_as(grid.scale),
            expected.zero.expand_as(grid.zero),
            expected.low,
            expected.high,
            grid.block,
        )
    ratio = expected.scale / grid.scale
    rows = _moved_into_rows(reference, levels, grid, ratio) if carries else None
    if rows is not None:
        ratio = ratio / rows[:, None]
    wrong = ((ratio - 1).abs() > tolerance) | (expected.zero != grid.zero)
    shrunken = _shrunken(reference, grid, scheme, rows, tolerance)
    ties = _TIES_HALF if half else _FLIPPED_HALF
    if float(wrong.float().mean()) > ties or bool((wrong & ~shrunken).any()):
        return f"has scales up to {float((ratio - 1).abs().max()):.2g} away from its weights'", None
    scaled = reference if rows is None else reference / rows[:, None]
    nearest = round_to(scaled, grid)
    if scheme.pairs:
        nearest = fit_pairs(nearest)
    distance = (nearest.levels - levels).abs()
    flipped = _FLIPPED_HALF if half or tolerance >= _HALF else _FLIPPED
    close = bool(distance.max() <= 1) and float((distance > 0).float().mean()) <= flipped
    if close:
        return None, rows
    if scheme.rounding != "gptq":
        share = float((distance > 0).float().mean())
        return f"has {share:.1%} of its levels away from the nearest", None
    return _fed_back(scaled, levels, grid, nearest), rows


def _moved_into_rows(reference: Tensor, levels: Tensor, grid: Grid, ratio: Tensor) -> Tensor:
    """Returns the scales [N] that rows have absorbed: of the ratios between the expected and
    the stored scales of some blocks, the one that is nearest to the row's own gain. A block
    whose range was found by another of two equal ranges has another ratio.
    """
    found = Quantised(levels.to(torch.int16), grid).dequantised()
    gain = (reference * reference).sum(1) / (reference * found).sum(1).clamp(min=1e-30)
    some = torch.stack([ratio.median(dim=1).values, ratio[:, 0], ratio[:, -1]], dim=1)
    nearest = (some / gain[:, None] - 1).abs().argmin(dim=1, keepdim=True)
    return some.gather(1, nearest)[:, 0]


def _shrunken(
    reference: Tensor, grid: Grid, scheme: LinearScheme, rows: Tensor | None, tolerance: float
) -> Tensor:
    """Returns which blocks [N, blocks] have a scale that the search of a range tries. Among
    two equally good ones, rounding decides.
    """
    if scheme.rounding == "nearest":
        return torch.zeros_like(grid.scale, dtype=torch.bool)
    whole = grid_for(reference, replace(scheme, rounding="nearest")).scale
    share = grid.scale / whole if rows is None else grid.scale * rows[:, None] / whole
    tried = torch.tensor(SHARES)
    return ((share[..., None] - tried).abs() <= tolerance * tried).any(-1)


def _fed_back(reference: Tensor, levels: Tensor, grid: Grid, nearest: Quantised) -> str | None:
    """Returns the problem of levels that were rounded with error feedback (GPTQ), if they
    are too far from the weights.
    """
    furthest = int((levels - nearest.levels).abs().max())
    if furthest > _FURTHEST:
        return f"has a level {furthest} levels away from the nearest"
    found = Quantised(levels.to(torch.int16), grid).dequantised()
    error = float((found - reference).norm())
    least = float((nearest.dequantised() - reference).norm())
    if error > _WORSE_THAN_NEAREST * least:
        return f"is {error / max(least, 1e-30):.1f} times as far from the checkpoint's as rounding"
    energy = (reference * reference).sum(1)
    gain = (found * reference).sum(1) / energy.clamp(min=1e-30)
    worst = float((gain - 1).abs()[energy > 0].max()) if bool((energy > 0).any()) else 0.0
    return f"has a channel scaled by {1 + worst:.2f}" if worst > _GAIN else None
