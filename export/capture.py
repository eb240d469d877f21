"""Capture: a PyTorch model becomes the two canonical ONNX graphs (opset 23, standard operators, parameter names kept).

`optimum`'s dummy-input generators are not needed for two graphs; shapes and dynamic axes are described once, here. The decoder graph is the model's
own `Decoder.step`: static-capacity caches in, updated caches out, logits of the last position.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import Dim

from runtime.contract.spec import IMAGE_EMBEDS, INPUTS_EMBEDS, LOGITS, PIXELS, POOL, POSITION_IDS, DecoderSpec, key_cache, present, value_cache
from trainer.model import InfMLLM

__all__ = ["OPSET", "Graphs", "capture"]

OPSET = 23
_TRACE_CAPACITY = 16


@dataclass(frozen=True)
class Graphs:
    """The canonical pair."""

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

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, *caches: Tensor) -> tuple[Tensor, ...]:
        pairs = list(zip(caches[::2], caches[1::2], strict=True))
        logits, updated = self.decoder.step(inputs_embeds, position_ids, pairs, _rotary)
        return (logits, *(cache for pair in updated for cache in pair))


def cache_names(spec: DecoderSpec) -> list[str]:
    """Cache input names in graph order: keys then values of each layer."""
    return [name for layer in range(spec.layers) for name in (key_cache(layer), value_cache(layer))]


def capture(model: InfMLLM) -> Graphs:
    """Exports both graphs of a model with real weights. The model is left unchanged (and in eval mode)."""
    model.eval()
    return Graphs(_capture_vision(model), _capture_decoder(model))


def _export(module: nn.Module, arguments: tuple[Tensor, ...], dynamic: tuple[object, ...], inputs: list[str], outputs: list[str]) -> ir.Model:
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
    caches = [torch.zeros(2, spec.kv_heads, _TRACE_CAPACITY, spec.head_dim) for _ in range(2 * spec.layers)]
    batch, length, capacity = Dim("B"), Dim("L"), Dim("C")
    dynamic = ({0: batch, 1: length}, {0: batch, 1: length}, tuple({0: batch, 2: capacity} for _ in caches))
    names = cache_names(spec)
    return _export(
        _DecoderGraph(model), (embeds, positions, *caches), dynamic, [INPUTS_EMBEDS, POSITION_IDS, *names], [LOGITS, *(present(n) for n in names)]
    )
