"""Defines the quantisation of one linear layer: its scheme as data, the rounding of
weights to a grid, and the rounding of activations at run time.

Weights are [N, K] (output, input), as in PyTorch. A grid has one scale per output
channel, or one scale and zero point per block of K. This arithmetic is the reference
for the integer operators of every target.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = [
    "KERNEL_BLOCKS",
    "SHARES",
    "SIGNED",
    "Grid",
    "LinearScheme",
    "Quantised",
    "activation_grid",
    "fake_activation",
    "fit_pairs",
    "fits",
    "grid_for",
    "round_in_pairs",
    "round_to",
    "signed_scale",
]

SIGNED = "int8-signed"
_INT8 = 127
_WIDER = (
    1.0,
    1.15,
    1.3,
    1.45,
    1.6,
    1.8,
    2.0,
)  # scales tried, relative to the 8-bit scale; the last is the 7-bit scale
_PAIR = 128  # largest allowed sum of two neighbouring 8-bit levels of the same sign
_CANDIDATES = 12  # number of shrunken ranges that the MSE search tries
_SHRINK = 0.45  # smallest range tried, as a share of the full range
SHARES = tuple(1 - (1 - _SHRINK) * step / _CANDIDATES for step in range(_CANDIDATES + 1))
"""Shares of a block's full range that the search of a 4-bit grid tries."""
_TINY = 1e-12
_ELEMENTS = (
    1 << 23
)  # weights processed at once, so that copies of a vocabulary-sized layer stay small
KERNEL_BLOCKS = (16, 32, 64, 128, 256)
"""Block sizes that ONNX Runtime's MatMulNBits supports for weight-only layers. A block
is the number of inputs that share a scale.
"""

_FULL_BLOCK = 128  # block size of weight-only layers whose scheme sets none


@dataclass(frozen=True)
class LinearScheme:
    """How the weight and the activation of a linear layer are represented.

    `weight` is fp32, fp16, int8 or int4. `activation` is one of: "float"; "int8-row" (a
    symmetric scale per token, computed at run time); "int8-tensor" (one range for all
    tokens of a call, computed at run time); "int8-static" (one calibrated range);
    "int8-signed" (one calibrated range around 0).

    `block` is the number of inputs that share a scale (0: all inputs, one scale per
    output channel). `symmetric` 4-bit weights have no zero points, which makes kernels
    faster. `whole` blocks divide a layer's inputs evenly. A smaller block is used where
    necessary, because TensorRT infers a block's size from the number of scales.

    `rounding` is "nearest", "mse" (ranges are shrunk where that lowers the squared
    error) or "gptq" (data-aware, arXiv 2210.17323). `smooth` first moves scales between
    activations and weights (SmoothQuant, arXiv 2211.10438; for float activations AWQ's
    variant, arXiv 2306.00978).
    """

    weight: str = "fp32"
    activation: str = "float"
    block: int = 0
    rounding: str = "nearest"
    smooth: bool = False
    symmetric: bool = False
    whole: bool = False

    @property
    def bits(self) -> int:
        """Bits of a stored weight."""
        return {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4}[self.weight]

    @property
    def quantised(self) -> bool:
        """True for integer weights."""
        return self.bits <= 8

    @property
    def calibrates(self) -> bool:
        """True if the scheme needs calibration data."""
        return self.smooth or self.rounding == "gptq" or self.static

    @property
    def static(self) -> bool:
        """True if the range of activations is calibrated."""
        return self.activation in ("int8-static", SIGNED)

    @property
    def pairs(self) -> bool:
        """True if kernels multiply 8-bit weights by unsigned 8-bit activations, so that
        `fit_pairs` applies.
        """
        return self.weight == "int8" and self.activation not in ("float", SIGNED)

    def grid_block(self, inputs: int) -> int:
        """Returns how many inputs share a scale; without blocks, all of them do."""
        block = min(self.block, inputs) or inputs
        if self.whole and inputs % block:
            return max(
                (size for size in KERNEL_BLOCKS if size <= block and inputs % size == 0),
                default=inputs,
            )
        return block

    def kernel_block(self, inputs: int) -> int:
        """Returns how many inputs share a scale in weight-only layers. Kernels support
        only powers of two, and a block is no longer than the inputs require.
        """
        block = self.block or _FULL_BLOCK
        return (
            block
            if block <= inputs
            else next((size for size in KERNEL_BLOCKS if size >= inputs), KERNEL_BLOCKS[-1])
        )

    def text(self) -> str:
        """Returns a readable name, for example "int4/128 gptq smooth"."""
        parts = [f"{self.weight}/{self.block}" if self.block else self.weight]
        parts += [self.activation] if self.activation != "float" else []
        parts += [self.rounding] if self.rounding != "nearest" else []
        return " ".join(
            [
                *parts,
                *(["smooth"] if self.smooth else []),
                *(["symmetric"] if self.symmetric else []),
                *(["whole"] if self.whole else []),
            ]
        )


