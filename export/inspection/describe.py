"""Describes a bundle for `infmllm-export inspect`: reads its manifest and graphs, and
returns data or text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir

from export.passes.pack_projections import parts_of
from runtime.contract.bundle import Bundle

__all__ = ["describe_bundle", "format_description"]

_SUFFIXES = (".int8", ".int4", ".fp16")


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """Returns a bundle's verdict, schemes and bytes per file. For each graph, returns
    its operators, parameters and bytes by storage type, and how the layers of each
    block are stored.
    """
    return {
        "path": str(bundle.path),
        "model": bundle.spec.to_json(),
        "target": bundle.target,
        "verdict": bundle.verdict,
        "verdict_text": bundle.verdict_text,
        "parity": dict(bundle.parity),
        "schemes": dict(bundle.schemes),
        "files": {name: size for name, (size, _) in bundle.files.items()},
        "bytes": sum(size for size, _ in bundle.files.values()),
        "graphs": {name: _describe_graph(ir.load(bundle.path / name)) for name in bundle.graphs},
        "provenance": dict(bundle.provenance),
    }


def _describe_graph(model: ir.Model) -> dict[str, Any]:
    operators = Counter(node.op_type for node in model.graph.all_nodes())
    storage: dict[str, dict[str, int]] = {}
    blocks: dict[str, dict[str, Any]] = {}
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            continue
        row = storage.setdefault(
            value.const_value.dtype.name.lower(), {"parameters": 0, "bytes": 0}
        )
        row["parameters"] += value.const_value.size
        row["bytes"] += value.const_value.nbytes
        block = blocks.setdefault(_block(name), {"bytes": 0, "layers": {}})
        block["bytes"] += value.const_value.nbytes
    for node in model.graph:
        if layer := _layer(node):
            names, how = layer
            for name in parts_of(names):
                blocks.setdefault(_block(name), {"bytes": 0, "layers": {}})["layers"][name] = how
    return {
        "nodes": sum(operators.values()),
        "operators": dict(operators.most_common()),
        "storage": storage,
        "blocks": blocks,
    }


def _layer(node: ir.Node) -> tuple[str, str] | None:
    """Returns a linear layer's parameter name and how it is computed: "int4/32", "int8
    x int8", "fp16", "fp32". Returns None for other nodes.
    """
    if node.op_type not in ("MatMul", "MatMulInteger", "MatMulNBits") or node.inputs[1] is None:
        return None
    weight: ir.Value | None = node.inputs[1]
    producer = weight.producer() if weight is not None else None
    if producer is not None and producer.op_type in ("Cast", "DequantizeLinear"):
        weight = producer.inputs[0]
    if (
        weight is None
        or weight.name is None
        or (not weight.name.removesuffix("weight").endswith(".") and ".weight" not in weight.name)
    ):
        return None
    name = weight.name
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    if node.op_type == "MatMulNBits":
        return (
            name,
            f"int{node.attributes['bits'].as_int()}/{node.attributes['block_size'].as_int()}",
        )
    if node.op_type == "MatMulInteger":
        return name, "int8 x int8"
    if producer is not None and producer.op_type == "DequantizeLinear":
        return name, _describe_dequantised(node, producer)
    return name, "fp32" if weight.dtype == ir.DataType.FLOAT else "fp16"


def _describe_dequantised(product: ir.Node, weight: ir.Node) -> str:
    """Returns how a product with a dequantised weight is computed: "int8 x int8
    static", "int8", "int4/128".
    """
    dtype = weight.inputs[0].dtype  # type: ignore[union-attr]
    bits, block = (
        (dtype or ir.DataType.INT8).name.lower(),
        weight.attributes.get_int("block_size", 0),
    )
    x = product.inputs[0].producer() if product.inputs[0] is not None else None
    if x is not None and x.op_type == "DequantizeLinear":
        return f"{bits} x {bits} static"
    return f"{bits}/{block}" if block else bits


def _block(name: str) -> str:
    """Returns the block that a parameter belongs to: "decoder.layers.3",
    "vision_tower.blocks.0", or else its module.
    """
    parts = name.split(".")
    if parts[0] not in ("vision_tower", "pool_adapter", "decoder"):
        return "constants"
    numbered = next((i for i, part in enumerate(parts) if part.isdigit() and i > 1), None)
    return (
        ".".join(parts[: numbered + 1])
        if numbered
        else ".".join(parts[:2])
        if len(parts) > 2
        else "constants"
    )


def _describe_parity(parity: Mapping[str, Any]) -> Iterator[str]:
    checks: dict[str, bool] = {}
    for row in parity.get("proof", []):
        checks[row["check"]] = checks.get(row["check"], True) and row["passed"]
    if checks:
        yield "proof: " + ", ".join(
            f"{name} {'ok' if passed else 'FAILED'}" for name, passed in checks.items()
        )
    for stage in parity.get("stages", []):
        yield f"parity {stage['stage']}: {stage['error']:.3g} (allowed {stage['tolerance']:.3g})"
    metrics = parity.get("metrics", {})
    for task, row in metrics.get("tasks", {}).items():
        low, high = row.get("interval", (0.0, 100.0))
        yield (
            f"answers {task}: {row['bundle']:.1f} % (95 % interval {low:.0f} to {high:.0f}), "
            f"PyTorch {row['pytorch']:.1f} % ({metrics['count']} questions in all)"
        )
    if metrics.get("weakness"):
        yield f"warning: {metrics['weakness']}"


def format_description(data: dict[str, Any]) -> str:
    """Formats the description as text for a terminal."""
    model = data["model"]
    lines = [
        f"{data['path']}: {model['name']} for {data['target']}, {data['bytes'] / 1e6:.1f} MB, "
        f"{data['verdict_text']}",
        "schemes: " + ", ".join(f"{part} {scheme}" for part, scheme in data["schemes"].items()),
        "visual tokens: " + ", ".join(str(p * p) for p in model["pool_sizes"]),
    ]
    lines += _describe_parity(data["parity"])
    for name, size in data["files"].items():
        lines.append(f"  {name:20} {size:>12,} bytes")
    for name, graph in data["graphs"].items():
        storage = ", ".join(
            f"{kind} {row['parameters']:,} ({row['bytes'] / 1e6:.2f} MB)"
            for kind, row in graph["storage"].items()
        )
        lines += [
            f"{name}: {graph['nodes']} nodes; {storage}",
            "  " + ", ".join(f"{op} {count}" for op, count in graph["operators"].items()),
        ]
        for block, row in graph["blocks"].items():
            kinds = ", ".join(
                f"{count} {how}" for how, count in Counter(row["layers"].values()).items()
            )
            lines.append(f"  {block:28} {row['bytes'] / 1e3:>10,.1f} kB  {kinds}")
    calibration = data["provenance"].get("calibration")
    if calibration:
        lines.append(
            f"calibrated with {calibration['count']} images of {calibration['source']}, sha256 "
            f"{calibration['sha256'][:12]}…"
        )
    refused = [reason for row in data["provenance"].get("passes", []) for reason in row["refused"]]
    return "\n".join([*lines, *(f"not applied: {reason}" for reason in refused)])
