"""The table of mutants. Each row is one fault: its name, where it lies, and the change.

A change returns False where a bundle has nothing to change, for example 4-bit zero points
in an 8-bit bundle. Rows with `runtime` change the program and not the bundle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from PIL import Image

from export.parity import calls, constants
from runtime.contract import image, prompt
from runtime.engines.onnxruntime.cpu import OrtBatch, OrtEngine
from runtime.generation import beam_search, generate, request
from runtime.generation.image_cache import ImageEmbeddingCache
from runtime.generation.kv_cache import PrefixCache
from tests.mutants.edit import Edit

__all__ = ["MUTANTS", "RUNTIME_MUTANTS", "Mutant", "RuntimeMutant"]

Array = NDArray[Any]
Changed = bool | str
"""Whether a bundle was changed, or the place where that shows first."""
TOWER, ADAPTER, LAYER = "vision_tower.blocks.1", "pool_adapter", "decoder.layers.1"
_FROZEN = 0.7  # share of the context from which late faults begin


@dataclass(frozen=True)
class Mutant:
    """A wrong bundle: the change of a copy, and the text that must name its place."""

    name: str
    part: str
    place: str
    change: Callable[[Edit], Changed]


@dataclass(frozen=True)
class RuntimeMutant:
    """A wrong program: the change of the running code."""

    name: str
    part: str
    change: Callable[[pytest.MonkeyPatch], None]


def _times(factor: float) -> Callable[[Array], Array]:
    return lambda array: array * np.float32(factor)


def _zero(array: Array) -> Array:
    return np.zeros_like(array)


def _scaled(name: str, factor: float) -> Callable[[Edit], bool]:
    return lambda edit: edit.weight(name, lambda levels, scale: (levels, scale * factor))


def _levels(name: str, change: Callable[[Array], Array]) -> Callable[[Edit], bool]:
    return lambda edit: edit.weight(name, lambda levels, scale: (change(levels), scale))


def _tensor(name: str, change: Callable[[Array], Array]) -> Callable[[Edit], bool]:
    return lambda edit: edit.tensor(name, change)


def _first_rows_zero(count: Callable[[Edit], int], name: str) -> Callable[[Edit], bool]:
    def change(edit: Edit) -> bool:
        def cut(levels: Array, scale: Array) -> tuple[Array, Array]:
            levels[: count(edit)] = 0
            return levels, scale

        return edit.weight(name, cut)

    return change


def _attribute(
    part: str, kinds: tuple[str, ...], name: str, value: Any, index: int | None = None
) -> Callable[[Edit], bool]:
    """Sets an attribute of nodes (all, or the one at `index`). `value` may be a function of
    the old value and the edit.
    """

    def change(edit: Edit) -> bool:
        def apply(model: ir.Model) -> bool:
            found = list(edit.nodes(model, *kinds))
            chosen = found if index is None else found[index : index + 1]
            for node in chosen:
                old = node.attributes[name].value if name in node.attributes else None
                new = value(old, edit) if callable(value) else value
                if new is None:
                    return False
                kind = (
                    ir.AttrFloat32
                    if isinstance(new, float)
                    else (ir.AttrString if isinstance(new, str) else ir.AttrInt64)
                )
                node.attributes[name] = kind(name, new)
            return bool(chosen)

        return (edit.vision if part == "vision" else edit.decoder)(apply)

    return change


def _constant(part: str, name: str, change: Callable[[Array], Array]) -> Callable[[Edit], bool]:
    """Changes a small constant of a graph."""

    def edit_it(edit: Edit) -> bool:
        def apply(model: ir.Model) -> bool:
            for stored in (name, f"{name}.fp16"):
                value = model.graph.initializers.get(stored)
                if value is not None and value.const_value is not None:
                    before = value.const_value.numpy()
                    value.const_value = ir.tensor(
                        np.asarray(change(before)).astype(before.dtype), name=stored
                    )
                    return True
            return False

        return (edit.vision if part == "vision" else edit.decoder)(apply)

    return edit_it


def _swap_outputs(
    part: str, kind: str, index: int, pair: tuple[int, int]
) -> Callable[[Edit], bool]:
    """Exchanges two outputs of a node."""

    def change(edit: Edit) -> bool:
        def apply(model: ir.Model) -> bool:
            found = [n for n in edit.nodes(model, kind) if len(n.outputs) > max(pair)]
            if len(found) <= index:
                return False
            first, second = (found[index].outputs[place] for place in pair)
            uses = [[(u.node, u.idx) for u in value.uses()] for value in (first, second)]
            for value, places in ((second, uses[0]), (first, uses[1])):
                for node, place in places:
                    node.replace_input_with(place, value)
            return True

        return (edit.vision if part == "vision" else edit.decoder)(apply)

    return change


def _scale_result(
    part: str, match: Callable[[ir.Node], bool], factor: float
) -> Callable[[Edit], bool]:
    """Multiplies the result of the first matching node."""

    def change(edit: Edit) -> bool:
        def apply(model: ir.Model) -> bool:
            node = next((n for n in model.graph if match(n)), None)
            if node is None:
                return False
            value = node.outputs[0]
            uses = [(use.node, use.idx) for use in value.uses()]
            half = value.dtype == ir.DataType.FLOAT16
            tensor = ir.tensor(np.array(factor, np.float16 if half else np.float32), name="mutant")
            constant = ir.Value(
                name="mutant",
                shape=ir.Shape([]),
                type=ir.TensorType(tensor.dtype),
                const_value=tensor,
            )
            model.graph.register_initializer(constant)
            product = ir.node("Mul", [value, constant])
            product.outputs[0].type = value.type
            model.graph.insert_after(node, product)
            for user, place in uses:
                user.replace_input_with(place, product.outputs[0])
            return bool(uses)

        return (edit.vision if part == "vision" else edit.decoder)(apply)

    return change


def _attention_scale(part: str, factor: float) -> Callable[[Edit], bool]:
    """Changes the scale of attention, in whatever form the graph has it."""
    fused = _attribute(
        part,
        ("Attention", "MultiHeadAttention", "GroupQueryAttention"),
        "scale",
        lambda old, edit: factor * (old or (_width(edit, part) ** -0.5)),
    )
    plain = _constant(part, "attention.scale", lambda array: array * factor)
    return lambda edit: plain(edit) or fused(edit)


def _width(edit: Edit, part: str) -> int:
    vision = edit.spec.vision
    return vision.width // vision.heads if part == "vision" else edit.spec.decoder.head_dim


def _epsilon(part: str, index: int, value: float) -> Callable[[Edit], Changed]:
    named = _attribute(
        part,
        ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"),
        "epsilon",
        value,
        index,
    )
    plain = _constant(part, "epsilon.1e-05", lambda array: np.full_like(array, value))
    first = "vision_tower.blocks.0" if part == "vision" else "decoder.layers.0"
    return lambda edit: named(edit) or (first if plain(edit) else False)


def _late(edit: Edit) -> int:
    return int(_FROZEN * edit.spec.decoder.context)


def _late_rows(name: str, change: Callable[[Array, int], None]) -> Callable[[Edit], bool]:
    def apply(edit: Edit) -> bool:
        def rows(table: Array) -> Array:
            table = table.copy()
            change(table, _late(edit))
            return table

        return edit.tensor(name, rows)

    return apply


def _freeze(table: Array, row: int) -> None:
    table[row:] = table[row - 1]


def _window(edit: Edit) -> bool:
    return _attribute("decoder", ("GroupQueryAttention",), "local_window_size", _late(edit))(edit)


def _table(change: Callable[[Array], Array]) -> Callable[[Edit], bool]:
    def apply(edit: Edit) -> bool:
        path = edit.folder / "embeddings.npy"
        table = np.load(path)
        np.save(path, change(table.copy()).astype(table.dtype))
        return True

    return apply


def _reverse_late_rows(table: Array) -> Array:
    table[200:] = table[200:][::-1]
    return table


def _one_row(table: Array) -> Array:
    table[300] = 0
    return table


def _swap_tokens(edit: Edit) -> bool:
    import json

    path = edit.folder / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(data))
    return True


def _spec(path: tuple[str, ...], value: Any) -> Callable[[Edit], bool]:
    def apply(edit: Edit) -> bool:
        def change(data: dict[str, Any]) -> None:
            place = data["spec"]
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = value(place[path[-1]]) if callable(value) else value

        return edit.manifest(change)

    return apply


def _drop_input(part: str, name: str) -> Callable[[Edit], bool]:
    """Replaces the sum with a bias by the value that the bias is added to."""

    def change(edit: Edit) -> bool:
        def apply(model: ir.Model) -> bool:
            for node in edit.nodes(model, "Add"):
                names = [
                    str(x.name).removesuffix(".fp16") if x is not None else "" for x in node.inputs
                ]
                if name in names:
                    other = node.inputs[1 - names.index(name)]
                    assert other is not None
                    ir.convenience.replace_all_uses_with(
                        node.outputs[0], other, replace_graph_outputs=True
                    )
                    return True
            return False

        return (edit.vision if part == "vision" else edit.decoder)(apply)

    return change


def _copied_layer(weight: str) -> Callable[[Edit], bool]:
    """Stores layer 0's weight in layer 1 too."""

    def apply(edit: Edit) -> bool:
        kept: list[tuple[Array, Array]] = []

        def read(levels: Array, scale: Array) -> tuple[Array, Array]:
            kept.append((levels.copy(), scale.copy()))
            return levels, scale

        edit.weight(f"decoder.layers.0.{weight}", read)
        return edit.weight(f"decoder.layers.1.{weight}", lambda levels, scale: kept[0])

    return apply


