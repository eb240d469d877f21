"""Changes that one mutant alone makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from tests.mutants.changes import (
    Array,
    Changed,
    changed_attribute,
    changed_constant,
    head_width,
    multiplied,
)
from tests.mutants.edit import Edit

__all__ = [
    "changed_goldens",
    "changed_named",
    "copied_layer",
    "declared_independent",
    "gelu",
    "head_rows",
    "is_pool",
    "one_channel",
    "one_level",
    "random_scales",
    "reversed_columns",
    "shift_blocks",
    "shift_patches",
    "swap_nibbles",
    "vision_head_rows",
    "zero_points",
]

TOWER, ADAPTER, LAYER = "vision_tower.blocks.1", "pool_adapter", "decoder.layers.1"


def copied_layer(weight: str) -> Callable[[Edit], bool]:
    """Stores layer 0's weight in layer 1 too."""

    def apply(edit: Edit) -> bool:
        kept: list[tuple[Array, Array]] = []

        def read(levels: Array, scale: Array) -> tuple[Array, Array]:
            kept.append((levels.copy(), scale.copy()))
            return levels, scale

        edit.weight(f"decoder.layers.0.{weight}", read)
        return edit.weight(f"decoder.layers.1.{weight}", lambda levels, scale: kept[0])

    return apply


def head_rows(edit: Edit) -> int:
    return edit.spec.decoder.head_dim


def vision_head_rows(edit: Edit) -> int:
    return head_width(edit, "vision")


def random_scales(levels: Array, scale: Array) -> tuple[Array, Array]:
    rng = np.random.default_rng(3)
    return levels, scale * rng.uniform(0.9, 1.1, (1, scale.shape[1])).astype(np.float32)


def one_channel(levels: Array, scale: Array) -> tuple[Array, Array]:
    scale[:, 3] *= 1.1
    return levels, scale


def one_level(levels: Array, scale: Array) -> tuple[Array, Array]:
    """Moves the largest level to the other end of the range."""
    place = np.unravel_index(np.abs(levels).argmax(), levels.shape)
    levels[place] = levels.min() if levels[place] > 0 else levels.max()
    return levels, scale


def shift_blocks(levels: Array, scale: Array) -> tuple[Array, Array]:
    return levels, np.roll(scale, 1, axis=0)


def swap_nibbles(name: str) -> Callable[[Edit], bool]:
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


def zero_points(edit: Edit) -> bool:
    def change(model: ir.Model) -> bool:
        for stored, value in model.graph.initializers.items():
            if stored.endswith(".zero") and value.const_value is not None and LAYER in stored:
                value.const_value = ir.tensor(
                    np.full_like(value.const_value.numpy(), 0x88), name=stored
                )
                return True
        return False

    return edit.decoder(change)


def changed_named(
    part: str, ending: str, change: Callable[[Array], Array]
) -> Callable[[Edit], bool]:
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


def gelu(edit: Edit) -> Changed:
    named = changed_attribute("vision", ("Gelu",), "approximate", "tanh", 1)
    if named(edit):
        return True
    return (
        "vision_tower.blocks.0"
        if changed_constant("vision", "gelu.root", multiplied(0.97))(edit)
        else False
    )


def shift_patches(edit: Edit) -> bool:
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


def is_pool(node: ir.Node) -> bool:
    names = [str(x.name) for x in node.inputs if x is not None]
    return node.op_type == "MatMul" and any(
        name == "pool" or (name.startswith("val") and "slice" in " ".join(names)) for name in names
    )


def declared_independent(edit: Edit) -> bool:
    def change(data: dict[str, Any]) -> None:
        data["schemes"]["row_independent"] = "true"

    import json

    known = json.loads((edit.folder / "manifest.json").read_text())["schemes"]
    if known.get("row_independent") == "true":
        return False
    return edit.manifest(change)


def changed_goldens(edit: Edit) -> bool:
    path = edit.folder / "goldens.npz"
    with np.load(path) as data:
        arrays = {name: data[name] for name in data.files}
    arrays["0.prefill"] = arrays["0.prefill"] * np.float32(1.05)
    np.savez(path, **arrays)
    return True


def reversed_columns(name: str) -> Callable[[Edit], bool]:
    return lambda edit: edit.weight(name, lambda levels, scale: (levels[:, ::-1], scale[:, ::-1]))
