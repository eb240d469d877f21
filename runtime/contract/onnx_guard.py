"""Finds an ONNX file's references to external data before any ONNX parser reads the
file.

Only the protobuf framing is read. Tensors are found wherever they can be nested
(initializers, attributes, subgraphs, functions), and the locations of their external
data are returned. The runtime needs no ONNX package for this.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from runtime.contract.errors import BundleError

__all__ = ["external_locations"]

# Field numbers in onnx.proto on the way to tensors: message -> {field: type of its content}.
_FIELDS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor",
        6: "Graph",
        10: "Tensor",
        11: "Graph",
        22: "SparseTensor",
        23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
_MAX_DEPTH = 40
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def external_locations(path: Path) -> set[str]:
    """Returns the `location` of every tensor stored outside `path`. Raises
    `BundleError` if the file is not well-formed protobuf.
    """
    if path.stat().st_size == 0:
        raise BundleError(f"{path} is empty; re-export the bundle")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return set(_locations(data, 0, len(data), "Model", 0))
        except (ValueError, IndexError, UnicodeDecodeError) as error:
            raise BundleError(
                f"{path} is not a readable ONNX file ({error}); re-export the bundle"
            ) from None


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= end or shift > 63:
            raise ValueError("truncated number")
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields (field number, start, end) of every length-delimited field and skips
    others.
    """
    while at < end:
        key, at = _varint(data, at, end)
        if key >= 1 << 32 or key < 8:  # parsers disagree on such tags, so they are refused
            raise ValueError("malformed tag")
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            _, at = _varint(data, at, end)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        elif kind == _BYTES:
            size, at = _varint(data, at, end)
            if at + size > end:
                raise ValueError("field runs past the end")
            yield number, at, at + size
            at += size
        else:
            raise ValueError(f"unknown wire type {kind}")
    if at != end:
        raise ValueError("truncated field")


def _locations(data: mmap.mmap, at: int, end: int, message: str, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    if message == "Entry":
        entry = {number: data[start:stop] for number, start, stop in _fields(data, at, end)}
        if entry.get(1) == b"location":
            yield entry.get(2, b"").decode("utf-8")
        return
    for number, start, stop in _fields(data, at, end):
        inner = _FIELDS[message].get(number)
        if inner:
            yield from _locations(data, start, stop, inner, depth + 1)