def _head_rows(edit: Edit) -> int:
    return edit.spec.decoder.head_dim


def _vision_head_rows(edit: Edit) -> int:
    return _width(edit, "vision")


def _random_scales(levels: Array, scale: Array) -> tuple[Array, Array]:
    rng = np.random.default_rng(3)
    return levels, scale * rng.uniform(0.9, 1.1, (1, scale.shape[1])).astype(np.float32)


def _one_channel(levels: Array, scale: Array) -> tuple[Array, Array]:
    scale[:, 3] *= 1.1
    return levels, scale


def _one_level(levels: Array, scale: Array) -> tuple[Array, Array]:
    """Moves the largest level to the other end of the range."""
    place = np.unravel_index(np.abs(levels).argmax(), levels.shape)
    levels[place] = levels.min() if levels[place] > 0 else levels.max()
    return levels, scale


def _shift_blocks(levels: Array, scale: Array) -> tuple[Array, Array]:
    return levels, np.roll(scale, 1, axis=0)


def _swap_nibbles(name: str) -> Callable[[Edit], bool]:
    def apply(edit: Edit) -> bool:
        def change(model: ir.Model) -> bool:
            for stored, value in model.graph.initializers.items():
                if name in stored and stored.endswith(".int4") and value.const_value is not None:
                    if value.const_value.dtype != ir.DataType.UINT8:
                        return False
                    packed = value.const_value.numpy()
                    value.const_value = ir.tensor((packed >> 4) | (packed << 4), name=stored)
                    return True
            return False

        return edit.decoder(change)

    return apply


