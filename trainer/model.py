"""The InfMLLM model: vision tower, pool-adapter and decoder. Its full forward pass is
used in training and is the reference for parity checks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from runtime.contract.pooling import pool_matrix
from runtime.contract.spec import ModelSpec
from trainer.decoder import Decoder
from trainer.vision import PoolAdapter, VisionTower

__all__ = ["InfMLLM"]

_INIT_STD = 0.02


class InfMLLM(nn.Module):
    """The model that a `ModelSpec` describes. With a `generator`, weights start random;
    loading a checkpoint replaces them.
    """

    def __init__(self, spec: ModelSpec, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.vision_tower = VisionTower(spec.vision)
        self.pool_adapter = PoolAdapter(spec.vision.width, spec.decoder.hidden)
        self.decoder = Decoder(spec.decoder)
        if generator is not None:
            self.initialise(generator)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fills all parameters with random weights; see `initial`."""
        for name, parameter in self.named_parameters():
            parameter.copy_(self.initial(name, parameter.shape, generator))

    def initial(self, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Returns a parameter's initial value: normal weights, zero biases and unit
        norms. The standard deviation follows the fan-in, and residual outputs are
        scaled by depth (GPT-2 style).
        """
        if "norm" in name and name.endswith("weight"):
            return torch.ones(shape)
        if name.endswith("bias"):
            return torch.zeros(shape)
        depth = (
            self.spec.vision.layers if name.startswith("vision_tower") else self.spec.decoder.layers
        )
        residual = name.endswith(("proj.weight", "fc2.weight")) and not name.endswith(
            ("q_proj.weight", "k_proj.weight", "v_proj.weight")
        )
        residual = (
            residual
            and "gate_proj" not in name
            and "up_proj" not in name
            and "pool_adapter" not in name
        )
        fan_in = shape[1:].numel() if len(shape) > 1 else 1
        std = _INIT_STD if "embed" in name or "token" in name else fan_in**-0.5
        return torch.empty(shape).normal_(
            0.0, std / (2 * depth) ** 0.5 if residual else std, generator=generator
        )

    def pool_tensor(self, p: int) -> Tensor:
        """Returns the pooling matrix [p*p, s*s] on the model's device."""
        return torch.from_numpy(pool_matrix(self.spec.vision.grid, p)).to(
            self.decoder.embed_tokens.weight.device
        )

    def embed_image(self, pixels_NCHW: Tensor, p: int) -> Tensor:
        """Returns the visual embeddings [N, p*p, H] of normalised pixels."""
        return self.pool_adapter(self.vision_tower(pixels_NCHW), self.pool_tensor(p))

    def sequence(
        self, before: Sequence[int], image_embeds_TH: Tensor | None, after: Sequence[int]
    ) -> Tensor:
        """Returns the input embeddings [1, L, H] of one sequence: the ids before the
        image, the visual embeddings, and the ids after it.
        """
        table = self.decoder.embed_tokens
        device = table.weight.device
        parts = [
            table(torch.tensor(ids, dtype=torch.long, device=device)) for ids in (before, after)
        ]
        if image_embeds_TH is not None:
            parts.insert(1, image_embeds_TH)
        return torch.cat(parts)[None]

    def logits(self, inputs_embeds_BLH: Tensor) -> Tensor:
        """Returns the logits of every position [B, L, V] without a cache, with causal
        attention. All compiled graphs are compared with this reference.
        """
        batch, length = inputs_embeds_BLH.shape[:2]
        positions = torch.arange(length, device=inputs_embeds_BLH.device).expand(batch, -1)
        mask = torch.ones(length, length, dtype=torch.bool, device=inputs_embeds_BLH.device).tril()[
            None, None
        ]
        hidden, _ = self.decoder(inputs_embeds_BLH, positions, mask)
        return self.decoder.lm_head(hidden)

    @torch.no_grad()
    def generate(self, inputs_embeds_1LH: Tensor, max_new_tokens: int) -> list[int]:
        """Decodes greedily with a cache and returns the token ids. Stops before the
        end-of-sequence id, at non-finite logits, or at the end of the context.
        """
        spec, length = self.spec.decoder, inputs_embeds_1LH.shape[1]
        max_new_tokens = min(
            max_new_tokens, spec.context - length + 1
        )  # the last token is never fed back
        assert max_new_tokens > 0, (
            f"a prompt of {length} positions does not fit the context of {spec.context}"
        )
        shape = (1, spec.kv_heads, length + max_new_tokens, spec.head_dim)
        device = inputs_embeds_1LH.device
        caches = [
            (torch.zeros(shape, device=device), torch.zeros(shape, device=device))
            for _ in range(spec.layers)
        ]
        tokens: list[int] = []
        embeds, positions = inputs_embeds_1LH, torch.arange(length, device=device)[None]
        while True:
            logits, caches = self.decoder.step(embeds, positions, caches)
            token = int(np.argmax(logits[0].cpu().numpy()))
            if token == self.spec.eos_id or not torch.isfinite(logits).all():
                return tokens
            tokens.append(token)
            if len(tokens) == max_new_tokens:
                return tokens
            embeds = self.decoder.embed_tokens(torch.tensor([[token]], device=device))
            positions = torch.tensor([[length + len(tokens) - 1]], device=device)
