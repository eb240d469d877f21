"""Edits finished bundles: changes a graph, a stored weight or a file, and makes the
manifest's sizes and hashes good again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.parity.float_view import float_view
from export.parity.stored_weights import StoredWeight
from runtime.contract.bundle import MANIFEST
from runtime.contract.files import sha256_file
from runtime.contract.spec import ModelSpec

__all__ = ["Edit", "refresh"]

Array = NDArray[Any]


def refresh(folder: Path) -> None:
    """Makes the sizes and hashes of a changed bundle good."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for name in manifest["files"]:
        path = folder / name
        manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@dataclass(frozen=True)
class Edit:
    """One copy of a bundle under change. `vision_file` and `decoder_file` are the graphs
    of the form (plain or fused) that is changed.
    """

    folder: Path
    spec: ModelSpec
    vision_file: str = "vision.onnx"
    decoder_file: str = "decoder.onnx"

    def graph(self, file: str, change: Callable[[ir.Model], bool | None]) -> bool:
        """Changes a graph file. Returns False if `change` found nothing to change."""
        path = self.folder / file
        model = ir.load(path)
        if change(model) is False:
            return False
        for name, value in model.graph.initializers.items():
            if isinstance(value.const_value, ir.ExternalTensor):
                tensor = value.const_value
                value.const_value = ir.Tensor(
                    np.array(tensor.numpy()), dtype=tensor.dtype, shape=tensor.shape, name=name
                )
        path.write_bytes(ir.to_proto(model).SerializeToString())
        return True

    def vision(self, change: Callable[[ir.Model], bool | None]) -> bool:
        """Changes the vision graph."""
        return self.graph(self.vision_file, change)

    def decoder(self, change: Callable[[ir.Model], bool | None]) -> bool:
        """Changes the decoder graph."""
        return self.graph(self.decoder_file, change)

    def tensor(self, name: str, change: Callable[[Array], Array]) -> bool:
        """Changes a stored tensor that is not a weight of a product. False if the graph has
        none of that name.
        """

        def edit(model: ir.Model) -> bool:
            for stored in (name, f"{name}.fp16"):
                value = model.graph.initializers.get(stored)
                if value is not None and value.const_value is not None:
                    before = np.array(value.const_value.numpy())
                    after = np.asarray(change(before.astype(np.float32))).astype(before.dtype)
                    if np.array_equal(before, after):
                        return False
                    value.const_value = ir.tensor(after, name=stored)
                    return True
            return False

        return self.graph(self._file_of(name), edit)

    def weight(self, name: str, change: Callable[[Array, Array], tuple[Array, Array]]) -> bool:
        """Changes a linear weight. `change` gets levels [K, N] around zero and their scales
        [blocks, N] of one parameter; those of a float weight are its values and 1.
        """
        file = self._file_of(name)
        view = float_view(self.folder / file, self.spec)
        stored = next(w for w in view.weights.values() if name in w.name.split("+"))
        levels, scale, zero = (np.array(part, np.float32) for part in stored.read())
        columns = self._columns(stored, name)
        wide = zero if zero.ndim < 2 else _widen(zero, stored)
        part = levels - wide
        part_scale = scale if scale.ndim == 2 else np.ones((1, levels.shape[1]), np.float32)
        new, new_scale = change(part[:, columns].copy(), part_scale[:, columns].copy())
        part[:, columns], part_scale[:, columns] = new, new_scale
        return self.graph(file, lambda model: _store(model, stored, part + wide, part_scale))

    def _columns(self, stored: StoredWeight, name: str) -> slice:
        start = 0
        for part in stored.name.split("+"):
            width = self._width(part)
            if part == name:
                return slice(start, start + width)
            start += width
        raise AssertionError(name)

    def _width(self, name: str) -> int:
        decoder = self.spec.decoder
        if "k_proj" in name or "v_proj" in name:
            return decoder.kv_heads * decoder.head_dim
        if "gate_proj" in name or "up_proj" in name:
            return decoder.mlp_width
        if "q_proj" in name:
            return decoder.hidden
        return -1 if "+" in name else 1 << 30

    def _file_of(self, name: str) -> str:
        return self.decoder_file if name.startswith("decoder.") else self.vision_file

    def manifest(self, change: Callable[[dict[str, Any]], None]) -> bool:
        """Changes the manifest."""
        path = self.folder / MANIFEST
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
        return True

    def nodes(self, model: ir.Model, *kinds: str) -> Iterator[ir.Node]:
        """Yields the nodes of these operators."""
        return (node for node in list(model.graph) if node.op_type in kinds)


def _widen(values: Array, stored: StoredWeight) -> Array:
    if not stored.block:
        return values
    wide: Array = np.repeat(values, stored.block, axis=0)[: stored.shape[0]]
    return wide


def _store(model: ir.Model, stored: StoredWeight, levels: Array, scale: Array) -> bool:
    """Writes levels and scales back in the graph's form. False if nothing changed."""
    known = model.graph.initializers
    changed = False

    def put(name: str, array: Array, dtype: ir.DataType | None = None) -> None:
        nonlocal changed
        value = known[name]
        assert value.const_value is not None
        before = value.const_value.numpy()
        array = array.astype(before.dtype).reshape(before.shape)
        if np.array_equal(before, array):
            return
        kind = dtype or value.const_value.dtype
        value.const_value = ir.Tensor(array, dtype=kind, shape=ir.Shape(array.shape), name=name)
        changed = True

    name = stored.name
    if stored.kind in ("fp32", "fp16"):
        whole = levels * scale
        put(f"{name}.fp16" if f"{name}.fp16" in known else name, whole)
        return changed
    levels = np.clip(levels, 0, 15) if stored.kind == "int4" else levels
    scales = f"{name}.scale.fp16" if f"{name}.scale.fp16" in known else f"{name}.scale"
    key = f"{name}.{stored.kind}"
    packed = known[key].const_value
    assert packed is not None
    if packed.dtype == ir.DataType.UINT8:
        bits, (k, n) = (4 if stored.kind == "int4" else 8), stored.shape
        blocks = -(-k // stored.block)
        padded: Array = np.zeros((n, blocks * stored.block), np.uint8)
        padded[:, :k] = levels.T
        if bits == 4:
            padded = padded[:, ::2] | (padded[:, 1::2] << 4)
        before = packed.numpy().reshape(n, -1)
        # Padding behind the last input keeps its value.
        if k % stored.block == 0 or not np.array_equal(before, padded):
            put(key, padded)
        put(scales, scale.T)
    elif stored.kind == "int4":
        put(key, levels - 8)
        put(scales, scale)
    else:
        put(key, levels)
        put(scales, scale)
    return changed
