"""Rounds activations, keys and values in PyTorch as a graph's operators say they are
rounded. Block-wise kernels may round or not; see `StoredWeight.activation`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calibration.blocks import StreamedModel
from calibration.linear import fake_activation
from export.parity.float_view import FloatView
from export.parity.stored_weights import StoredWeight
from export.passes.pack_projections import parts_of
from runtime.contract.spec import DecoderSpec
from trainer.decoder import DecoderLayer
from trainer.model import InfMLLM

__all__ = [
    "Costs",
    "RoundingCost",
    "cache_scales",
    "round_activation",
    "round_cached",
    "round_caches",
    "round_inputs",
]

_BYTE = 127.0
_TINY = 1e-30
_TIMES_LEAST, _SLACK = 3.0, 0.05  # what a calibrated range may cost beside the data's own


def round_activation(x: Tensor, weight: StoredWeight) -> Tensor:
    """Returns activations [..., K] rounded as the kernel of a stored weight rounds them."""
    if weight.activation == "block":
        k = x.shape[-1]
        blocks = F.pad(x, (0, -k % weight.block)).unflatten(-1, (-1, weight.block))
        scale = blocks.abs().amax(-1, keepdim=True).clamp(min=_TINY) / _BYTE
        return ((blocks / scale).round() * scale).flatten(-2)[..., :k]
    if weight.static is not None:
        step, zero = weight.static
        low, high = (-128, 127) if weight.activation == "int8-signed" else (0, 255)
        return ((x / step).round() + zero).clamp(low, high).sub(zero) * step
    return fake_activation(x, weight.activation)


@dataclass
class RoundingCost:
    """What rounding changes at one place, as squared norms: of the change, of the change
    that the data's own range would have made, and of the value.
    """

    changed: float = 0.0
    least: float = 0.0
    value: float = 0.0

    def add(self, rounded: Tensor, best: Tensor, exact: Tensor) -> None:
        """Counts one more tensor: as rounded, as rounded with its own range, and exact."""
        self.changed += float((rounded - exact).square().sum())
        self.least += float((best - exact).square().sum())
        self.value += float(exact.square().sum())

    @property
    def share(self) -> float:
        """The norm of the change over that of the value."""
        return float(np.sqrt(self.changed / max(self.value, _TINY)))

    @property
    def allowed(self) -> float:
        """The largest share that a sensible range explains."""
        return _TIMES_LEAST * float(np.sqrt(self.least / max(self.value, _TINY))) + _SLACK


Costs = dict[str, RoundingCost]
"""Costs by the name of a linear layer, or of a layer's keys or values."""


def round_inputs(model: InfMLLM, view: FloatView, costs: Costs | None = None) -> None:
    """Makes the linear layers of a model round their inputs as a graph's kernels do.
    `costs` receives what that changes of each layer's output.
    """
    for weight in view.weights.values():
        if weight.activation == "float":
            continue
        for name in parts_of(weight.name):
            plain = name.removesuffix(".weight")
            module = model.get_submodule(plain)
            module.register_forward_pre_hook(partial(_round_input, weight, plain, costs))


def _round_input(
    weight: StoredWeight, name: str, costs: Costs | None, module: nn.Module, inputs: tuple[Tensor]
) -> tuple[Tensor]:
    x = inputs[0]
    rounded = round_activation(x, weight)
    if costs is not None:
        matrix = module.get_parameter("weight").T
        best = fake_activation(x, "int8-tensor") if weight.static is not None else rounded
        costs.setdefault(name, RoundingCost()).add(rounded @ matrix, best @ matrix, x @ matrix)
    return (rounded,)


def cache_scales(view: FloatView, spec: DecoderSpec) -> Mapping[tuple[int, str], Tensor]:
    """Returns the scales [1, KV heads, 1, D] of 8-bit keys and values by layer and kind."""
    shape = (1, spec.kv_heads, 1, spec.head_dim)
    found = {}
    for name, scale in view.cache_scales.items():
        layer, kind = name.removeprefix("decoder.layers.").removesuffix("_scale").split(".")
        found[int(layer), kind] = torch.from_numpy(np.array(scale)).reshape(shape)
    return found


def round_caches(model: StreamedModel, view: FloatView, costs: Costs) -> None:
    """Makes a model that runs block by block round keys and values like an 8-bit cache.
    `costs` receives what that changes of them.
    """
    scales = cache_scales(view, model.spec.decoder)
    rotate = model.rotate
    current = {"layer": 0, "keys": False}

    def enter(layer: int, module: nn.Module, inputs: object) -> None:
        current.update(layer=layer, keys=False)

    def rotate_and_round(x: Tensor) -> Tensor:
        """The first call of a layer rotates queries, the second one keys."""
        rotated, layer = rotate(x), current["layer"]
        keys, current["keys"] = current["keys"], True
        return (
            counted(f"decoder.layers.{layer}.keys", rotated, scales[layer, "keys"])
            if keys
            else rotated
        )

    def round_values(layer: int, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        scale = scales[layer, "values"]
        heads = output.unflatten(-1, scale.shape[1::2]).transpose(1, 2)
        return counted(f"decoder.layers.{layer}.values", heads, scale).transpose(1, 2).flatten(2)

    def counted(name: str, x: Tensor, scale: Tensor) -> Tensor:
        rounded = round_cached(x, scale)
        own = x.abs().amax((0, 2), keepdim=True).clamp(min=_TINY) / _BYTE
        costs.setdefault(name, RoundingCost()).add(rounded, round_cached(x, own), x)
        return rounded

    if not scales:
        return
    model.rotate = rotate_and_round
    for index, layer in enumerate(model.model.decoder.layers):
        attention = cast(DecoderLayer, layer).self_attn
        attention.register_forward_pre_hook(partial(enter, index))
        attention.v_proj.register_forward_hook(partial(round_values, index))


def round_cached(x_BHLD: Tensor, scale: Tensor) -> Tensor:
    """Rounds keys or values to the 8-bit rows of the cache."""
    return (x_BHLD / scale).round().clamp(-_BYTE - 1, _BYTE) * scale
