"""The vision tower and the pool-adapter: pixels to visual embeddings.

The tower is the EVA ViT of BLIP-2: pre-norm blocks, fused QKV with learned Q and V
biases, no norm after the last block, then a LayerNorm in fp32. The pooling matrix is an
input at run time, so one set of weights serves every p that divides the patch grid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from runtime.contract.spec import VisionSpec

__all__ = ["PoolAdapter", "VisionTower"]


class VisionAttention(nn.Module):
    """Multi-head self-attention with a fused QKV weight; the K bias is zero and
    therefore not stored.
    """

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.heads = spec.heads
        self.qkv = nn.Linear(spec.width, 3 * spec.width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(spec.width))
        self.v_bias = nn.Parameter(torch.zeros(spec.width))
        self.proj = nn.Linear(spec.width, spec.width)

    def forward(self, x_NLC: Tensor) -> Tensor:
        """[N, L, C] to [N, L, C]."""
        q, k, v = self.qkv(x_NLC).chunk(3, dim=-1)
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (q + self.q_bias, k, v + self.v_bias)
        )
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class VisionMlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.fc1 = nn.Linear(spec.width, spec.mlp_width)
        self.fc2 = nn.Linear(spec.mlp_width, spec.width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        return self.fc2(F.gelu(self.fc1(x)))


class VisionBlock(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.width, eps=spec.layer_norm_eps)
        self.attn = VisionAttention(spec)
        self.norm2 = nn.LayerNorm(spec.width, eps=spec.layer_norm_eps)
        self.mlp = VisionMlp(spec)

    def forward(self, x: Tensor) -> Tensor:
        """[N, L, C] to [N, L, C]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTower(nn.Module):
    """Maps pixels [N, 3, S, S] to patch features [N, s*s, C] in row-major order. The
    CLS token takes part in attention and is dropped at the end.
    """

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, spec.width, spec.patch_size, stride=spec.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, spec.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, spec.grid**2 + 1, spec.width))
        self.blocks = nn.ModuleList(VisionBlock(spec) for _ in range(spec.layers))
        self.norm = nn.LayerNorm(spec.width, eps=spec.final_norm_eps)
        self.recompute = False  # gradient checkpointing: less memory, more time

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        """Maps normalised pixels to patch features [N, s*s, C] after the final norm,
        which is computed in fp32.
        """
        return self.with_early_features(pixels_NCHW)[0]

    def with_early_features(self, pixels_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the patch features and the patches after a third of the blocks, both
        [N, s*s, C]. The latter are for auxiliary losses.
        """
        x = early = self.embed(pixels_NCHW)
        for index, block in enumerate(self.blocks, 1):
            x = (
                checkpoint(block, x, use_reentrant=False)
                if self.recompute and torch.is_grad_enabled()
                else block(x)
            )
            early = x if index == max(1, len(self.blocks) // 3) else early
        return self.finish(x), early[:, 1:]

    def embed(self, pixels_NCHW: Tensor) -> Tensor:
        """Returns the first block's input [N, 1 + s*s, C]: CLS and patch embeddings
        plus positions.
        """
        patches = self.patch_embed(pixels_NCHW).flatten(2).transpose(1, 2)
        cls = self.cls_token.expand(patches.shape[0], -1, -1)
        return torch.cat([cls, patches], dim=1) + self.pos_embed

    def finish(self, x_NLC: Tensor) -> Tensor:
        """Maps the last block's output to patch features: applies the final norm in
        fp32 and drops CLS.
        """
        return self.norm(x_NLC.float())[:, 1:].to(x_NLC.dtype)


class PoolAdapter(nn.Module):
    """Average-pools the patch grid with a matrix, then projects to the decoder's width
    (linear, GELU, linear).
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, hidden)

    def forward(self, patches_NPC: Tensor, pool_TP: Tensor) -> Tensor:
        """Maps patch features [N, s*s, C] and a pooling matrix [T, s*s] to image
        embeddings [N, T, H].
        """
        return self.fc2(F.gelu(self.fc1(pool_TP.to(patches_NPC.dtype) @ patches_NPC)))