@dataclass(frozen=True)
class Grid:
    """The values a weight may take: (level - zero) * scale, level in [low, high].
    `scale` and `zero` are [N, blocks].
    """

    scale: Tensor
    zero: Tensor
    low: int
    high: int
    block: int

    def expand(self, columns: int) -> tuple[Tensor, Tensor]:
        """Returns the scale and zero point of every column, each [N, columns]."""
        scale, zero = (
            t.repeat_interleave(self.block, dim=1)[:, :columns] for t in (self.scale, self.zero)
        )
        return scale, zero


@dataclass(frozen=True)
class Quantised:
    """A quantised weight. `levels` [N, K] int16 hold integers of the grid's range."""

    levels: Tensor
    grid: Grid

    def dequantised(self) -> Tensor:
        """Returns the weight as float32 [N, K]."""
        scale, zero = self.grid.expand(self.levels.shape[1])
        return (self.levels - zero) * scale


def grid_for(weight_NK: Tensor, scheme: LinearScheme) -> Grid:
    """Returns the grid of a scheme. 8-bit grids are symmetric (-127 to 127 around 0).
    4-bit grids run from 0 to 15 around a zero point, which is 8 if symmetric.

    "mse" and "gptq" search each block's range for the least squared rounding error;
    "nearest" takes the whole range.
    """
    parts = [_grid_of_rows(rows, scheme) for rows in weight_NK.split(_rows_at_once(weight_NK))]
    return replace(
        parts[0],
        scale=torch.cat([part.scale for part in parts]),
        zero=torch.cat([part.zero for part in parts]),
    )