def _zero_points(edit: Edit) -> bool:
    def change(model: ir.Model) -> bool:
        for stored, value in model.graph.initializers.items():
            if stored.endswith(".zero") and value.const_value is not None and LAYER in stored:
                value.const_value = ir.tensor(
                    np.full_like(value.const_value.numpy(), 0x88), name=stored
                )
                return True
        return False

    return edit.decoder(change)


def _named(part: str, ending: str, change: Callable[[Array], Array]) -> Callable[[Edit], bool]:
    """Changes the first constant whose name has an ending."""

    def edit_it(edit: Edit) -> bool:
        def apply(model: ir.Model) -> bool:
            for stored, value in model.graph.initializers.items():
                if stored.removesuffix(".fp16").endswith(ending) and value.const_value is not None:
                    before = value.const_value.numpy()
                    value.const_value = ir.tensor(
                        np.asarray(change(before)).astype(before.dtype), name=stored
                    )
                    return True
            return False

        return (edit.vision if part == "vision" else edit.decoder)(apply)

    return edit_it


def _gelu(edit: Edit) -> Changed:
    named = _attribute("vision", ("Gelu",), "approximate", "tanh", 1)
    if named(edit):
        return True
    return (
        "vision_tower.blocks.0" if _constant("vision", "gelu.root", _times(0.97))(edit) else False
    )


