"""The supported weight layouts: which source tensor becomes which InfMLLM tensor, and
which model the shapes and configuration describe.

Supported are the published raw InfMLLM and EVA-CLIP/BLIP-2 (`visual_encoder.*`),
Hugging Face `Blip2VisionModel`, and any LLaMA in Hugging Face layout.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from runtime.contract.errors import CheckpointError
from runtime.contract.spec import DecoderSpec, VisionSpec
from trainer.imports.files import Stored, WeightFiles
from trainer.start import resized_positions

__all__ = ["Part", "decoder_part", "pooler_part", "vision_part"]

_EVA_WIDTH, _EVA_HEADS, _EVA_BLOCKS, _LLAMA_HEAD_DIM = (
    1408,
    16,
    39,
    128,
)  # BLIP-2 leaves out the last of EVA's 40 blocks


@dataclass(frozen=True)
class Source:
    """The source of one InfMLLM tensor: a stored tensor, and the change to apply to it."""

    stored: Stored
    change: Callable[[Tensor], Tensor] | None = None

    def read(self) -> Tensor:
        """Reads the tensor in the form InfMLLM uses."""
        tensor = self.stored.read()
        return self.change(tensor) if self.change else tensor


@dataclass(frozen=True)
class Part:
    """A part of a model found in weight files. `sources` maps InfMLLM names to their
    sources, and `used` has the stored names they use. `spec` describes the tower or the
    decoder.
    """

    sources: Mapping[str, Source]
    used: frozenset[str]
    spec: Any = None


def _add_prefix(weights: WeightFiles, *prefixes: str) -> str:
    """Returns the first prefix that some tensor name starts with. Raises
    `CheckpointError` if there is none.
    """
    for prefix in prefixes:
        if any(name.startswith(prefix) for name in weights):
            return prefix
    raise CheckpointError(
        f"no tensors named {' or '.join(p + '*' for p in prefixes)}; found other names such as "
        f"{', '.join(sorted(weights)[:3])}"
    )


def _number(config: Mapping[str, Any], key: str, default: float) -> float:
    """Returns a positive number from a configuration, or the default if it is absent or
    null.
    """
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e12:
        raise CheckpointError(
            f"the configuration's {key} is {value!r:.40}, expected a positive number"
        )
    return value


def _layers(weights: WeightFiles, prefix: str) -> int:
    numbers = {
        int(m[1]) for name in weights if (m := re.match(re.escape(prefix) + r"(\d+)\.", name))
    }
    if numbers != set(range(len(numbers))) or not numbers:
        raise CheckpointError(
            f"layers {prefix}N are numbered {sorted(numbers)[:8]}, expected 0, 1, 2, ... without "
            f"gaps"
        )
    return len(numbers)


def _shape(weights: WeightFiles, name: str, ndim: int) -> tuple[int, ...]:
    if name not in weights:
        raise CheckpointError(f"tensor {name} is missing; check that all weight files are there")
    if len(weights[name].shape) != ndim:
        raise CheckpointError(
            f"tensor {name} has shape {weights[name].shape}, expected {ndim} dimensions"
        )
    return weights[name].shape


def _collect(
    weights: WeightFiles,
    names: Mapping[str, tuple[str, Callable[[Tensor], Tensor] | None]],
    spec: Any = None,
) -> Part:
    missing = sorted(theirs for theirs, _ in names.values() if theirs not in weights)
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors are missing, such as {', '.join(missing[:3])}; check that all "
            f"weight files are there"
        )
    sources = {ours: Source(weights[theirs], change) for ours, (theirs, change) in names.items()}
    return Part(sources, frozenset(theirs for theirs, _ in names.values()), spec)


_EVA_BLOCK = {
    name: name
    for name in (
        "norm1.weight",
        "norm1.bias",
        "norm2.weight",
        "norm2.bias",
        "attn.qkv.weight",
        "attn.q_bias",
        "attn.v_bias",
    )
} | {
    f"{layer}.{kind}": f"{layer}.{kind}"
    for layer in ("attn.proj", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
}
_BLIP2_BLOCK = {
    f"{ours}.{kind}": f"{theirs}.{kind}"
    for ours, theirs in {
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
        "attn.proj": "self_attn.projection",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }.items()
    for kind in ("weight", "bias")
} | {"attn.qkv.weight": "self_attn.qkv.weight"}


def _bias_third(index: int) -> Callable[[Tensor], Tensor]:
    """Returns a function that takes the Q (0) or V (2) part of a fused bias. The K part
    must be zero, as in the published tower.
    """

    def cut(bias: Tensor) -> Tensor:
        q, k, v = bias.chunk(3)
        if bool(k.any()):
            raise CheckpointError(
                "the vision tower has a nonzero bias on its attention keys, which is not "
                "supported; give an EVA ViT"
            )
        return (q, k, v)[index]

    return cut


def vision_part(weights: WeightFiles, config: Mapping[str, Any], image_size: int | None) -> Part:
    """Finds the vision tower. `config` is a Hugging Face configuration, or empty for
    raw files. `image_size` resizes the position table. Raises `CheckpointError`.
    """
    huggingface = any("embeddings.class_embedding" in name for name in weights)
    if huggingface:
        prefix = _add_prefix(weights, "vision_model.embeddings.", "embeddings.").removesuffix(
            "embeddings."
        )
        blocks, block, patch = (
            f"{prefix}encoder.layers.",
            _BLIP2_BLOCK,
            f"{prefix}embeddings.patch_embedding",
        )
        cls, positions, norm = (
            f"{prefix}embeddings.class_embedding",
            f"{prefix}embeddings.position_embedding",
            f"{prefix}post_layernorm",
        )
    else:
        prefix = (
            "" if "cls_token" in weights else _add_prefix(weights, "visual_encoder.", "visual.")
        )  # bare EVA files have no prefix
        blocks, block, patch = f"{prefix}blocks.", _EVA_BLOCK, f"{prefix}patch_embed.proj"
        cls, positions, norm = f"{prefix}cls_token", f"{prefix}pos_embed", "ln_vision"
    vision = config.get("vision_config", config)
    if not isinstance(vision, Mapping):
        raise CheckpointError(
            "vision_config is not a JSON object; download the configuration again"
        )
    width, _, patch_size, _ = _shape(weights, f"{patch}.weight", 4)
    rows = _shape(weights, positions, 3)[1]
    heads = int(_number(vision, "num_attention_heads", _EVA_HEADS if width == _EVA_WIDTH else 0))
    if not heads:
        raise CheckpointError(
            f"the number of attention heads of a raw tower of width {width} is unknown; give it "
            f"with --vision-heads"
        )
    old_grid = round((rows - 1) ** 0.5)
    epsilon = _number(vision, "layer_norm_eps", 1e-6)
    spec = VisionSpec(
        image_size=image_size or old_grid * patch_size,
        patch_size=patch_size,
        width=width,
        layers=min(_layers(weights, blocks), _EVA_BLOCKS if width == _EVA_WIDTH else 512),
        heads=heads,
        mlp_width=_shape(weights, f"{blocks}0.mlp.fc1.weight", 2)[0],
        layer_norm_eps=epsilon,
        final_norm_eps=epsilon if huggingface else 1e-5,
    )
    names: dict[str, tuple[str, Callable[[Tensor], Tensor] | None]] = {
        "cls_token": (cls, lambda t: t.reshape(1, 1, -1)),
        "pos_embed": (positions, lambda t: resized_positions(t, spec.grid)),
    }
    for kind in ("weight", "bias"):
        names[f"patch_embed.{kind}"] = (f"{patch}.{kind}", None)
        if (
            huggingface or f"{norm}.{kind}" in weights or prefix == "visual_encoder."
        ):  # bare EVA files lack this norm; it is then initialised anew
            names[f"norm.{kind}"] = (f"{norm}.{kind}", None)
    for layer in range(spec.layers):
        for ours, theirs in block.items():
            names[f"blocks.{layer}.{ours}"] = (f"{blocks}{layer}.{theirs}", None)
        if huggingface:
            for ours, third in (("q_bias", 0), ("v_bias", 2)):
                names[f"blocks.{layer}.attn.{ours}"] = (
                    f"{blocks}{layer}.self_attn.qkv.bias",
                    _bias_third(third),
                )
    return _collect(
        weights, {f"vision_tower.{ours}": source for ours, source in names.items()}, spec
    )


def pooler_part(weights: WeightFiles) -> Part | None:
    """Finds the published pool-adapter's MLP. Returns None if there is none."""
    if not any(name.startswith("pooler.") for name in weights):
        return None
    names = {
        f"pool_adapter.{ours}.{kind}": (f"pooler.mlp.{theirs}.{kind}", None)
        for ours, theirs in (("fc1", 0), ("fc2", 2))
        for kind in ("weight", "bias")
    }
    return _collect(weights, names)


