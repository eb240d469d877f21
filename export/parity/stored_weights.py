"""Reads the linear weights that a packed graph stores, in every form that this toolchain
writes: 8-bit levels, packed blocks of 4 or 8 bits, half precision.

The decoders here are written from the operators' specifications, and share no code with
the passes that pack the weights. So a fault of the packing is not repeated here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["StoredWeight", "UnknownFormError", "read_block_weight", "read_channel_weight"]

Array = NDArray[np.float32]


class UnknownFormError(Exception):
    """A graph stores or uses a weight in a form that this toolchain does not write. The
    message names the place.
    """


@dataclass(frozen=True)
class StoredWeight:
    """A linear weight as a graph stores it.

    Attributes:
        name: The parameters' names, joined by "+" if several are packed into one product.
        kind: "fp32", "fp16", "int8" or "int4".
        shape: [K, N], inputs and outputs.
        activation: How the graph rounds the input: "float", "block" (the kernel may round
            blocks of a row to 8 bits), or one of `calibration.linear.LinearScheme`.
        block: How many inputs share a scale; 0 if all do.
        read: Computes (levels [K, N], scale [blocks, N], zero [blocks, N]). Float weights
            are their own levels, with scale 1 and zero 0.
        symmetric: True if the kernel has no zero points.
        static: The stored (scale, zero point) of statically quantised input.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    activation: str
    block: int
    read: Callable[[], tuple[Array, Array, Array]] = field(repr=False)
    symmetric: bool = True
    static: tuple[float, int] | None = None

    def decoded(self) -> Array:
        """Returns the weight [K, N] that the kernel multiplies by, as float32."""
        levels, scale, zero = self.read()
        if not self.block:
            return (levels - zero) * scale
        k = self.shape[0]
        wide = [np.repeat(part, self.block, axis=0)[:k] for part in (scale, zero)]
        return np.asarray((levels - wide[1]) * wide[0], np.float32)


def _numpy(value: ir.Value | None, where: str) -> NDArray[np.generic]:
    if value is None or value.const_value is None:
        raise UnknownFormError(f"{where} is not stored in the graph")
    return value.const_value.numpy()


def read_channel_weight(
    levels: ir.Value | None, scale: ir.Value | None, where: str
) -> tuple[str, tuple[int, int], Callable[[], tuple[Array, Array, Array]]]:
    """Returns (parameter name, shape, reader) of 8-bit levels [K, N] with one scale per
    output channel [N].
    """
    assert levels is not None and levels.const_value is not None
    shape = tuple(int(side) for side in levels.const_value.shape.numpy())
    if levels.const_value.dtype != ir.DataType.INT8 or len(shape) != 2:
        raise UnknownFormError(f"{where}: levels are {levels.const_value.dtype} {list(shape)}")

    def read() -> tuple[Array, Array, Array]:
        scales = np.asarray(_numpy(scale, where), np.float32).reshape(1, -1)
        if scales.shape[1] != shape[1]:
            raise UnknownFormError(f"{where}: {scales.shape[1]} scales for {shape[1]} channels")
        found = np.asarray(_numpy(levels, where), np.float32)
        return found, scales, np.zeros_like(scales)

    return parameter_name(levels, ".int8"), (shape[0], shape[1]), read


def read_block_weight(
    node: ir.Node, where: str
) -> tuple[str, str, tuple[int, int], int, Callable[[], tuple[Array, Array, Array]]]:
    """Returns (parameter name, kind, shape, block, reader) of a MatMulNBits node.

    Levels are packed per output channel and block, the earlier of two 4-bit levels in the
    low half of a byte. Without zero points, the middle of the range means zero.
    """
    number = {name: node.attributes[name].as_int() for name in ("K", "N", "bits", "block_size")}
    k, n, bits, block = number["K"], number["N"], number["bits"], number["block_size"]
    if bits not in (4, 8) or len([value for value in node.inputs if value is not None]) > 4:
        raise UnknownFormError(f"{where}: MatMulNBits with {bits} bits and other inputs")
    packed, scale, zero = (*node.inputs, None)[1:4]
    assert packed is not None
    blocks = -(-k // block)

    def unpack(values: NDArray[np.uint8], columns: int) -> Array:
        if bits == 8:
            return values.reshape(n, -1)[:, :columns].astype(np.float32)
        pairs = np.stack([values & 15, values >> 4], axis=-1)
        return pairs.reshape(n, -1)[:, :columns].astype(np.float32)

    def read() -> tuple[Array, Array, Array]:
        stored = _numpy(packed, where)
        if stored.dtype != np.uint8 or stored.shape != (n, blocks, block * bits // 8):
            raise UnknownFormError(f"{where}: levels are {stored.dtype} {list(stored.shape)}")
        levels = unpack(stored, k)  # type: ignore[arg-type]
        scales = np.asarray(_numpy(scale, where), np.float32).reshape(n, blocks)
        zeros = np.full_like(scales, 1 << (bits - 1))
        if zero is not None:
            zeros = unpack(_numpy(zero, where).reshape(n, -1), blocks)  # type: ignore[arg-type]
        return levels.T, scales.T, zeros.T

    kind = f"int{bits}"
    return parameter_name(packed, f".{kind}"), kind, (k, n), block, read


def parameter_name(value: ir.Value, suffix: str) -> str:
    """Returns the parameter's name without the suffix of its stored form. Raises
    `UnknownFormError` if the suffix is missing.
    """
    name = str(value.name)
    if not name.endswith(suffix):
        raise UnknownFormError(f"{name} is stored as {suffix[1:]} under another name")
    return name.removesuffix(suffix)
