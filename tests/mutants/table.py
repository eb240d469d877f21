"""The table of mutants. Each row is one fault: its name, where it lies, and the change.

A change returns False where a bundle has nothing to change, for example 4-bit zero points
in an 8-bit bundle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.mutants.changes import (
    Changed,
    attention_scale,
    attention_window,
    changed_attribute,
    changed_constant,
    changed_levels,
    changed_spec,
    changed_table,
    changed_tensor,
    drop_input,
    epsilon,
    first_rows_zero,
    freeze,
    late_rows,
    multiplied,
    one_row,
    reverse_late_rows,
    scale_result,
    scaled_weight,
    swap_outputs,
    swap_tokens,
    zeros,
)
from tests.mutants.edit import Edit
from tests.mutants.single_faults import (
    changed_goldens,
    changed_named,
    copied_layer,
    declared_independent,
    gelu,
    head_rows,
    is_pool,
    one_channel,
    one_level,
    random_scales,
    reversed_columns,
    shift_blocks,
    shift_patches,
    swap_nibbles,
    vision_head_rows,
    zero_points,
)

__all__ = ["MUTANTS", "Mutant"]

TOWER, ADAPTER, LAYER = "vision_tower.blocks.1", "pool_adapter", "decoder.layers.1"


@dataclass(frozen=True)
class Mutant:
    """A wrong bundle: the change of a copy, and the text that must name its place."""

    name: str
    part: str
    place: str
    change: Callable[[Edit], Changed]


MUTANTS: tuple[Mutant, ...] = (
    Mutant("tanh-GELU for erf-GELU", "tower", TOWER, gelu),
    Mutant(
        "attention scale x 0.9", "tower", "vision_tower.blocks.0", attention_scale("vision", 0.9)
    ),
    Mutant(
        "causal attention",
        "tower",
        "vision_tower.blocks.0",
        changed_attribute(
            "vision",
            ("Attention", "MultiHeadAttention"),
            "is_causal",
            lambda old, edit: 1 if old is not None else None,
            0,
        ),
    ),
    Mutant("norm epsilon 1e-3", "tower", TOWER, epsilon("vision", 2, 1e-3)),
    Mutant(
        "query bias zero",
        "tower",
        f"{TOWER}.attn.q_bias",
        changed_tensor(f"{TOWER}.attn.q_bias", zeros),
    ),
    Mutant(
        "query bias left out",
        "tower",
        f"{TOWER}.attn.q_bias",
        drop_input("vision", f"{TOWER}.attn.q_bias"),
    ),
    Mutant(
        "value bias zero",
        "tower",
        f"{TOWER}.attn.v_bias",
        changed_tensor(f"{TOWER}.attn.v_bias", zeros),
    ),
    Mutant(
        "projection bias zero",
        "tower",
        f"{TOWER}.attn.proj.bias",
        changed_tensor(f"{TOWER}.attn.proj.bias", zeros),
    ),
    Mutant(
        "MLP bias zero",
        "tower",
        f"{TOWER}.mlp.fc1.bias",
        changed_tensor(f"{TOWER}.mlp.fc1.bias", zeros),
    ),
    Mutant(
        "positions x 0.9",
        "tower",
        "vision_tower.pos_embed",
        changed_tensor("vision_tower.pos_embed", multiplied(0.9)),
    ),
    Mutant(
        "two positions exchanged",
        "tower",
        "vision_tower.pos_embed",
        changed_tensor("vision_tower.pos_embed", lambda a: a[:, [0, 2, 1, *range(3, a.shape[1])]]),
    ),
    Mutant(
        "class token zero",
        "tower",
        "vision_tower.cls_token",
        changed_tensor("vision_tower.cls_token", zeros),
    ),
    Mutant(
        "blue for red",
        "tower",
        "vision_tower.patch_embed.weight",
        changed_tensor("vision_tower.patch_embed.weight", lambda a: a[:, ::-1]),
    ),
    Mutant(
        "a head zeroed",
        "tower",
        f"{TOWER}.attn.proj",
        first_rows_zero(vision_head_rows, f"{TOWER}.attn.proj.weight"),
    ),
    Mutant("fc2 x 0.9", "tower", f"{TOWER}.mlp.fc2", scaled_weight(f"{TOWER}.mlp.fc2.weight", 0.9)),
    Mutant(
        "one channel x 1.1",
        "tower",
        f"{TOWER}.mlp.fc1",
        lambda edit: edit.weight(f"{TOWER}.mlp.fc1.weight", one_channel),
    ),
    Mutant(
        "keys and values exchanged",
        "tower",
        "vision_tower.blocks.0",
        swap_outputs("vision", "Split", 0, (1, 2)),
    ),
    Mutant(
        "norm weight x 1.1",
        "tower",
        "vision_tower.norm",
        changed_tensor("vision_tower.norm.weight", multiplied(1.1)),
    ),
    Mutant("class token pooled", "adapter", ADAPTER, shift_patches),
    Mutant("pooled values x 0.9", "adapter", ADAPTER, scale_result("vision", is_pool, 0.9)),
    Mutant(
        "fc1 bias zero",
        "adapter",
        f"{ADAPTER}.fc1.bias",
        changed_tensor(f"{ADAPTER}.fc1.bias", zeros),
    ),
    Mutant("fc2 x 1.1", "adapter", f"{ADAPTER}.fc2", scaled_weight(f"{ADAPTER}.fc2.weight", 1.1)),
    Mutant(
        "fc1 channels reversed",
        "adapter",
        f"{ADAPTER}.fc1",
        reversed_columns(f"{ADAPTER}.fc1.weight"),
    ),
    Mutant("attention scale x 0.9", "decoder", "decoder.layers.0", attention_scale("decoder", 0.9)),
    Mutant(
        "attention scale x 1.25", "decoder", "decoder.layers.0", attention_scale("decoder", 1.25)
    ),
    Mutant("attention window", "decoder", "decoder.layers.0", attention_window),
    Mutant(
        "attention softcap",
        "decoder",
        "decoder.layers.0",
        changed_attribute("decoder", ("GroupQueryAttention",), "softcap", 5.0, 0),
    ),
    Mutant("norm epsilon 1e-3", "decoder", "decoder.layers.1", epsilon("decoder", 2, 1e-3)),
    Mutant("last norm's epsilon 1e-3", "decoder", "decoder.lm_head", epsilon("decoder", -1, 1e-3)),
    Mutant(
        "rotation frozen late",
        "decoder",
        "decoder.rotary_cos",
        late_rows("decoder.rotary_cos", freeze),
    ),
    Mutant(
        "rotation of sine frozen late",
        "decoder",
        "decoder.rotary_sin",
        late_rows("decoder.rotary_sin", freeze),
    ),
    Mutant(
        "rotation backwards",
        "decoder",
        "decoder.rotary_sin",
        changed_tensor("decoder.rotary_sin", multiplied(-1.0)),
    ),
    Mutant(
        "interleaved rotation",
        "decoder",
        "decoder.layers.0",
        changed_attribute("decoder", ("GroupQueryAttention",), "rotary_interleaved", 1, 0),
    ),
    Mutant(
        "down_proj x 0.8",
        "decoder",
        f"{LAYER}.mlp.down_proj",
        scaled_weight(f"{LAYER}.mlp.down_proj.weight", 0.8),
    ),
    Mutant(
        "up_proj x 1.1",
        "decoder",
        f"{LAYER}.mlp",
        scaled_weight(f"{LAYER}.mlp.up_proj.weight", 1.1),
    ),
    Mutant(
        "a head zeroed",
        "decoder",
        f"{LAYER}.self_attn.o_proj",
        first_rows_zero(head_rows, f"{LAYER}.self_attn.o_proj.weight"),
    ),
    Mutant(
        "gate and up exchanged",
        "decoder",
        "decoder.layers.0",
        swap_outputs("decoder", "Split", 0, (0, 1)),
    ),
    Mutant(
        "another layer's keys",
        "decoder",
        f"{LAYER}.self_attn.k_proj",
        copied_layer("self_attn.k_proj.weight"),
    ),
    Mutant(
        "another layer's down_proj",
        "decoder",
        f"{LAYER}.mlp.down_proj",
        copied_layer("mlp.down_proj.weight"),
    ),
    Mutant(
        "value heads reversed",
        "decoder",
        f"{LAYER}.self_attn.v_proj",
        reversed_columns(f"{LAYER}.self_attn.v_proj.weight"),
    ),
    Mutant(
        "norm weight x 1.1",
        "decoder",
        LAYER,
        changed_tensor(f"{LAYER}.input_layernorm.weight", multiplied(1.1)),
    ),
    Mutant(
        "head scales 10 % at random",
        "decoder",
        "decoder.lm_head",
        lambda edit: edit.weight("decoder.lm_head.weight", random_scales),
    ),
    Mutant(
        "head's last words zero",
        "decoder",
        "decoder.lm_head",
        changed_levels(
            "decoder.lm_head.weight", lambda a: np.concatenate([a[:, :-32], a[:, -32:] * 0], axis=1)
        ),
    ),
    Mutant(
        "MLP gate x 1.1",
        "decoder",
        "decoder.layers.0",
        scale_result("decoder", lambda node: node.op_type == "Sigmoid", 1.1),
    ),
    Mutant(
        "one level at the other end",
        "packing",
        f"{LAYER}.mlp.down_proj",
        lambda edit: edit.weight(f"{LAYER}.mlp.down_proj.weight", one_level),
    ),
    Mutant(
        "block scales shifted",
        "packing",
        f"{LAYER}.mlp.down_proj",
        lambda edit: edit.weight(f"{LAYER}.mlp.down_proj.weight", shift_blocks),
    ),
    Mutant(
        "nibbles exchanged",
        "packing",
        f"{LAYER}.self_attn.o_proj",
        swap_nibbles(f"{LAYER}.self_attn.o_proj.weight"),
    ),
    Mutant("zero points 8", "packing", LAYER, zero_points),
    Mutant(
        "zero point 127 for 128",
        "packing",
        "",
        changed_constant("vision", "zero_point.128", lambda a: a - 1),
    ),
    Mutant(
        "truncated levels",
        "packing",
        "",
        changed_constant("vision", "levels.offset", lambda a: a - np.float32(0.5)),
    ),
    Mutant(
        "levels over 128",
        "packing",
        "",
        changed_constant("vision", "levels.inverse", lambda a: a * np.float32(127 / 128)),
    ),
    Mutant(
        "static range halved",
        "packing",
        "",
        changed_named("vision", ".input_scale", lambda a: a * 0.5),
    ),
    Mutant(
        "decoder's static range halved",
        "packing",
        "decoder",
        changed_named("decoder", ".input_scale", lambda a: a * 0.5),
    ),
    Mutant(
        "static zero point moved",
        "packing",
        "decoder",
        changed_named("decoder", ".input_zero", lambda a: a - 9 if int(a) > 9 else a + 9),
    ),
    Mutant(
        "key scales x 0.25",
        "KV cache",
        "keys",
        changed_named("decoder", ".keys_scale", lambda a: a * np.float32(0.25)),
    ),
    Mutant(
        "value scales x 0.25",
        "KV cache",
        "values",
        changed_named("decoder", ".values_scale", lambda a: a * np.float32(0.25)),
    ),
    Mutant("late rows reversed", "token table", "embeddings.npy", changed_table(reverse_late_rows)),
    Mutant("one row zero", "token table", "embeddings.npy: row 300", changed_table(one_row)),
    Mutant("all rows x 1.01", "token table", "embeddings.npy", changed_table(lambda a: a * 1.01)),
    Mutant("two words exchanged", "tokenizer", "tokenizer.json", swap_tokens),
    Mutant(
        "padding for stretching",
        "preprocessing",
        "manifest.json",
        changed_spec(("image_mode",), "pad"),
    ),
    Mutant("another end token", "tokenizer", "manifest.json", changed_spec(("eos_id",), 5)),
    Mutant(
        "another preferred pooling",
        "preprocessing",
        "manifest.json",
        changed_spec(("pool_sizes",), lambda a: a[::-1]),
    ),
    Mutant("rows declared independent", "speculation", "manifest.json", declared_independent),
    Mutant("a golden result x 1.05", "goldens", "goldens", changed_goldens),
)
