"""A program that compiles graphs of a `tensorrt` bundle with the runtime's own builder.
It prints the result of each graph as one line of JSON.

    engines.py FOLDER SPEC.json ROWS GRAPH...

The compiler's log names every layer of the finished engine with its input types. The
parsed network gives the inputs and outputs.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tensorrt as trt

from runtime.contract.errors import EngineError
from runtime.contract.spec import ModelSpec
from runtime.engines.tensorrt import build_engine as builder
from runtime.engines.tensorrt.graph_variants import decoder_variant, vision_variant

_LAYER = re.compile(
    r"Name: ([^,]+), LayerType: (\w+), Inputs: \[(.*?)\], Constants: \[(.*?)\], Outputs: \[",
    re.MULTILINE,
)
_TYPE = re.compile(r"Dimensions: \[([\d,-]*)\].*?Datatype: (\w+)")
_WORKSPACE = 4 << 30
_LARGE = 4096  # constants with at least this many elements count as weights


class Log(trt.ILogger):
    """A logger that keeps all messages."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        self.lines.append(message)
        # The compiler reports a missing GPU as an error and then continues.
        if (
            severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR)
            and "CUDA driver version" not in message
        ):
            self.errors.append(message)


def weights_read(layers: list[tuple[str, str, str, str]]) -> dict[str, Counter[str]]:
    """Returns for each profile how many kernels read which types, such as "Int8 x Int8"
    or "Half x Int4". "Int8 unpacked" counts kernels that first expand weights to full
    size in memory.
    """
    found: dict[str, Counter[str]] = {}
    for name, kind, inputs, constants in layers:
        profile = re.search(r"_myl(\d+)_\d+$", name)
        row = found.setdefault(profile[1] if profile else "0", Counter())
        weights = [dtype for shape, dtype in _TYPE.findall(constants) if _elements(shape) >= _LARGE]
        given = [dtype for _, dtype in _TYPE.findall(inputs)]
        if "_mha" in name:
            row["attention"] += 1
        elif weights and not given:
            row[f"{_narrowest(weights)} unpacked"] += 1
        elif (weights and kind in ("gemm", "runtime_fusion")) or _narrowest(weights) in (
            "Int4",
            "Int8",
        ):
            row[f"{_narrowest(given)} x {_narrowest(weights)}"] += 1
    return found


def _narrowest(types: list[str]) -> str:
    return (
        min(types, key=["Int4", "Int8", "Half", "Float"].index, default="")
        if set(types) <= {"Int4", "Int8", "Half", "Float"}
        else "other"
    )


def _elements(shape: str) -> int:
    count = 1
    for size in shape.split(","):
        count *= abs(int(size or 1))
    return count


def parsed(network: Any) -> dict[str, Any]:
    """Returns a summary of the network that the parser made of a graph."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    return {
        "layers": Counter(layer.type.name for layer in layers),
        "inputs": {
            t.name: [t.dtype.name, list(t.shape)]
            for t in map(network.get_input, range(network.num_inputs))
        },
        "outputs": {
            t.name: [t.dtype.name, list(t.shape)]
            for t in map(network.get_output, range(network.num_outputs))
        },
        "updates": {
            layer.get_output(0).name: layer.get_input(0).name
            for layer in layers
            if layer.type.name == "KV_CACHE_UPDATE"
        },
        "softmax": sorted(
            {layer.get_input(0).dtype.name for layer in layers if layer.type.name == "SOFTMAX"}
        ),
    }


def compiled(folder: Path, spec: ModelSpec, rows: int, graph: str) -> dict[str, Any]:
    """Compiles one graph and returns the result, or the error."""
    log, fused = Log(), graph.endswith("-fused")
    form = (
        vision_variant(spec, fused)
        if graph.startswith("vision")
        else decoder_variant(spec, fused, rows)
    )
    journal = SimpleNamespace(
        logger=log, clear=lambda: None, read=lambda: " / ".join(log.errors)[:600]
    )
    machine: Any = SimpleNamespace(
        trt=trt, journal=journal, release=trt.__version__, name="no GPU", device=None
    )
    seen: dict[str, Any] = {"graph": graph}
    compile_network = trt.Builder.build_serialized_network

    def observed(builder: Any, network: Any, config: Any) -> Any:
        seen.update(parsed(network))  # now, because the network dies with its builder
        return compile_network(builder, network, config)

    trt.Builder.build_serialized_network = observed
    try:
        engine = builder.build(machine, folder / form.file, form, _WORKSPACE, None)
    except EngineError as error:
        return seen | {"error": str(error)}
    finally:
        trt.Builder.build_serialized_network = compile_network
    return seen | {
        "bytes": engine.nbytes,
        "errors": log.errors,
        "kernels": weights_read(_LAYER.findall("\n".join(log.lines))),
    }


if __name__ == "__main__":
    where, described, capacity, *graphs = sys.argv[1:]
    for wanted in graphs:
        model = ModelSpec.from_text(Path(described).read_bytes(), described)
        print(
            "RESULT " + json.dumps(compiled(Path(where), model, int(capacity), wanted)), flush=True
        )
