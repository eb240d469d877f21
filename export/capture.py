"""Captures a PyTorch model as the two canonical ONNX graphs (opset 23, standard
operators, parameter names kept).

Shapes and dynamic axes are described once, here. Two graphs do not need `optimum`'s
dummy-input generators. The decoder graph is the model's own `Decoder.step`: it takes
static-capacity caches, and returns updated caches and logits of the last position.

The model is traced without weights. Each parameter is bound to a reader and read only
when the graph is written, so a larger model takes more time but no more memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim

from export.passes.contract import lazy_tensor
from runtime.contract.graphs import (
    IMAGE_EMBEDS,
    INPUTS_EMBEDS,
    LOGITS,
    PIXELS,
    POOL,
    POSITION_IDS,
    present,
)
from runtime.contract.spec import ModelSpec
from trainer.decoder import rotary_tables
from trainer.model import InfMLLM

__all__ = ["OPSET", "Graphs", "capture"]

OPSET = 23
_TRACE_CAPACITY = 16
_TABLES = ("decoder.rotary_cos", "decoder.rotary_sin")


@dataclass(frozen=True)
class Graphs:
    """The two canonical graphs of a model."""

    vision: ir.Model
    decoder: ir.Model


class _VisionGraph(nn.Module):
    def __init__(self, model: InfMLLM) -> None:
        super().__init__()
        self.vision_tower, self.pool_adapter = model.vision_tower, model.pool_adapter

    def forward(self, pixels: Tensor, pool: Tensor) -> Tensor:
        return self.pool_adapter(self.vision_tower(pixels), pool)


def _rotary(x_BHLD: Tensor, cos_CE: Tensor, sin_CE: Tensor, position_ids_BL: Tensor) -> Tensor:
    return torch.onnx.ops.rotary_embedding(x_BHLD, cos_CE, sin_CE, position_ids_BL)


class _DecoderGraph(nn.Module):
    def __init__(self, model: InfMLLM) -> None:
        super().__init__()
        self.decoder = model.decoder

    def forward(
        self, inputs_embeds: Tensor, position_ids: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        pairs = list(zip(caches[::2], caches[1::2], strict=True))
        logits, updated = self.decoder.step(inputs_embeds, position_ids, pairs, _rotary)
        return (logits, *(cache for pair in updated for cache in pair))


def capture(spec: ModelSpec, read: Callable[[str], Tensor]) -> Graphs:
    """Exports both graphs of a spec. `read` supplies a parameter as float32 each time
    the data of its tensor is needed.
    """
    graphs = Graphs(*(graph.clone() for graph in _capture(spec)))
    tables = dict(zip(_TABLES, rotary_tables(spec.decoder), strict=True))
    for graph in (graphs.vision, graphs.decoder):
        for name, value in graph.graph.initializers.items():
            if value.const_value is not None and "." in name:
                source = tables[name].clone if name in tables else partial(read, name)
                value.const_value = lazy_tensor(
                    name, _numpy(source), value.const_value.dtype, value.const_value.shape.numpy()
                )
    return graphs


@lru_cache(maxsize=4)
def _capture(spec: ModelSpec) -> tuple[ir.Model, ir.Model]:
    """Captures both graphs without weights. Builds in one process share the result,
    because tracing takes ten times as long as the rest of a small build.
    """
    with torch.device("meta"):
        model = InfMLLM(spec).eval()
        return _capture_vision(model), _capture_decoder(model)


def _numpy(source: Callable[[], Tensor]) -> Callable[[], NDArray[np.float32]]:
    return lambda: source().numpy()


def _export(
    module: nn.Module,
    arguments: tuple[Tensor, ...],
    dynamic: tuple[object, ...],
    inputs: list[str],
    outputs: list[str],
) -> ir.Model:
    with torch.no_grad():
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=dynamic,
            input_names=inputs,
            output_names=outputs,
            optimize=False,
            verbose=False,
        )
    assert program is not None, "the dynamo exporter returns a program"
    return program.model


def _capture_vision(model: InfMLLM) -> ir.Model:
    spec = model.spec.vision
    pixels = torch.zeros(2, 3, spec.image_size, spec.image_size)
    pool = torch.zeros(4, spec.grid**2)
    dynamic = ({0: Dim("N")}, {0: Dim("T")})
    return _export(_VisionGraph(model), (pixels, pool), dynamic, [PIXELS, POOL], [IMAGE_EMBEDS])


def _capture_decoder(model: InfMLLM) -> ir.Model:
    spec = model.spec.decoder
    embeds, positions = torch.zeros(2, 3, spec.hidden), torch.arange(3).expand(2, -1)
    caches = [
        torch.zeros(2, spec.kv_heads, _TRACE_CAPACITY, spec.head_dim)
        for _ in range(2 * spec.layers)
    ]
    batch, length, capacity = Dim("B"), Dim("L"), Dim("C")
    dynamic = (
        {0: batch, 1: length},
        {0: batch, 1: length},
        tuple({0: batch, 2: capacity} for _ in caches),
    )
    names = spec.cache_names
    return _export(
        _DecoderGraph(model),
        (embeds, positions, *caches),
        dynamic,
        [INPUTS_EMBEDS, POSITION_IDS, *names],
        [LOGITS, *(present(n) for n in names)],
    )
