"""The LLaMA decoder in plain PyTorch: input embeddings to logits, with or without a
key/value cache.

Module names follow the Hugging Face layout (`layers.N.self_attn.q_proj`, ...), so
weights map one to one. The cache is functional: a call takes buffers of fixed capacity
and returns updated ones. Graph capture needs exactly this form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from runtime.contract.spec import DecoderSpec

__all__ = ["Decoder", "KeyValue", "RotaryFunction", "rotary_tables", "rotate_half"]

KeyValue = tuple[Tensor, Tensor]
"""One layer's cache: keys and values, each [B, KV heads, C, D] for C positions."""

Rotate = Callable[[Tensor], Tensor]
RotaryFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""A function from x [B, H, L, D], cos and sin tables [C, D/2] and position ids [B, L]
to the rotated x.
"""


def rotary_tables(spec: DecoderSpec) -> tuple[Tensor, Tensor]:
    """Returns the cosine and sine of every position and frequency, each [context, D/2]
    float32 (RoFormer, arXiv 2104.09864).
    """
    frequency = spec.rope_theta ** (
        -torch.arange(0, spec.head_dim, 2, dtype=torch.float64) / spec.head_dim
    )
    angle = torch.arange(spec.context, dtype=torch.float64)[:, None] * frequency[None, :]
    return angle.cos().float(), angle.sin().float()


def rotate_half(x_BHLD: Tensor, cos_CE: Tensor, sin_CE: Tensor, position_ids_BL: Tensor) -> Tensor:
    """Applies rotary position embeddings in LLaMA's half-split layout."""
    cos, sin = (table[position_ids_BL][:, None] for table in (cos_CE, sin_CE))
    first, second = x_BHLD.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(
        x_BHLD.dtype
    )


class DecoderAttention(nn.Module):
    """Grouped-query self-attention with rotary position embeddings."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.head_dim = spec.head_dim
        kv_width = spec.kv_heads * spec.head_dim
        self.q_proj = nn.Linear(spec.hidden, spec.hidden, bias=False)
        self.k_proj = nn.Linear(spec.hidden, kv_width, bias=False)
        self.v_proj = nn.Linear(spec.hidden, kv_width, bias=False)
        self.o_proj = nn.Linear(spec.hidden, spec.hidden, bias=False)

    def forward(
        self, x: Tensor, rotate: Rotate, mask: Tensor, positions: Tensor, cache: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """Computes attention: x [B, L, H] to the output [B, L, H] and the keys and
        values.

        With a cache, the keys and values are the cache with rows `positions` replaced.
        Without one, they are those of this call.
        """
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q), rotate(k)
        if cache is not None:
            rows = positions[:, None, :, None].expand(-1, k.shape[1], -1, self.head_dim)
            k, v = cache[0].scatter(2, rows, k), cache[1].scatter(2, rows, v)
        attended = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2)), (k, v)


class DecoderMlp(nn.Module):
    """SiLU-gated MLP."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden, spec.mlp_width, bias=False)
        self.up_proj = nn.Linear(spec.hidden, spec.mlp_width, bias=False)
        self.down_proj = nn.Linear(spec.mlp_width, spec.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] to [..., H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(spec.hidden, eps=spec.rms_norm_eps)
        self.self_attn = DecoderAttention(spec)
        self.post_attention_layernorm = nn.RMSNorm(spec.hidden, eps=spec.rms_norm_eps)
        self.mlp = DecoderMlp(spec)

    def forward(
        self, x: Tensor, rotate: Rotate, mask: Tensor, positions: Tensor, cache: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """See `DecoderAttention.forward`."""
        attended, cache = self.self_attn(self.input_layernorm(x), rotate, mask, positions, cache)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), cache


def _hidden_only(
    layer: DecoderLayer, x: Tensor, rotate: Rotate, mask: Tensor, positions: Tensor
) -> Tensor:
    return layer(x, rotate, mask, positions, None)[0]


class Decoder(nn.Module):
    """Maps input embeddings to hidden states; `lm_head` maps hidden states to logits."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden)
        self.layers = nn.ModuleList(DecoderLayer(spec) for _ in range(spec.layers))
        self.norm = nn.RMSNorm(spec.hidden, eps=spec.rms_norm_eps)
        self.lm_head = nn.Linear(spec.hidden, spec.vocab_size, bias=False)
        self.recompute = False  # gradient checkpointing: less memory, more time
        cos, sin = rotary_tables(spec)
        self.rotary_cos: Tensor
        self.rotary_sin: Tensor
        self.register_buffer("rotary_cos", cos, persistent=False)
        self.register_buffer("rotary_sin", sin, persistent=False)

    def forward(
        self,
        inputs_embeds_BLH: Tensor,
        position_ids_BL: Tensor,
        mask: Tensor,
        caches: Sequence[KeyValue] | None = None,
        rotary: RotaryFunction = rotate_half,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Returns the hidden states [B, L, H] after the last norm, and each layer's
        keys and values. The list is empty when activations are recomputed.

        `mask` is boolean, [B, 1, L, L] without caches and [B, 1, L, C] with them. It is
        True where the query may attend to the key.
        """
        cos, sin = self.rotary_cos, self.rotary_sin

        def rotate(x: Tensor) -> Tensor:
            return rotary(x, cos, sin, position_ids_BL)

        x, updated = inputs_embeds_BLH, []
        for index, layer in enumerate(self.layers):
            if self.recompute and caches is None and torch.is_grad_enabled():
                x = checkpoint(
                    _hidden_only, layer, x, rotate, mask, position_ids_BL, use_reentrant=False
                )
                continue
            x, cache = layer(
                x, rotate, mask, position_ids_BL, caches[index] if caches is not None else None
            )
            updated.append(cache)
        return self.norm(x), updated

    def step(
        self,
        inputs_embeds_BLH: Tensor,
        position_ids_BL: Tensor,
        caches: Sequence[KeyValue],
        rotary: RotaryFunction = rotate_half,
    ) -> tuple[Tensor, list[KeyValue]]:
        """Runs prefill or a decode step with a cache. Returns the logits of the last
        position [B, V] and the updated caches. Row r of a cache holds position r.
        """
        rows = torch.arange(caches[0][0].shape[2], device=position_ids_BL.device)
        mask = rows[None, None, None, :] <= position_ids_BL[:, None, :, None]
        hidden, updated = self(inputs_embeds_BLH, position_ids_BL, mask, caches, rotary)
        return self.lm_head(hidden[:, -1]), updated
