"""`infmllm-export inspect`: what a bundle holds, read from its manifest and graphs, as text or JSON."""

from __future__ import annotations

from collections import Counter
from typing import Any

import onnx_ir as ir

from runtime.contract.bundle import DECODER, VISION, Bundle

__all__ = ["describe_bundle", "format_description"]


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """Verdict, schemes, bytes per file, and per graph: operators, parameters and bytes by storage type."""
    graphs = {name: _describe_graph(ir.load(bundle.path / name)) for name in (VISION, DECODER)}
    return {
        "path": str(bundle.path),
        "model": bundle.spec.to_json(),
        "target": bundle.target,
        "verdict": bundle.verdict,
        "parity": dict(bundle.parity),
        "schemes": dict(bundle.schemes),
        "files": {name: size for name, (size, _) in bundle.files.items()},
        "bytes": sum(size for size, _ in bundle.files.values()),
        "graphs": graphs,
        "provenance": dict(bundle.provenance),
    }


def _describe_graph(model: ir.Model) -> dict[str, Any]:
    operators = Counter(node.op_type for node in model.graph.all_nodes())
    storage: dict[str, dict[str, int]] = {}
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            row = storage.setdefault(value.const_value.dtype.name.lower(), {"parameters": 0, "bytes": 0})
            row["parameters"] += value.const_value.size
            row["bytes"] += value.const_value.nbytes
    blocks: Counter[str] = Counter()
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            blocks[_block(name)] += value.const_value.nbytes
    return {"nodes": sum(operators.values()), "operators": dict(operators.most_common()), "storage": storage, "bytes_per_block": dict(blocks)}


def _block(name: str) -> str:
    """The block a parameter belongs to: "decoder.layers.3", "vision_tower.blocks.0", else its module."""
    parts = name.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdigit() and i > 1), None)
    return ".".join(parts[: numbered + 1]) if numbered else ".".join(parts[:2]) if len(parts) > 2 else "constants"


def format_description(data: dict[str, Any]) -> str:
    """The description as text for a terminal."""
    model = data["model"]
    lines = [
        f"{data['path']}: {model['name']} for {data['target']}, {data['bytes'] / 1e6:.1f} MB, {data['verdict']}",
        "schemes: " + ", ".join(f"{part} {scheme}" for part, scheme in data["schemes"].items()),
        "visual tokens: " + ", ".join(str(p * p) for p in model["pool_sizes"]),
    ]
    for stage in data["parity"].get("stages", []):
        lines.append(f"parity {stage['stage']}: {stage['error']:.3g} (allowed {stage['tolerance']:.3g})")
    for name, size in data["files"].items():
        lines.append(f"  {name:20} {size:>12,} bytes")
    for name, graph in data["graphs"].items():
        storage = ", ".join(f"{kind} {row['parameters']:,} ({row['bytes'] / 1e6:.2f} MB)" for kind, row in graph["storage"].items())
        lines += [f"{name}: {graph['nodes']} nodes; {storage}", "  " + ", ".join(f"{op} {count}" for op, count in graph["operators"].items())]
    refused = [reason for row in data["provenance"].get("passes", []) for reason in row["refused"]]
    return "\n".join([*lines, *(f"refused: {reason}" for reason in refused)])