def _shift_patches(edit: Edit) -> bool:
    """Pools the class token instead of the last patch."""

    def apply(model: ir.Model) -> bool:
        for node in edit.nodes(model, "Slice"):
            starts, ends = node.inputs[1], node.inputs[2]
            if starts is None or ends is None or starts.const_value is None:
                continue
            if int(starts.const_value.numpy().reshape(-1)[0]) != 1 or (
                "layer_norm" not in str(node.inputs[0].name if node.inputs[0] is not None else "")
                and "val" not in str(node.inputs[0].name if node.inputs[0] is not None else "")
            ):
                continue
            shape = starts.const_value.shape.numpy()
            for place, number in ((1, 0), (2, -1)):
                tensor = ir.tensor(np.full(shape, number, np.int64), name=f"mutant.{place}")
                value = ir.Value(
                    name=f"mutant.{place}",
                    shape=ir.Shape(shape),
                    type=ir.TensorType(ir.DataType.INT64),
                    const_value=tensor,
                )
                model.graph.register_initializer(value)
                node.replace_input_with(place, value)
            return True
        return False

    return edit.vision(apply)


def _is_pool(node: ir.Node) -> bool:
    names = [str(x.name) for x in node.inputs if x is not None]
    return node.op_type == "MatMul" and any(
        name == "pool" or (name.startswith("val") and "slice" in " ".join(names)) for name in names
    )


def _independent(edit: Edit) -> bool:
    def change(data: dict[str, Any]) -> None:
        data["schemes"]["row_independent"] = "true"

    import json

    known = json.loads((edit.folder / "manifest.json").read_text())["schemes"]
    if known.get("row_independent") == "true":
        return False
    return edit.manifest(change)


def _goldens(edit: Edit) -> bool:
    path = edit.folder / "goldens.npz"
    with np.load(path) as data:
        arrays = {name: data[name] for name in data.files}
    arrays["0.prefill"] = arrays["0.prefill"] * np.float32(1.05)
    np.savez(path, **arrays)
    return True


def _reversed_columns(name: str) -> Callable[[Edit], bool]:
    return lambda edit: edit.weight(name, lambda levels, scale: (levels[:, ::-1], scale[:, ::-1]))


