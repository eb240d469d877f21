"""A slow engine that rounds as the bundle's kernels should: PyTorch, with the weights
that the graphs store, and activations, keys and values rounded as their operators say.

The real engine must agree with it much more closely than with the float model, so a fault
of a kernel or of the runtime cannot hide behind the rounding of a scheme.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from calibration.blocks import Reader
from export.parity.float_view import FloatView
from export.parity.rounding import cache_scales, round_cached, round_inputs
from export.parity.structure import stored_reader, stored_rotary
from runtime.contract.spec import DecoderSpec, ModelSpec
from runtime.engines import Validation
from trainer.decoder import Decoder, DecoderLayer, rotary_tables, rotate_half
from trainer.model import InfMLLM

__all__ = ["RoundedEngine"]

Array = NDArray[np.float32]


class RoundedEngine:
    """An `Engine` in PyTorch that rounds like the graphs of three views: the vision graph,
    the decoder, and the decoder for calls of several rows (often the same).

    With `rounds` false, it computes in float with the stored weights.
    """

    verifies = True
    validation: Validation | None = None
    version = "PyTorch"

    def __init__(
        self,
        spec: ModelSpec,
        vision: FloatView,
        decoder: FloatView,
        prefill: FloatView,
        read: Reader,
        capacity: int,
        rounds: bool = True,
    ) -> None:
        self.capacity, self._spec = capacity, spec
        model = _model(spec, vision, read, "vision", rounds)
        self._tower, self._adapter = model.vision_tower, model.pool_adapter
        self._step = _RoundedDecoder(
            spec.decoder, _model(spec, decoder, read, "decoder", rounds), decoder, rounds
        )
        self._prefill = (
            self._step
            if prefill is decoder
            else _RoundedDecoder(
                spec.decoder, _model(spec, prefill, read, "decoder", rounds), prefill, rounds
            )
        )
        self._caches = _empty_caches(spec.decoder, 1, capacity)

    @torch.no_grad()
    def embed_image(self, pixels: Array, pool: Array) -> Array:
        """See `Engine.embed_image`."""
        patches = self._tower(torch.from_numpy(np.array(pixels)))
        found: Array = self._adapter(patches, torch.from_numpy(np.array(pool))).numpy()
        return found

    def forward(self, inputs_embeds: Array, start: int) -> Array:
        """See `Engine.forward`."""
        decoder = self._step if inputs_embeds.shape[1] == 1 else self._prefill
        return self._run(decoder, inputs_embeds, start, 1)[0]

    def greedy(self, inputs_embeds: Array, start: int) -> int:
        """See `Engine.greedy`."""
        return int(self.forward(inputs_embeds, start).argmax())

    def verify(self, inputs_embeds: Array, start: int) -> Array:
        """See `Engine.verify`."""
        return self._run(self._step, inputs_embeds, start, inputs_embeds.shape[1])

    def batch(self, slots: int, rows: int) -> _RoundedBatch:
        """See `Engine.batch`."""
        return _RoundedBatch(self._step, self._caches, self._spec.decoder, slots, rows)

    def _run(self, decoder: _RoundedDecoder, inputs_embeds: Array, start: int, keep: int) -> Array:
        rows = inputs_embeds.shape[1]
        places = torch.arange(start, start + rows)[None]
        return decoder.run(inputs_embeds, places, self._caches, keep)


class _RoundedBatch:
    """See `runtime.engines.Batch`."""

    def __init__(
        self,
        decoder: _RoundedDecoder,
        own: list[tuple[Tensor, Tensor]],
        spec: DecoderSpec,
        slots: int,
        rows: int,
    ) -> None:
        self._decoder, self._own = decoder, own
        self._caches = _empty_caches(spec, slots, min(rows, own[0][0].shape[2]))

    def fill(self, slot: int, rows: int) -> None:
        """See `Batch.fill`."""
        for mine, own in zip(self._caches, self._own, strict=True):
            for target, source in zip(mine, own, strict=True):
                target[slot, :, :rows] = source[0, :, :rows]

    def step(self, inputs_embeds: Array, starts: NDArray[np.int32]) -> Array:
        """See `Batch.step`."""
        count = len(starts)
        part = [(keys[:count], values[:count]) for keys, values in self._caches]
        places = torch.from_numpy(starts.astype(np.int64))[:, None]
        return self._decoder.run(inputs_embeds, places, part, 1)

    def copy(self, sources: Sequence[int], start: int, end: int) -> None:
        """See `Batch.copy`."""
        for pair in self._caches:
            for cache in pair:
                cache[: len(sources), :, start:end] = cache[list(sources), :, start:end].clone()


class _RoundedDecoder:
    """The decoder, written out with its rounding, with a cache that it updates in place."""

    def __init__(self, spec: DecoderSpec, model: InfMLLM, view: FloatView, rounds: bool) -> None:
        self._decoder: Decoder = model.decoder
        self._head_dim = spec.head_dim
        self._cos, self._sin = stored_rotary(view) or rotary_tables(spec)
        self._scales = cache_scales(view, spec) if rounds else {}

    @torch.no_grad()
    def run(
        self,
        inputs_embeds: Array,
        places_BL: Tensor,
        caches: Sequence[tuple[Tensor, Tensor]],
        keep: int,
    ) -> Array:
        """Computes rows [B, L, H] at their places. Returns the logits [B * keep, V]."""
        x = torch.from_numpy(np.array(inputs_embeds, np.float32))
        rows = torch.arange(caches[0][0].shape[2])
        mask = rows[None, None, None, :] <= places_BL[:, None, :, None]
        for index, module in enumerate(self._decoder.layers):
            layer = cast(DecoderLayer, module)
            attention = layer.self_attn
            normed = layer.input_layernorm(x)
            q, k, v = (
                project(normed).unflatten(-1, (-1, self._head_dim)).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = (rotate_half(part, self._cos, self._sin, places_BL) for part in (q, k))
            k, v = self._round(index, "keys", k), self._round(index, "values", v)
            target = places_BL[:, None, :, None].expand(-1, k.shape[1], -1, self._head_dim)
            for cache, new in zip(caches[index], (k, v), strict=True):
                cache.scatter_(2, target, new)
            keys, values = caches[index]
            attended = F.scaled_dot_product_attention(
                q, keys, values, attn_mask=mask, enable_gqa=q.shape[1] != keys.shape[1]
            )
            x = x + attention.o_proj(attended.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        hidden: Tensor = self._decoder.norm(x)[:, -keep:].flatten(0, 1)
        logits: Array = self._decoder.lm_head(hidden).numpy()
        return logits

    def _round(self, layer: int, kind: str, x: Tensor) -> Tensor:
        scale = self._scales.get((layer, kind))
        return x if scale is None else round_cached(x, scale)


def _empty_caches(spec: DecoderSpec, slots: int, rows: int) -> list[tuple[Tensor, Tensor]]:
    shape = (slots, spec.kv_heads, rows, spec.head_dim)
    return [(torch.zeros(shape), torch.zeros(shape)) for _ in range(spec.layers)]


def _model(spec: ModelSpec, view: FloatView, read: Reader, part: str, rounds: bool) -> InfMLLM:
    """Returns the model with one part's weights as the view stores them, and with hooks
    that round the inputs of its linear layers.
    """
    with torch.device("meta"):
        model = InfMLLM(spec).eval()
    stored = stored_reader(view, read)
    for name in model.state_dict():
        if name.startswith("decoder.") == (part == "decoder") and "embed_tokens" not in name:
            module, _, leaf = name.rpartition(".")
            value = nn.Parameter(stored(name), requires_grad=False)
            setattr(model.get_submodule(module), leaf, value)
    if rounds:
        round_inputs(model, view)
    return model
