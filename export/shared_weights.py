"""Lets several graphs share one weight file: a second graph refers to the tensors that
the first one stored.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

__all__ = ["refer_to"]

_SMALL = 4096  # bytes of the largest tensor that a graph may store itself


def refer_to(graph: ir.Model, stored: Path) -> int:
    """Replaces a graph's tensors with references to the tensors of the same name in the
    saved graph `stored`. Returns the number of bytes that are not stored twice.

    Every tensor above a few kilobytes must exist there, with the same type and shape.
    It does, because both graphs come from the same passes.
    """
    there = {name: value.const_value for name, value in ir.load(stored).graph.initializers.items()}
    saved = 0
    for name, value in graph.graph.initializers.items():
        known, own = there.get(name), value.const_value
        assert own is not None, "initializers hold tensors"
        if isinstance(known, ir.ExternalTensor):
            assert (known.dtype, known.shape) == (own.dtype, own.shape), (
                f"{name} differs between graphs that share weights"
            )
            value.const_value = known
            saved += known.nbytes
        else:
            assert own.nbytes <= _SMALL, f"{name} of {own.nbytes} bytes is in no weight file"
    return saved
