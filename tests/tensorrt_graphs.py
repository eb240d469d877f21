"""Graphs of the `tensorrt` target for any model shape, with made-up weights that take
no time to compute. The result of the compiler depends on shapes only.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from calibration.calibrate import Calibrated
from calibration.linear import Grid, LinearScheme, Quantised
from export.capture import capture
from export.passes import SIMPLIFY, run_passes
from export.schemes import TARGET_SCHEMES
from export.shared_weights import refer_to
from export.steps import _quiet
from export.targets import LOWERING
from runtime.contract.spec import ModelSpec
from trainer.config import PRESETS
from trainer.model import InfMLLM

__all__ = ["short", "write_graphs"]

_LAYERS = 2
_TILE = 64


def short(preset: str) -> ModelSpec:
    """Returns a preset's spec with only two layers per part. The nano preset stays
    unchanged.
    """
    spec = PRESETS[preset].spec
    if preset == "nano":
        return spec
    return replace(
        spec,
        vision=replace(spec.vision, layers=_LAYERS),
        decoder=replace(spec.decoder, layers=_LAYERS),
    )


class _MadeUp(Calibrated):
    """Weights that repeat one small tile, and activation ranges from -4 to 4."""

    def __init__(self, spec: ModelSpec) -> None:
        with torch.device("meta"):
            self._model = InfMLLM(spec)
        super().__init__(self._tile)

    def _tile(self, name: str) -> torch.Tensor:
        shape = self._model.get_parameter(name).shape
        if len(shape) == 1:
            return torch.ones(shape)
        tile = torch.empty(_TILE, int(np.prod(shape[1:]))).uniform_(
            -0.05, 0.05, generator=torch.Generator().manual_seed(len(name))
        )
        return tile.repeat(-(-shape[0] // _TILE), 1)[: shape[0]].reshape(shape)

    def get(self, key: str) -> NDArray[Any] | None:
        return np.array([-4, 4], np.float32) if key.endswith("|range") else None

    def quantised(self, name: str, scheme: LinearScheme) -> Quantised:
        weight = self.read(name)
        rows, columns = weight.shape
        block = scheme.grid_block(columns)
        low, high, zero = (0, 15, 8.0) if scheme.bits == 4 else (-127, 127, 0.0)
        scale = torch.full((rows, -(-columns // block)), 0.1 / (high - low))
        levels = (weight * ((high - low) / 0.1) + zero).clamp_(low, high).to(torch.int16)
        return Quantised(levels, Grid(scale, torch.full_like(scale, zero), low, high, block))


def write_graphs(spec: ModelSpec, precision: str, folder: Path) -> list[str]:
    """Writes all graphs of the target as in a bundle. Returns their names."""
    scheme, lowering, weights = (
        TARGET_SCHEMES["tensorrt"].schemes[precision],
        LOWERING["tensorrt"],
        _MadeUp(spec),
    )
    with _quiet():
        captured = capture(spec, weights.read)
        for graph in vars(captured).values():
            run_passes(graph, SIMPLIFY)
    for name, plan in lowering.graphs.items():
        model: ir.Model = getattr(captured, plan.base).clone()
        run_passes(
            model,
            [
                *lowering.form(name, scheme, spec.decoder.context),
                *lowering.precision(name, scheme, weights),
            ],
        )
        model.opset_imports[""] = plan.opset
        if plan.weights_of:
            refer_to(model, folder / f"{plan.weights_of}.onnx")
        ir.save(
            model,
            folder / f"{name}.onnx",
            external_data=None if plan.weights_of else f"{name}.weights",
        )
    return list(lowering.graphs)