def decoder_part(weights: WeightFiles, config: Mapping[str, Any], heads: int | None) -> Part:
    """Finds the LLaMA decoder. Raises `CheckpointError` for other architectures and for
    unsupported features (rope scaling, biases, sliding windows).
    """
    prefix = "lm_model." if any(name.startswith("lm_model.") for name in weights) else ""
    body = _add_prefix(weights, f"{prefix}model.")
    _check_llama(config)
    vocabulary, hidden = _shape(weights, f"{body}embed_tokens.weight", 2)
    count = heads or int(_number(config, "num_attention_heads", hidden // _LLAMA_HEAD_DIM))
    if count < 1 or hidden % count:
        raise CheckpointError(
            f"the number of attention heads of a decoder of width {hidden} is unknown; give it "
            f"with --decoder-heads"
        )
    kv_rows = _shape(weights, f"{body}layers.0.self_attn.k_proj.weight", 2)[0]
    rope = (
        config.get("rope_parameters") if isinstance(config.get("rope_parameters"), Mapping) else {}
    )
    assert isinstance(rope, Mapping), "chosen above"
    theta = {"rope_theta": config.get("rope_theta") or rope.get("rope_theta")}
    spec = DecoderSpec(
        vocab_size=vocabulary,
        hidden=hidden,
        layers=_layers(weights, f"{body}layers."),
        heads=count,
        kv_heads=kv_rows // (hidden // count),
        mlp_width=_shape(weights, f"{body}layers.0.mlp.gate_proj.weight", 2)[0],
        context=int(_number(config, "max_position_embeddings", 4096)),
        rope_theta=_number(theta, "rope_theta", 10000.0),
        rms_norm_eps=_number(config, "rms_norm_eps", 1e-5),
    )
    names = {
        "embed_tokens.weight": f"{body}embed_tokens.weight",
        "norm.weight": f"{body}norm.weight",
    }
    tied = f"{prefix}lm_head.weight" not in weights and bool(config.get("tie_word_embeddings"))
    names["lm_head.weight"] = f"{body}embed_tokens.weight" if tied else f"{prefix}lm_head.weight"
    linear = [f"self_attn.{p}_proj" for p in "qkvo"] + [
        f"mlp.{p}_proj" for p in ("gate", "up", "down")
    ]
    for layer in range(spec.layers):
        for name in (*linear, "input_layernorm", "post_attention_layernorm"):
            names[f"layers.{layer}.{name}.weight"] = f"{body}layers.{layer}.{name}.weight"
    part = _collect(
        weights, {f"decoder.{ours}": (theirs, None) for ours, theirs in names.items()}, spec
    )
    computed = {
        name for name in weights if name.endswith("rotary_emb.inv_freq")
    }  # older files store this; the model computes it instead
    return Part(part.sources, part.used | computed, spec)


def _check_llama(config: Mapping[str, Any]) -> None:
    found = {
        key: config.get(key)
        for key in ("attention_bias", "mlp_bias", "sliding_window")
        if config.get(key)
    }
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    scaling = (
        (rope.get("rope_type") or rope.get("type") or "default")
        if isinstance(rope, Mapping)
        else rope
    )
    head_dim, hidden, heads = (
        config.get("head_dim"),
        config.get("hidden_size"),
        config.get("num_attention_heads"),
    )
    if head_dim and hidden and heads and head_dim * heads != hidden:
        found["head_dim"] = head_dim
    if config.get("hidden_act", "silu") != "silu":
        found["hidden_act"] = config["hidden_act"]
    if scaling != "default":
        found["rope type"] = scaling
    if config.get("model_type", "llama") not in ("llama", "vicuna"):
        found["model_type"] = config["model_type"]
    if found:
        raise CheckpointError(
            f"the decoder is no plain LLaMA: {found}; these settings are not supported"
        )


def finite(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the tensor as `dtype`. Raises `CheckpointError` if a value is not finite
    in that type.
    """
    converted = (
        tensor.detach().to(dtype, copy=True).contiguous()
    )  # a copy, because tied tensors must not share memory when they are saved
    if not bool(torch.isfinite(converted).all()):
        hint = (
            "use --dtype bf16 or fp32"
            if bool(torch.isfinite(tensor).all())
            else "the checkpoint is damaged"
        )
        raise CheckpointError(
            f"{name} has values that are not finite in {str(dtype).removeprefix('torch.')}; {hint}"
        )
    return converted