MUTANTS: tuple[Mutant, ...] = (
    Mutant("tanh-GELU for erf-GELU", "tower", TOWER, _gelu),
    Mutant(
        "attention scale x 0.9", "tower", "vision_tower.blocks.0", _attention_scale("vision", 0.9)
    ),
    Mutant(
        "causal attention",
        "tower",
        "vision_tower.blocks.0",
        _attribute(
            "vision",
            ("Attention", "MultiHeadAttention"),
            "is_causal",
            lambda old, edit: 1 if old is not None else None,
            0,
        ),
    ),
    Mutant("norm epsilon 1e-3", "tower", TOWER, _epsilon("vision", 2, 1e-3)),
    Mutant(
        "query bias zero", "tower", f"{TOWER}.attn.q_bias", _tensor(f"{TOWER}.attn.q_bias", _zero)
    ),
    Mutant(
        "query bias left out",
        "tower",
        f"{TOWER}.attn.q_bias",
        _drop_input("vision", f"{TOWER}.attn.q_bias"),
    ),
    Mutant(
        "value bias zero", "tower", f"{TOWER}.attn.v_bias", _tensor(f"{TOWER}.attn.v_bias", _zero)
    ),
    Mutant(
        "projection bias zero",
        "tower",
        f"{TOWER}.attn.proj.bias",
        _tensor(f"{TOWER}.attn.proj.bias", _zero),
    ),
    Mutant(
        "MLP bias zero", "tower", f"{TOWER}.mlp.fc1.bias", _tensor(f"{TOWER}.mlp.fc1.bias", _zero)
    ),
    Mutant(
        "positions x 0.9",
        "tower",
        "vision_tower.pos_embed",
        _tensor("vision_tower.pos_embed", _times(0.9)),
    ),
    Mutant(
        "two positions exchanged",
        "tower",
        "vision_tower.pos_embed",
        _tensor("vision_tower.pos_embed", lambda a: a[:, [0, 2, 1, *range(3, a.shape[1])]]),
    ),
    Mutant(
        "class token zero",
        "tower",
        "vision_tower.cls_token",
        _tensor("vision_tower.cls_token", _zero),
    ),
    Mutant(
        "blue for red",
        "tower",
        "vision_tower.patch_embed.weight",
        _tensor("vision_tower.patch_embed.weight", lambda a: a[:, ::-1]),
    ),
    Mutant(
        "a head zeroed",
        "tower",
        f"{TOWER}.attn.proj",
        _first_rows_zero(_vision_head_rows, f"{TOWER}.attn.proj.weight"),
    ),
    Mutant("fc2 x 0.9", "tower", f"{TOWER}.mlp.fc2", _scaled(f"{TOWER}.mlp.fc2.weight", 0.9)),
    Mutant(
        "one channel x 1.1",
        "tower",
        f"{TOWER}.mlp.fc1",
        lambda edit: edit.weight(f"{TOWER}.mlp.fc1.weight", _one_channel),
    ),
    Mutant(
        "keys and values exchanged",
        "tower",
        "vision_tower.blocks.0",
        _swap_outputs("vision", "Split", 0, (1, 2)),
    ),
    Mutant(
        "norm weight x 1.1",
        "tower",
        "vision_tower.norm",
        _tensor("vision_tower.norm.weight", _times(1.1)),
    ),
    Mutant("class token pooled", "adapter", ADAPTER, _shift_patches),
    Mutant("pooled values x 0.9", "adapter", ADAPTER, _scale_result("vision", _is_pool, 0.9)),
    Mutant(
        "fc1 bias zero", "adapter", f"{ADAPTER}.fc1.bias", _tensor(f"{ADAPTER}.fc1.bias", _zero)
    ),
    Mutant("fc2 x 1.1", "adapter", f"{ADAPTER}.fc2", _scaled(f"{ADAPTER}.fc2.weight", 1.1)),
    Mutant(
        "fc1 channels reversed",
        "adapter",
        f"{ADAPTER}.fc1",
        _reversed_columns(f"{ADAPTER}.fc1.weight"),
    ),
    Mutant(
        "attention scale x 0.9", "decoder", "decoder.layers.0", _attention_scale("decoder", 0.9)
    ),
    Mutant(
        "attention scale x 1.25", "decoder", "decoder.layers.0", _attention_scale("decoder", 1.25)
    ),
    Mutant("attention window", "decoder", "decoder.layers.0", _window),
    Mutant(
        "attention softcap",
        "decoder",
        "decoder.layers.0",
        _attribute("decoder", ("GroupQueryAttention",), "softcap", 5.0, 0),
    ),
    Mutant("norm epsilon 1e-3", "decoder", "decoder.layers.1", _epsilon("decoder", 2, 1e-3)),
    Mutant("last norm's epsilon 1e-3", "decoder", "decoder.lm_head", _epsilon("decoder", -1, 1e-3)),
    Mutant(
        "rotation frozen late",
        "decoder",
        "decoder.rotary_cos",
        _late_rows("decoder.rotary_cos", _freeze),
    ),
    Mutant(
        "rotation of sine frozen late",
        "decoder",
        "decoder.rotary_sin",
        _late_rows("decoder.rotary_sin", _freeze),
    ),
    Mutant(
        "rotation backwards",
        "decoder",
        "decoder.rotary_sin",
        _tensor("decoder.rotary_sin", _times(-1.0)),
    ),
    Mutant(
        "interleaved rotation",
        "decoder",
        "decoder.layers.0",
        _attribute("decoder", ("GroupQueryAttention",), "rotary_interleaved", 1, 0),
    ),
    Mutant(
        "down_proj x 0.8",
        "decoder",
        f"{LAYER}.mlp.down_proj",
        _scaled(f"{LAYER}.mlp.down_proj.weight", 0.8),
    ),
    Mutant("up_proj x 1.1", "decoder", f"{LAYER}.mlp", _scaled(f"{LAYER}.mlp.up_proj.weight", 1.1)),
    Mutant(
        "a head zeroed",
        "decoder",
        f"{LAYER}.self_attn.o_proj",
        _first_rows_zero(_head_rows, f"{LAYER}.self_attn.o_proj.weight"),
    ),
    Mutant(
        "gate and up exchanged",
        "decoder",
        "decoder.layers.0",
        _swap_outputs("decoder", "Split", 0, (0, 1)),
    ),
    Mutant(
        "another layer's keys",
        "decoder",
        f"{LAYER}.self_attn.k_proj",
        _copied_layer("self_attn.k_proj.weight"),
    ),
    Mutant(
        "another layer's down_proj",
        "decoder",
        f"{LAYER}.mlp.down_proj",
        _copied_layer("mlp.down_proj.weight"),
    ),
    Mutant(
        "value heads reversed",
        "decoder",
        f"{LAYER}.self_attn.v_proj",
        _reversed_columns(f"{LAYER}.self_attn.v_proj.weight"),
    ),
    Mutant(
        "norm weight x 1.1",
        "decoder",
        LAYER,
        _tensor(f"{LAYER}.input_layernorm.weight", _times(1.1)),
    ),
    Mutant(
        "head scales 10 % at random",
        "decoder",
        "decoder.lm_head",
        lambda edit: edit.weight("decoder.lm_head.weight", _random_scales),
    ),
    Mutant(
        "head's last words zero",
        "decoder",
        "decoder.lm_head",
        _levels(
            "decoder.lm_head.weight", lambda a: np.concatenate([a[:, :-32], a[:, -32:] * 0], axis=1)
        ),
    ),
    Mutant(
        "MLP gate x 1.1",
        "decoder",
        "decoder.layers.0",
        _scale_result("decoder", lambda node: node.op_type == "Sigmoid", 1.1),
    ),
    Mutant(
        "one level at the other end",
        "packing",
        f"{LAYER}.mlp.down_proj",
        lambda edit: edit.weight(f"{LAYER}.mlp.down_proj.weight", _one_level),
    ),
    Mutant(
        "block scales shifted",
        "packing",
        f"{LAYER}.mlp.down_proj",
        lambda edit: edit.weight(f"{LAYER}.mlp.down_proj.weight", _shift_blocks),
    ),
    Mutant(
        "nibbles exchanged",
        "packing",
        f"{LAYER}.self_attn.o_proj",
        _swap_nibbles(f"{LAYER}.self_attn.o_proj.weight"),
    ),
    Mutant("zero points 8", "packing", LAYER, _zero_points),
    Mutant(
        "zero point 127 for 128",
        "packing",
        "",
        _constant("vision", "zero_point.128", lambda a: a - 1),
    ),
    Mutant(
        "truncated levels",
        "packing",
        "",
        _constant("vision", "levels.offset", lambda a: a - np.float32(0.5)),
    ),
    Mutant(
        "levels over 128",
        "packing",
        "",
        _constant("vision", "levels.inverse", lambda a: a * np.float32(127 / 128)),
    ),
    Mutant(
        "static range halved", "packing", "", _named("vision", ".input_scale", lambda a: a * 0.5)
    ),
    Mutant(
        "decoder's static range halved",
        "packing",
        "decoder",
        _named("decoder", ".input_scale", lambda a: a * 0.5),
    ),
    Mutant(
        "static zero point moved",
        "packing",
        "decoder",
        _named("decoder", ".input_zero", lambda a: a - min(9, int(a)) if int(a) > 9 else a + 9),
    ),
    Mutant(
        "key scales x 0.25",
        "KV cache",
        "keys",
        _named("decoder", ".keys_scale", lambda a: a * np.float32(0.25)),
    ),
    Mutant(
        "value scales x 0.25",
        "KV cache",
        "values",
        _named("decoder", ".values_scale", lambda a: a * np.float32(0.25)),
    ),
    Mutant("late rows reversed", "token table", "embeddings.npy", _table(_reverse_late_rows)),
    Mutant("one row zero", "token table", "embeddings.npy: row 300", _table(_one_row)),
    Mutant("all rows x 1.01", "token table", "embeddings.npy", _table(lambda a: a * 1.01)),
    Mutant("two words exchanged", "tokenizer", "tokenizer.json", _swap_tokens),
    Mutant(
        "padding for stretching", "preprocessing", "manifest.json", _spec(("image_mode",), "pad")
    ),
    Mutant("another end token", "tokenizer", "manifest.json", _spec(("eos_id",), 5)),
    Mutant(
        "another preferred pooling",
        "preprocessing",
        "manifest.json",
        _spec(("pool_sizes",), lambda a: a[::-1]),
    ),
    Mutant("rows declared independent", "speculation", "manifest.json", _independent),
    Mutant("a golden result x 1.05", "goldens", "goldens", _goldens),
)


