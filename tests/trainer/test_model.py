"""The model against independent references: `transformers`' Blip2VisionModel and
LlamaForCausalLM on the same random weights.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from runtime.contract.pooling import pool_matrix
from tests.conftest import TINY
from tests.references import blip2_tower, llama
from trainer.decoder import Decoder
from trainer.model import InfMLLM
from trainer.vision import PoolAdapter, VisionTower

TOLERANCE = 1e-4  # maximum absolute difference in fp32


def randomised(module: torch.nn.Module, seed: int) -> dict[str, Tensor]:
    """Random values everywhere, norms and biases too, so that nothing hides behind ones
    and zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.normal_(
                1.0 if "norm" in name and "weight" in name else 0.0, scale, generator=generator
            )
    return dict(module.state_dict())


@torch.no_grad()
def test_vision_tower_equals_blip2() -> None:
    spec = TINY.vision
    ours = VisionTower(spec)
    weights = randomised(ours, 1)
    theirs = blip2_tower(spec)
    renamed = {
        "embeddings.class_embedding": weights["cls_token"],
        "embeddings.position_embedding": weights["pos_embed"],
        "embeddings.patch_embedding.weight": weights["patch_embed.weight"],
        "embeddings.patch_embedding.bias": weights["patch_embed.bias"],
        "post_layernorm.weight": torch.ones(spec.width),
        "post_layernorm.bias": torch.zeros(spec.width),
    }
    for layer in range(spec.layers):
        old, new = f"blocks.{layer}", f"encoder.layers.{layer}"
        q, v = weights[f"{old}.attn.q_bias"], weights[f"{old}.attn.v_bias"]
        renamed[f"{new}.self_attn.qkv.weight"] = weights[f"{old}.attn.qkv.weight"]
        renamed[f"{new}.self_attn.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
        for a, b in (
            ("norm1", "layer_norm1"),
            ("norm2", "layer_norm2"),
            ("attn.proj", "self_attn.projection"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            for part in ("weight", "bias"):
                renamed[f"{new}.{b}.{part}"] = weights[f"{old}.{a}.{part}"]
    theirs.load_state_dict(renamed, strict=True)
    pixels = torch.randn(
        2, 3, spec.image_size, spec.image_size, generator=torch.Generator().manual_seed(2)
    )
    # BLIP-2's model ends in its own post_layernorm; the specification's tower has none before
    # ln_vision, so compare the hidden states before it.
    hidden = theirs(pixels, output_hidden_states=True).hidden_states[-1]
    expected = F.layer_norm(
        hidden, (spec.width,), weights["norm.weight"], weights["norm.bias"], spec.final_norm_eps
    )[:, 1:]
    assert torch.allclose(ours(pixels), expected, atol=TOLERANCE, rtol=0)


@torch.no_grad()
def test_decoder_equals_llama_with_and_without_cache() -> None:
    spec = TINY.decoder
    ours = Decoder(spec)
    weights = randomised(ours, 3)
    theirs = llama(spec)
    theirs.load_state_dict(
        {
            name if name.startswith("lm_head") else f"model.{name}": value
            for name, value in weights.items()
        },
        strict=True,
    )
    embeds = torch.randn(2, 11, spec.hidden, generator=torch.Generator().manual_seed(4))
    expected = theirs(inputs_embeds=embeds).logits
    positions = torch.arange(11).expand(2, -1)
    mask = torch.ones(11, 11, dtype=torch.bool).tril()[None, None]
    hidden, _ = ours(embeds, positions, mask)
    assert torch.allclose(ours.lm_head(hidden), expected, atol=TOLERANCE, rtol=0)
    caches = [
        (
            torch.randn(2, spec.kv_heads, 20, spec.head_dim),
            torch.randn(2, spec.kv_heads, 20, spec.head_dim),
        )
        for _ in range(spec.layers)
    ]
    logits, caches = ours.step(
        embeds[:, :7], positions[:, :7], caches
    )  # stale rows must not be seen
    assert torch.allclose(logits, expected[:, 6], atol=TOLERANCE, rtol=0)
    for index in range(7, 11):
        logits, caches = ours.step(
            embeds[:, index : index + 1], positions[:, index : index + 1], caches
        )
        assert torch.allclose(logits, expected[:, index], atol=TOLERANCE, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("p", [1, 2, 4])
def test_pool_adapter_equals_average_pooling_then_mlp(p: int) -> None:
    adapter = PoolAdapter(32, 64)
    randomised(adapter, 6)
    patches = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(7))
    pooled = (
        F.adaptive_avg_pool2d(patches.transpose(1, 2).unflatten(2, (4, 4)), p)
        .flatten(2)
        .transpose(1, 2)
    )
    expected = adapter.fc2(F.gelu(adapter.fc1(pooled)))
    assert torch.allclose(
        adapter(patches, torch.from_numpy(pool_matrix(4, p))), expected, atol=1e-5
    )


@torch.no_grad()
def test_cached_generation_equals_uncached_token_for_token() -> None:
    model = InfMLLM(TINY, torch.Generator().manual_seed(8)).eval()
    inputs = torch.randn(1, 9, TINY.decoder.hidden, generator=torch.Generator().manual_seed(9))
    cached = model.generate(inputs, 20)
    uncached: list[int] = []
    sequence = inputs
    while len(uncached) < 20:
        token = int(model.logits(sequence)[0, -1].argmax())
        if token == TINY.eos_id:
            break
        uncached.append(token)
        sequence = torch.cat([sequence, model.decoder.embed_tokens(torch.tensor([[token]]))], 1)
    assert cached == uncached and len(cached) > 5
