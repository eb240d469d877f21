"""Independent reference implementations for the model: the BLIP-2 tower and LLaMA of
`transformers`, in the shape of a given spec.
"""

from __future__ import annotations

from typing import Any

from runtime.contract.spec import DecoderSpec, VisionSpec

__all__ = ["blip2_tower", "llama"]


def blip2_tower(spec: VisionSpec) -> Any:
    """Returns a `Blip2VisionModel` in evaluation mode."""
    from transformers import Blip2VisionConfig, Blip2VisionModel

    config = Blip2VisionConfig(
        hidden_size=spec.width,
        intermediate_size=spec.mlp_width,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        layer_norm_eps=spec.layer_norm_eps,
        hidden_act="gelu",
        qkv_bias=True,
    )
    return Blip2VisionModel(config).eval()


def llama(spec: DecoderSpec) -> Any:
    """Returns a `LlamaForCausalLM` in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden,
        intermediate_size=spec.mlp_width,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        max_position_embeddings=spec.context,
        rms_norm_eps=spec.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": spec.rope_theta},
        tie_word_embeddings=False,
        attention_bias=False,
    )
    return LlamaForCausalLM(config).eval()