def _rows_at_once(weight_NK: Tensor) -> int:
    return max(1, _ELEMENTS // weight_NK.shape[1])


def _grid_of_rows(weight_NK: Tensor, scheme: LinearScheme) -> Grid:
    k = weight_NK.shape[1]
    block = scheme.grid_block(k)
    padded = torch.nn.functional.pad(weight_NK, (0, -k % block)).unflatten(
        1, (-1, block)
    )  # zeros are on every grid
    low, high = padded.amin(2).clamp(max=0), padded.amax(2).clamp(min=0)
    grid = _fit(low, high, scheme, block)
    if scheme.rounding == "nearest":
        return grid
    best = _error(padded, grid)
    for share in SHARES[1:]:
        trial = _fit(low * share, high * share, scheme, block)
        error = _error(padded, trial)
        better = error < best
        best = torch.where(better, error, best)
        grid = replace(
            grid,
            scale=torch.where(better, trial.scale, grid.scale),
            zero=torch.where(better, trial.zero, grid.zero),
        )
    return grid


def _fit(low: Tensor, high: Tensor, scheme: LinearScheme, block: int) -> Grid:
    """Returns the grid that spans [low, high] of every block; an all-zero block gets
    scale 1.
    """
    if scheme.bits == 8:
        scale = torch.maximum(-low, high) / _INT8
        scale = torch.where(scale > 0, scale, 1.0)
        return Grid(scale, torch.zeros_like(scale), -_INT8, _INT8, block)
    top = 2**scheme.bits - 1
    if scheme.symmetric:
        middle = (top + 1) // 2
        scale = torch.maximum(-low / middle, high / (top - middle))
        scale = torch.where(scale > 0, scale, 1.0)
        return Grid(scale, torch.full_like(scale, middle), 0, top, block)
    scale = (high - low) / top
    scale = torch.where(scale > 0, scale, 1.0)
    return Grid(scale, (-low / scale).round().clamp(0, top), 0, top, block)


def _error(blocks_NBK: Tensor, grid: Grid) -> Tensor:
    scale, zero = grid.scale[..., None], grid.zero[..., None]
    levels = (blocks_NBK / scale + zero).round_().clamp_(grid.low, grid.high)
    return levels.sub_(zero).mul_(scale).sub_(blocks_NBK).square_().sum(2)


def round_to(weight_NK: Tensor, grid: Grid) -> Quantised:
    """Rounds every weight to the nearest value of the grid."""
    levels = torch.empty(weight_NK.shape, dtype=torch.int16)
    step = _rows_at_once(weight_NK)
    for start in range(0, weight_NK.shape[0], step):
        rows = slice(start, start + step)
        scale, zero = replace(grid, scale=grid.scale[rows], zero=grid.zero[rows]).expand(
            weight_NK.shape[1]
        )
        levels[rows] = (
            (weight_NK[rows] / scale + zero).round_().clamp_(grid.low, grid.high).to(torch.int16)
        )
    return Quantised(levels, grid)


def round_in_pairs(weight_NK: Tensor, scheme: LinearScheme) -> Quantised:
    """Rounds to 8-bit weights whose products with unsigned 8-bit activations can be
    added in pairs without exceeding 16 bits.

    x86 CPUs without VNNI multiply this way and saturate silently (vpmaddubsw). Their
    exact kernels are a third slower and copy the weights. Two neighbours (inputs 2i and
    2i+1) of the same sign may add up to at most 128, because 255 * 128 < 2**15. Any
    excess is subtracted from both.

    Each channel gets the scale, between the 8-bit and the 7-bit scale, with the least
    total cost of rounding and subtraction.
    """
    parts = [_pair(rows, scheme) for rows in weight_NK.split(_rows_at_once(weight_NK))]
    scale, levels = (
        torch.cat([part.grid.scale for part in parts]),
        torch.cat([part.levels for part in parts]),
    )
    return Quantised(levels, replace(parts[0].grid, scale=scale, zero=torch.zeros_like(scale)))


def _pair(weight_NK: Tensor, scheme: LinearScheme) -> Quantised:
    grid = grid_for(weight_NK, scheme)
    pairs = torch.nn.functional.pad(weight_NK, (0, weight_NK.shape[1] % 2)).unflatten(1, (-1, 2))
    sums = (
        pairs.sum(2).abs_().div_(grid.scale)
    )  # in levels; more than 127 only if both weights have the same sign
    # Costs are in squared levels. Rounding costs 1/12 per weight. An excess that two weights
    # share costs half its square.
    costs = [
        factor**2
        * (weight_NK.shape[1] / 12 + (sums / factor - _PAIR).clamp_(min=0).square_().sum(1) / 2)
        for factor in _WIDER
    ]
    best = torch.tensor(_WIDER)[torch.stack(costs).argmin(0)]
    return fit_pairs(round_to(weight_NK, replace(grid, scale=grid.scale * best[:, None])))


def fits(quantised: Quantised) -> bool:
    """True if `fit_pairs` would change nothing."""
    return bool((_pair_sums(quantised.levels).abs_() <= _PAIR).all())


def _pair_sums(levels_NK: Tensor) -> Tensor:
    """Returns the sum of each pair of neighbours, in 16 bits: of 8-bit levels, so it fits."""
    padded = torch.nn.functional.pad(levels_NK, (0, levels_NK.shape[1] % 2))
    return padded[:, 0::2] + padded[:, 1::2]


def fit_pairs(quantised: Quantised) -> Quantised:
    """Changes levels as little as needed to make every pair fit (see `round_in_pairs`)."""
    total = _pair_sums(quantised.levels)
    excess = (total.abs() - _PAIR).clamp_(min=0).mul_(total.sign())
    first = torch.div(excess, 2, rounding_mode="trunc")
    levels = quantised.levels.clone()
    levels[:, 0::2] -= first
    levels[:, 1::2] -= (excess - first)[:, : levels.shape[1] // 2]
    return replace(quantised, levels=levels)


def fake_activation(x_RK: Tensor, kind: str, static: tuple[float, float] | None = None) -> Tensor:
    """Rounds rows of activations as the target will, and returns them in float32.
    `static` is the calibrated (low, high).
    """
    if kind == "float":
        return x_RK
    if kind == "int8-row":
        scale = x_RK.abs().amax(-1, keepdim=True).clamp(min=_TINY) / _INT8
        return (x_RK / scale).round_().mul_(scale)
    low, high = static or (float(x_RK.min()), float(x_RK.max()))
    if kind == SIGNED:
        step = signed_scale(low, high)
        return (x_RK / step).round_().clamp_(-_INT8 - 1, _INT8).mul_(step)
    step, zero = activation_grid(low, high)
    return ((x_RK / step).round_() + zero).clamp_(0, 255).sub_(zero).mul_(step)


def signed_scale(low: float, high: float) -> float:
    """Returns the scale of signed 8-bit activations around zero that span [low, high]."""
    return max(-low, high, _TINY * _INT8) / _INT8


def activation_grid(low: float, high: float) -> tuple[float, int]:
    """Returns the scale and zero point of unsigned 8-bit activations that span [low,
    high] and represent zero exactly.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / 255, _TINY)
    return scale, round(min(max(-low / scale, 0), 255))
