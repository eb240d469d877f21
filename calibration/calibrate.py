"""Calibrates a model block by block: turns statistics of the data into scales, ranges
and rounded weights, and writes them to disk.

Only one block's weights and statistics are in memory at a time. Each finished block is
a file. After an interruption, finished blocks run again but are not calibrated again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from calibration.blocks import Block, LinearGroup, Reader, StreamedModel, Trace
from calibration.gptq import gptq
from calibration.linear import (
    SIGNED,
    Grid,
    LinearScheme,
    Quantised,
    fit_pairs,
    grid_for,
    round_in_pairs,
    round_to,
)
from calibration.ranges import PERCENTILE, find_range
from calibration.samples import Case
from calibration.smoothing import search_scales
from trainer.model import InfMLLM

__all__ = ["Calibrated", "Wanted", "calibrate"]

Wanted = Callable[[str], Sequence[LinearScheme]]
"""Returns the schemes that a weight will be used with, by parameter name."""

_ROWS = 512  # activation rows kept per layer for searches
_RANGE_VALUES = 1 << 20


@dataclass
class _Statistics:
    """Statistics of one layer input: a sample of rows, the extremes of every channel,
    and the second moments if they are needed.
    """

    rows: list[Tensor] = field(default_factory=list)
    moments: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None

    def add(self, x: Tensor, keep: int, with_moments: bool) -> None:
        flat = x.reshape(-1, x.shape[-1])
        # Spread over the whole case: its end is the question and the answer.
        places = torch.linspace(0, flat.shape[0] - 1, min(keep, flat.shape[0])).round().long()
        self.rows.append(flat[places].clone())
        low, high = flat.amin(0), flat.amax(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        if with_moments:
            if self.moments is None:
                self.moments = torch.zeros(flat.shape[1], flat.shape[1])
            self.moments.addmm_(flat.T, flat)


def calibrate(
    model: StreamedModel,
    goldens: Sequence[Case],
    cases: Sequence[Case],
    wanted: Wanted,
    folder: Path,
    range_method: str = "mse",
    cache: bool = False,
    progress: Callable[[Block], None] = lambda block: None,
) -> list[Trace]:
    """Runs golden and calibration cases through the float model. Writes the results of
    the calibration cases to `folder` and returns the traces of the golden cases.

    `cache` also finds scales for 8-bit keys and values. Raises `CheckpointError` if the
    checkpoint cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    observe = partial(
        _observe,
        wanted=wanted,
        folder=folder,
        keep=max(1, _ROWS // max(1, len(cases))),
        method=range_method,
        cache=cache,
    )
    return model.run_blockwise(
        [*goldens, *cases], observe if cases else None, progress, len(goldens)
    )[: len(goldens)]


@contextlib.contextmanager
def _observe(
    block: Block, model: InfMLLM, wanted: Wanted, folder: Path, keep: int, method: str, cache: bool
) -> Iterator[None]:
    """Collects statistics while one block runs, then writes the block's file."""
    path = folder / f"{block.name}.npz"
    if path.is_file():
        yield
        return
    feeds = [
        feed
        for feed in block.feeds
        if any(scheme.calibrates for name in feed.linears for scheme in wanted(f"{name}.weight"))
    ]
    statistics, handles, found = [_Statistics() for _ in feeds], [], dict[str, NDArray[Any]]()
    for feed, row in zip(feeds, statistics, strict=True):
        moments = any(
            scheme.rounding == "gptq"
            for name in feed.linears
            for scheme in wanted(f"{name}.weight")
        )
        watch = partial(_watch, row, keep, moments)
        handles.append(model.get_submodule(feed.linears[0]).register_forward_pre_hook(watch))
    if cache and block.name.startswith("decoder.layers."):
        handles += _watch_cache(block, model, found)
    yield
    for handle in handles:
        handle.remove()
    found |= _results(block, model, feeds, statistics, wanted, method)
    partial_file = path.with_suffix(".tmp")
    with partial_file.open("wb") as file:
        np.savez(file, **found)  # type: ignore[arg-type]
    partial_file.rename(path)


def _watch(
    row: _Statistics, keep: int, moments: bool, module: nn.Module, arguments: tuple[Tensor]
) -> None:
    row.add(arguments[0], keep, moments)


def _watch_cache(block: Block, model: InfMLLM, found: dict[str, NDArray[Any]]) -> list[Any]:
    """Records the largest magnitudes of keys and of values, per head and channel [KV
    heads, D]. Returns the handles of the hooks.

    Rotation mixes two channels of a key by an angle that depends on the position. At
    some position, either channel can be as large as the length of the pair.
    """
    attention = model.get_submodule(f"{block.name}.self_attn")
    spec = model.spec.decoder

    def peak(key: str, x_BLHD: Tensor) -> None:
        largest = x_BLHD.abs().amax(dim=(0, 2)).numpy()
        found[key] = np.maximum(found.get(key, np.zeros_like(largest)), largest)

    def after_keys(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        keys = output.unflatten(-1, (-1, spec.head_dim)).transpose(1, 2)
        first, second = keys.chunk(2, dim=-1)
        peak(f"{block.name}|keys", torch.hypot(first, second).repeat(1, 1, 1, 2))

    def after_values(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
        peak(f"{block.name}|values", output.unflatten(-1, (-1, spec.head_dim)).transpose(1, 2))

    return [
        attention.k_proj.register_forward_hook(after_keys),  # type: ignore[union-attr]
        attention.v_proj.register_forward_hook(after_values),  # type: ignore[union-attr]
    ]


def _results(
    block: Block,
    model: InfMLLM,
    feeds: Sequence[LinearGroup],
    statistics: Sequence[_Statistics],
    wanted: Wanted,
    method: str,
) -> dict[str, NDArray[Any]]:
    """Computes the scales, ranges and rounded weights of a block from its statistics.

    The scales of all smoothed inputs come first, because a layer's rows may absorb the
    scale of the next input. Ranges and rounding then use the scaled weights.
    """
    found: dict[str, NDArray[Any]] = {}
    scales: dict[str, Tensor] = {}
    for feed, row in zip(feeds, statistics, strict=True):
        weights = [
            (model.get_parameter(f"{name}.weight"), wanted(f"{name}.weight"))
            for name in feed.linears
        ]
        carrier = feed.norm or feed.rows
        if carrier and any(scheme.smooth for _, schemes in weights for scheme in schemes):
            chosen, strength = search_scales(torch.cat(row.rows), weights)
            found[f"{carrier}|strength"] = np.float32(strength)  # type: ignore[assignment]
            if chosen is not None:
                scales |= dict.fromkeys((f"{name}|columns" for name in feed.linears), chosen)
                scales[f"{carrier}|rows"] = chosen
    found |= {name: value.numpy() for name, value in scales.items()}
    for feed, row in zip(feeds, statistics, strict=True):
        columns = scales.get(f"{feed.linears[0]}|columns")
        rows = torch.cat(row.rows) if columns is None else torch.cat(row.rows) / columns
        for name in feed.linears:
            weight = _scale(
                model.get_parameter(f"{name}.weight").detach(), columns, scales.get(f"{name}|rows")
            )
            for scheme in wanted(f"{name}.weight"):
                if scheme.static:
                    signed = scheme.activation == SIGNED
                    found[f"{name}|range"] = np.array(
                        _static_range(rows, row, columns, method, signed), np.float32
                    )
                if scheme.rounding == "gptq":
                    assert row.moments is not None, "asked for above"
                    moments = (
                        row.moments if columns is None else row.moments / columns / columns[:, None]
                    )
                    levels = gptq(weight, moments, grid_for(weight, scheme))
                    levels = fit_pairs(levels) if scheme.pairs else levels
                    found |= _store(f"{name}.weight", scheme, levels)
    return found


def _static_range(
    rows: Tensor, row: _Statistics, columns: Tensor | None, method: str, signed: bool
) -> tuple[float, float]:
    """Finds a range from the sampled rows. A sample can miss rare large values, so
    every method except the percentile also sees the recorded extremes.

    A signed range covers the values and their negatives.
    """
    assert row.low is not None and row.high is not None, "the walk has seen data"
    extremes = torch.cat([row.low, row.high]) / (1.0 if columns is None else columns.repeat(2))
    values = rows.flatten()
    values = values[:: max(1, len(values) // _RANGE_VALUES)]
    values = torch.cat([values, extremes]) if method != PERCENTILE else values
    return find_range((torch.cat([values, -values]) if signed else values).numpy(), method)


def _scale(tensor: Tensor, columns: Tensor | None, rows: Tensor | None) -> Tensor:
    """Returns a weight [N, K] multiplied by its input scales and divided by its output
    scales.
    """
    tensor = tensor if columns is None else tensor * columns
    return tensor if rows is None else tensor / rows[:, None]


def _store(name: str, scheme: LinearScheme, quantised: Quantised) -> dict[str, NDArray[Any]]:
    kind = np.uint8 if quantised.grid.low >= 0 else np.int8
    key = f"{name}|{scheme.text()}"
    return {
        f"{key}|levels": quantised.levels.numpy().astype(kind),
        f"{key}|scale": quantised.grid.scale.numpy(),
        f"{key}|zero": quantised.grid.zero.numpy(),
    }


class Calibrated:
    """Reads a checkpoint as changed by a finished calibration: parameters with scales
    moved, and weights rounded by their scheme.

    Without a folder, it reads the checkpoint unchanged and rounds weights to nearest.
    """

    def __init__(self, read: Reader, folder: Path | None = None) -> None:
        self._read, self._places = read, dict[str, Path]()
        for path in sorted(folder.glob("*.npz")) if folder else ():
            with np.load(path) as data:
                self._places |= dict.fromkeys(data.files, path)

    def get(self, key: str) -> NDArray[Any] | None:
        """Returns a stored array, or None if the calibration stored none under that
        key.
        """
        if key not in self._places:
            return None
        with np.load(self._places[key]) as data:
            array: NDArray[Any] = data[key]
            return array

    def read(self, name: str) -> Tensor:
        """Returns a parameter as the compiled graphs contain it."""
        tensor, module = self._read(name), name.rpartition(".")[0]
        columns, rows = (self.get(f"{module}|{side}") for side in ("columns", "rows"))
        if tensor.ndim == 1 and rows is not None:
            return tensor / torch.from_numpy(rows)
        if tensor.ndim != 2:
            return tensor
        return _scale(
            tensor, *(None if side is None else torch.from_numpy(side) for side in (columns, rows))
        )

    def quantised(self, name: str, scheme: LinearScheme) -> Quantised:
        """Returns a quantised weight: as the calibration stored it, or rounded now."""
        key = f"{name}|{scheme.text()}"
        levels, scale, zero = (self.get(f"{key}|{part}") for part in ("levels", "scale", "zero"))
        if levels is None or scale is None or zero is None:
            weight = self.read(name)
            return (
                round_in_pairs(weight, scheme)
                if scheme.pairs
                else round_to(weight, grid_for(weight, scheme))
            )
        low, high = (0, 2**scheme.bits - 1) if levels.dtype == np.uint8 else (-127, 127)
        block = scheme.grid_block(levels.shape[1])
        return Quantised(
            torch.from_numpy(levels.astype(np.int16)),
            Grid(torch.from_numpy(scale), torch.from_numpy(zero), low, high, block),
        )

    def strengths(self) -> Mapping[str, float]:
        """Returns the smoothing strength chosen for each group of layers, by the name
        of the layer that absorbs the scale.
        """
        return {
            key.removesuffix("|strength"): float(self.get(key))  # type: ignore[arg-type]
            for key in self._places
            if key.endswith("|strength")
        }