def _broken_start(patch: pytest.MonkeyPatch) -> None:
    """Calls of several rows begin at row 0."""
    feed = OrtEngine._feed

    def wrong(self: OrtEngine, call: Any, embeds: Array, start: int) -> Array:
        return feed(self, call, embeds, 0 if embeds.shape[1] > 1 else start)

    patch.setattr(OrtEngine, "_feed", wrong)


def _broken_verify(patch: pytest.MonkeyPatch) -> None:
    verify = OrtEngine.verify
    patch.setattr(
        OrtEngine, "verify", lambda self, embeds, start: verify(self, embeds, start)[::-1]
    )


def _broken_batch_starts(patch: pytest.MonkeyPatch) -> None:
    step = OrtBatch.step
    patch.setattr(
        OrtBatch,
        "step",
        lambda self, embeds, starts: step(self, embeds, np.full_like(starts, starts.max())),
    )


def _broken_copy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OrtBatch, "copy", lambda self, sources, start, end: None)


def _broken_fill(patch: pytest.MonkeyPatch) -> None:
    fill = OrtBatch.fill
    patch.setattr(OrtBatch, "fill", lambda self, slot, rows: fill(self, slot, rows - 1))


def _reused_prefix(patch: pytest.MonkeyPatch) -> None:
    """The image's rows are reused for any image."""
    patch.setattr(
        PrefixCache,
        "_reusable",
        lambda self, segments: min(len(segments) - 1, len(self._held)),
    )


