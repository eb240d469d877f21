"""Kinds of changes of a finished bundle, from which the table of mutants is made. Each
function returns a change, or is one. A change returns False where it does not apply.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from tests.mutants.edit import Edit

__all__ = [
    "Array",
    "Changed",
    "attention_scale",
    "attention_window",
    "changed_attribute",
    "changed_constant",
    "changed_levels",
    "changed_spec",
    "changed_table",
    "changed_tensor",
    "drop_input",
    "epsilon",
    "first_rows_zero",
    "freeze",
    "head_width",
    "late_row",
    "late_rows",
    "multiplied",
    "one_row",
    "reverse_late_rows",
    "scale_result",
    "scaled_weight",
    "swap_outputs",
    "swap_tokens",
    "zeros",
]

Array = NDArray[Any]
Changed = bool | str
"""Whether a bundle was changed, or the place where that shows first."""
_FROZEN = 0.7  # share of the context from which late faults begin


def multiplied(factor: float) -> Callable[[Array], Array]:
    return lambda array: array * np.float32(factor)


def zeros(array: Array) -> Array:
    return np.zeros_like(array)


def scaled_weight(name: str, factor: float) -> Callable[[Edit], bool]:
    return lambda edit: edit.weight(name, lambda levels, scale: (levels, scale * factor))


def changed_levels(name: str, change: Callable[[Array], Array]) -> Callable[[Edit], bool]:
    return lambda edit: edit.weight(name, lambda levels, scale: (change(levels), scale))


def changed_tensor(name: str, change: Callable[[Array], Array]) -> Callable[[Edit], bool]:
    return lambda edit: edit.tensor(name, change)


def first_rows_zero(count: Callable[[Edit], int], name: str) -> Callable[[Edit], bool]:
    def change(edit: Edit) -> bool:
        def cut(levels: Array, scale: Array) -> tuple[Array, Array]:
            levels[: count(edit)] = 0
            return levels, scale

        return edit.weight(name, cut)

    return change


def changed_attribute(
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


def changed_constant(
    part: str, name: str, change: Callable[[Array], Array]
) -> Callable[[Edit], bool]:
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


def swap_outputs(part: str, kind: str, index: int, pair: tuple[int, int]) -> Callable[[Edit], bool]:
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


def scale_result(
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


def attention_scale(part: str, factor: float) -> Callable[[Edit], bool]:
    """Changes the scale of attention, in whatever form the graph has it."""
    fused = changed_attribute(
        part,
        ("Attention", "MultiHeadAttention", "GroupQueryAttention"),
        "scale",
        lambda old, edit: factor * (old or (head_width(edit, part) ** -0.5)),
    )
    plain = changed_constant(part, "attention.scale", lambda array: array * factor)
    return lambda edit: plain(edit) or fused(edit)


def head_width(edit: Edit, part: str) -> int:
    vision = edit.spec.vision
    return vision.width // vision.heads if part == "vision" else edit.spec.decoder.head_dim


def epsilon(part: str, index: int, value: float) -> Callable[[Edit], Changed]:
    named = changed_attribute(
        part,
        ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"),
        "epsilon",
        value,
        index,
    )
    plain = changed_constant(part, "epsilon.1e-05", lambda array: np.full_like(array, value))
    first = "vision_tower.blocks.0" if part == "vision" else "decoder.layers.0"
    return lambda edit: named(edit) or (first if plain(edit) else False)


def late_row(edit: Edit) -> int:
    return int(_FROZEN * edit.spec.decoder.context)


def late_rows(name: str, change: Callable[[Array, int], None]) -> Callable[[Edit], bool]:
    def apply(edit: Edit) -> bool:
        def rows(table: Array) -> Array:
            table = table.copy()
            change(table, late_row(edit))
            return table

        return edit.tensor(name, rows)

    return apply


def freeze(table: Array, row: int) -> None:
    table[row:] = table[row - 1]


def attention_window(edit: Edit) -> bool:
    return changed_attribute(
        "decoder", ("GroupQueryAttention",), "local_window_size", late_row(edit)
    )(edit)


def changed_table(change: Callable[[Array], Array]) -> Callable[[Edit], bool]:
    def apply(edit: Edit) -> bool:
        path = edit.folder / "embeddings.npy"
        table = np.load(path)
        np.save(path, change(table.copy()).astype(table.dtype))
        return True

    return apply


def reverse_late_rows(table: Array) -> Array:
    table[200:] = table[200:][::-1]
    return table


def one_row(table: Array) -> Array:
    table[300] = 0
    return table


def swap_tokens(edit: Edit) -> bool:
    import json

    path = edit.folder / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(data))
    return True


def changed_spec(path: tuple[str, ...], value: Any) -> Callable[[Edit], bool]:
    def apply(edit: Edit) -> bool:
        def change(data: dict[str, Any]) -> None:
            place = data["spec"]
            for name in path[:-1]:
                place = place[name]
            place[path[-1]] = value(place[path[-1]]) if callable(value) else value

        return edit.manifest(change)

    return apply


def drop_input(part: str, name: str) -> Callable[[Edit], bool]:
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
