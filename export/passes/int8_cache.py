"""Stores keys and values as 8-bit integers: a quarter of the cache's memory, and a
quarter of the cache bytes that a decode step reads.

Each head and channel has one symmetric scale. It comes from the largest magnitude seen
in calibration, with headroom. For keys this is the largest magnitude at any rotation,
since rotation depends on the position. Rows are rounded when they are written.
Attention computes in float over the dequantised rows.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from calibration.calibrate import Calibrated
from export.passes.contract import GraphPass, PassResult, initializer
from runtime.contract.errors import BuildError

__all__ = ["cache_scale", "int8_cache"]

_LEVELS = 127.0
_HEADROOM = 1.25  # images outside the calibration set reach slightly larger values
_FLOOR = 1e-6
_SCALES_AT = 12  # index of the first scale among GroupQueryAttention's inputs


def int8_cache(calibrated: Calibrated) -> GraphPass:
    """Returns the pass that gives every GroupQueryAttention 8-bit caches with
    calibrated scales.
    """

    def run(model: ir.Model) -> PassResult:
        modified = 0
        for node in model.graph:
            if node.op_type != "GroupQueryAttention" or len(node.inputs) > _SCALES_AT:
                continue
            cache = node.inputs[3]
            assert cache is not None and cache.name is not None
            layer = f"decoder.layers.{cache.name.rpartition('.')[2]}"
            scales = [
                initializer(model, f"{layer}.{kind}_scale", cache_scale(calibrated, layer, kind))
                for kind in ("keys", "values")
            ]
            node.resize_inputs(_SCALES_AT + 2)
            for offset, scale in enumerate(scales):
                node.replace_input_with(_SCALES_AT + offset, scale)
            for attribute in ("k_quant_type", "v_quant_type"):
                node.attributes[attribute] = ir.AttrString(attribute, "PER_CHANNEL")
            node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", 8)
            for value in (*node.inputs[3:5], *node.outputs[1:3]):
                assert value is not None
                value.type = ir.TensorType(ir.DataType.INT8)
            modified += 1
        return PassResult(modified)

    return GraphPass("int8_cache", run, requires=frozenset({"com.microsoft::GroupQueryAttention"}))


def cache_scale(calibrated: Calibrated, layer: str, kind: str) -> NDArray[np.float32]:
    """Returns the scales of a layer's keys or values [KV heads * D]."""
    peaks = calibrated.get(f"{layer}|{kind}")
    if peaks is None:
        raise BuildError(f"{layer} has no calibrated {kind}; build with --calib DATA")
    return np.maximum(peaks * (_HEADROOM / _LEVELS), _FLOOR).astype(np.float32).reshape(-1)