def _shared_embeddings(patch: pytest.MonkeyPatch) -> None:
    """The image cache returns the first image's embeddings for every image."""
    get = ImageEmbeddingCache.get
    held: list[Any] = []

    def wrong(self: ImageEmbeddingCache, digest: str, p: int) -> Any:
        found = get(self, digest, p)
        if found is not None:
            held.append(found)
        return held[0] if held else None

    patch.setattr(ImageEmbeddingCache, "get", wrong)


def _second_best(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("runtime.generation.runner.greedy", lambda logits: int(np.argsort(logits)[-2]))


def _drafts_accepted(patch: pytest.MonkeyPatch) -> None:
    """Every drafted token is accepted."""
    take = generate.Generation.take

    def wrong(self: Any) -> Any:
        rows = [row if isinstance(row, int) else np.array(row) for row in self._pending]
        for row, token in zip(rows, self.drafts, strict=False):
            if not isinstance(row, int):
                row[token] = row.max() + 1
        self._pending = rows
        return take(self)

    patch.setattr(generate.Generation, "take", wrong)


def _beams_last(patch: pytest.MonkeyPatch) -> None:
    """A beam search that keeps the worst of its candidates."""
    search = beam_search.beam_search

    def wrong(engine: Any, table: Any, logits: Array, *rest: Any, **named: Any) -> Any:
        return search(engine, table, -logits, *rest, **named)

    patch.setattr("runtime.generation.runner.beam_search", wrong)


def _other_prompt(patch: pytest.MonkeyPatch) -> None:
    task = replace(prompt.TASKS["vqa"], render=lambda text: prompt.Prompt("<image>", text))
    patch.setitem(prompt.TASKS, "vqa", task)


def _other_system(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(prompt, "CHAT_SYSTEM", prompt.CHAT_SYSTEM.replace("polite ", ""))


def _other_mean(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(image, "_LOOKUP", image._LOOKUP + np.float32(0.05))


def _other_filter(patch: pytest.MonkeyPatch) -> None:
    square = image.to_square

    def wrong(picture: Image.Image, spec: Any) -> Image.Image:
        size = spec.vision.image_size
        if picture.size == (size, size):
            return square(picture, spec)
        return picture.resize((size, size), Image.Resampling.NEAREST)

    patch.setattr(image, "to_square", wrong)


def _turned_pooling(patch: pytest.MonkeyPatch) -> None:
    pool = constants.pool_matrix

    def wrong(s: int, p: int) -> Array:
        return pool(s, p).reshape(p, p, s * s).transpose(1, 0, 2).reshape(p * p, s * s)

    for module in (constants, request, calls):
        patch.setattr(module, "pool_matrix", wrong)


RUNTIME_MUTANTS: tuple[RuntimeMutant, ...] = (
    RuntimeMutant("segments begin at row 0", "KV cache", _broken_start),
    RuntimeMutant("rows of drafts reversed", "speculation", _broken_verify),
    RuntimeMutant("all drafts accepted", "speculation", _drafts_accepted),
    RuntimeMutant("sequences share a position", "batching", _broken_batch_starts),
    RuntimeMutant("beams keep their rows", "beams", _broken_copy),
    RuntimeMutant("beams keep the worst", "beams", _beams_last),
    RuntimeMutant("a slot lacks its last row", "batching", _broken_fill),
    RuntimeMutant("any prefix is reused", "KV cache", _reused_prefix),
    RuntimeMutant("images share embeddings", "KV cache", _shared_embeddings),
    RuntimeMutant("the second best token", "decoding", _second_best),
    RuntimeMutant("the vqa prompt without its words", "prompt", _other_prompt),
    RuntimeMutant("another system text", "prompt", _other_system),
    RuntimeMutant("another mean colour", "preprocessing", _other_mean),
    RuntimeMutant("nearest-pixel resizing", "preprocessing", _other_filter),
    RuntimeMutant("cells of the pooling turned", "preprocessing", _turned_pooling),
)
