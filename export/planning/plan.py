"""Predicts what a build and a bundle will cost from the spec alone: disk, memory of
building and running, visual tokens, and a roofline estimate of latency.

Bytes follow the formats exactly. Memory includes the measured overhead of the tools
(docs/benchmarks.md has predictions beside measurements). Latency is a bound: the work
divided by the share of the device's peak rates that good kernels reach.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch

from calibration.blocks import StreamedModel
from calibration.linear import LinearScheme
from export.planning.devices import Device
from export.planning.limits import CALLS_MODEL, LARGE_BYTES, PIECE_BYTES, WHOLE_MODEL, golden_count
from export.schemes import DECODER, Scheme
from runtime.contract.spec import ModelSpec

__all__ = ["MIB", "Plan", "linear_bytes", "linears", "make_plan", "part_bytes"]

MIB = 1 << 20
# Measured on Linux x86 with the CPU builds of torch 2.13, onnx 1.23 and onnxruntime 1.31; see
# docs/benchmarks.md.
_EXPORTER = 450 * MIB  # torch, onnx and onnxruntime imported, and a traced graph
_GRAPH_NODE = 350  # bytes of an ONNX node and its tensors' descriptions
_RUNTIME = 78 * MIB  # Python, numpy, Pillow, tokenizers and onnxruntime
_PACKED = {
    "fp32": 1.3,
    "fp16": 2.6,
    "int8": 1.3,
    "int4": 1.3,
}  # resident bytes per stored byte: the kernels' copy and the part of the file still mapped
_SHARED, _TWICE = 1.05, 2.0  # resident bytes per stored byte in TensorRT-RTX; see docs/tensorrt.md
_ROUNDING = 4.0  # float copies of a weight while it is rounded
_BLOCK_COPIES = 4.7  # copies of the largest block's float weights while it is read, checked and run
_ACTIVATIONS = 2.5  # memory the engine reserves for activations, relative to their size
# Kernels of a layer if everything is fused that can be: two norms, four products, attention and
# the activation; and kernels before and after all layers.
_KERNELS, _OUTSIDE = 8, 5
_PYTHON_MS = 0.015  # the runtime's own code per call, measured (docs/benchmarks.md)
_FLOAT_COPIES = 3.0  # of a small model: in PyTorch, in a file, and as the kernels keep it
_TEXT_TOKENS, _ANSWER = 16, 5  # tokens of a usual question, and of its answer


@lru_cache(maxsize=8)
def linears(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Returns (outputs, inputs) of every linear layer that schemes apply to, by
    parameter name.
    """
    model = StreamedModel(spec, lambda name: torch.empty(0))
    names = [
        f"{name}.weight"
        for block in model.blocks()
        for feed in block.feeds
        for name in feed.linears
    ]
    shapes = {name: model.model.get_parameter(name).shape for name in names}
    return {name: (int(shape[0]), int(shape[1])) for name, shape in shapes.items()}


def linear_bytes(outputs: int, inputs: int, scheme: LinearScheme, scale: int = 4) -> int:
    """Returns the stored bytes of a weight under a scheme, including scales (of `scale`
    bytes) and zero points.
    """
    if not scheme.quantised:
        return outputs * inputs * scheme.bits // 8
    if scheme.activation != "float" or (scheme.bits == 8 and not scheme.block):
        return outputs * inputs + scale * outputs
    block = scheme.grid_block(inputs) if scheme.whole else scheme.kernel_block(inputs)
    count = math.ceil(inputs / block)
    zeros = math.ceil(count / 2) if scheme.bits == 4 and not scheme.symmetric else 0
    return outputs * (count * block * scheme.bits // 8 + scale * count + zeros)


def part_bytes(spec: ModelSpec, scheme: Scheme) -> dict[str, int]:
    """Returns the bytes of weights in each graph."""
    half = 2 if scheme.embeddings == "fp16" else 4
    scale = 2 if scheme.compute == "fp16" else 4
    shapes = linears(spec)
    in_tower = [name for name in shapes if not name.startswith(DECODER)]
    tower, decoder = spec.vision, spec.decoder
    counted = sum(n * k for n, k in shapes.values())
    others = (
        spec.parameters - counted - decoder.vocab_size * decoder.hidden
    )  # norms, biases, patch embedding, positions
    decoder_norms = (2 * decoder.layers + 1) * decoder.hidden
    rotary = (
        decoder.context * decoder.head_dim * (2 if scheme.linear(DECODER).weight == "fp16" else 4)
    )
    wide = (
        3 * tower.patch_size**2 * tower.width + (tower.grid**2 + 2) * tower.width
    )  # tensors of more than two dimensions
    found = {
        "vision": sum(linear_bytes(*shapes[name], scheme.linear(name), scale) for name in in_tower)
        + 4 * (others - decoder_norms - wide)
        + half * wide
    }
    for graph in ("decoder", *(["prefill"] if scheme.prefill is not None else [])):
        linear = sum(
            linear_bytes(*shape, scheme.linear(name, graph == "prefill"), scale)
            for name, shape in shapes.items()
            if name.startswith(DECODER)
        )
        found[graph] = linear + 4 * decoder_norms + rotary
    return found


@dataclass(frozen=True)
class Plan:
    """Predictions in bytes and milliseconds. `advice` says what to change where
    something does not fit.
    """

    disk: dict[str, int]
    build_peak: int
    run: dict[str, int]
    visual_tokens: tuple[int, ...]
    latency: dict[str, float]
    device: Device
    advice: tuple[str, ...] = ()

    @property
    def disk_bytes(self) -> int:
        """Bytes of the whole bundle."""
        return sum(self.disk.values())

    @property
    def run_bytes(self) -> int:
        """Resident memory of a process that has answered."""
        return sum(self.run.values())

    @property
    def fits(self) -> bool:
        """True if the device has enough memory to run the bundle."""
        return self.run_bytes <= self.device.memory_gb * 1e9

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict with totals."""
        return asdict(self) | {
            "disk_bytes": self.disk_bytes,
            "run_bytes": self.run_bytes,
            "fits": self.fits,
        }


def make_plan(
    spec: ModelSpec,
    scheme: Scheme,
    device: Device,
    context: int | None = None,
    samples: int = 32,
    questions: bool = True,
) -> Plan:
    """Predicts disk, memory and latency for one model, scheme and device. `context` is
    the number of cache rows (default: the model's).

    `questions` tells whether the build also asks PyTorch questions, for which small
    models are loaded whole.
    """
    context = min(context or spec.decoder.context, spec.decoder.context)
    weights = part_bytes(spec, scheme)
    disk = _disk(spec, scheme, weights)
    run = _run_memory(spec, scheme, weights, context)
    plan = Plan(
        disk,
        _build_peak(spec, scheme, weights, samples, questions),
        run,
        tuple(p * p for p in spec.pool_sizes),
        _latency(spec, scheme, weights, device),
        device,
    )
    return (
        plan
        if plan.fits
        else Plan(**{**vars(plan), "advice": tuple(_advice(spec, scheme, plan, context))})
    )


def _disk(spec: ModelSpec, scheme: Scheme, weights: dict[str, int]) -> dict[str, int]:
    decoder, size = spec.decoder, 2 if scheme.embeddings == "fp16" else 4
    tokens = sum(spec.pool_sizes[i % len(spec.pool_sizes)] ** 2 for i in range(golden_count(spec)))
    goldens = (
        golden_count(spec)
        * (12 * spec.vision.image_size**2 + 4 * (_ANSWER + 1) * decoder.vocab_size)
        + 4 * tokens * decoder.hidden
    )
    nodes = 34 * spec.vision.layers + 30 * decoder.layers * len(weights)
    return {
        **weights,
        "embeddings": size * decoder.vocab_size * decoder.hidden,
        "goldens": goldens,
        "graphs": _GRAPH_NODE * nodes,
    }


def _cache_row(spec: ModelSpec, scheme: Scheme) -> int:
    """Returns the bytes of keys and values of one position, over all layers."""
    decoder = spec.decoder
    return (
        2
        * decoder.layers
        * decoder.kv_heads
        * decoder.head_dim
        * {"int8": 1, "fp16": 2, "fp32": 4}[scheme.cache]
    )


def _run_memory(
    spec: ModelSpec, scheme: Scheme, weights: dict[str, int], context: int
) -> dict[str, int]:
    decoder, tower = spec.decoder, spec.vision
    cache = context * _cache_row(spec, scheme)
    resident = 0.0
    for graph, size in weights.items():
        linear = scheme.linear("" if graph == "vision" else DECODER, graph == "prefill")
        on_gpu = _SHARED if graph == "vision" else _packed_on_gpu(linear)
        resident += (on_gpu if scheme.compute == "fp16" else _PACKED[linear.weight]) * size
    patches, length = tower.grid**2 + 1, spec.pool_sizes[0] ** 2 + _TEXT_TOKENS
    seen = 4 * (patches * (6 * tower.width + 2 * tower.mlp_width) + tower.heads * patches**2)
    read = 4 * length * (4 * decoder.hidden + 3 * decoder.mlp_width) + 4 * decoder.heads * length**2
    return {
        "runtime": _RUNTIME,
        "weights": int(resident),
        "cache": cache,
        "activations": int(_ACTIVATIONS * (seen + read)),
    }


def _packed_on_gpu(linear: LinearScheme) -> float:
    """Returns the resident bytes of a decoder's engine per stored byte. The engine's
    two profiles share weights that are unpacked as they are read, and hold two copies
    of all others.
    """
    return _SHARED if linear.quantised and linear.activation == "float" else _TWICE


def _build_peak(
    spec: ModelSpec, scheme: Scheme, weights: dict[str, int], samples: int, questions: bool
) -> int:
    """Returns the exporter's own memory plus the largest of three phases: calibrating a
    block, rounding a weight, and replaying the bundle (or a part of it).
    """
    shapes = linears(spec)
    names = [name for name, shape in shapes.items()]
    largest = max(n * k for n, k in shapes.values())
    decoder_layer = sum(
        n * k for name, (n, k) in shapes.items() if name.startswith(f"{DECODER}layers.0.")
    )
    table = spec.decoder.vocab_size * spec.decoder.hidden
    moments = max(
        (
            k * k
            for name, (_, k) in shapes.items()
            if any(s.rounding == "gptq" for s in scheme.schemes_for(name))
        ),
        default=0,
    )
    block = int(4 * _BLOCK_COPIES * max(decoder_layer, table)) + 4 * 5 * moments
    cases = golden_count(spec) + (samples if scheme.calibrates else 0)
    states = (
        4
        * cases
        * max(
            (spec.vision.grid**2 + 1) * spec.vision.width + 3 * spec.vision.image_size**2,
            400 * spec.decoder.hidden,
        )
    )
    rounding = (
        int(4 * _ROUNDING * largest)
        if any(scheme.linear(name).quantised for name in names)
        else 8 * largest
    )
    total = sum(weights.values())
    if scheme.compute == "fp16":
        replayed = int(1.1 * total) + 4 * table  # the CPU reference loads the bundle whole
    elif total > LARGE_BYTES:
        replayed = int(2 * max(PIECE_BYTES + 4 * table, weights["vision"]))
    else:
        whole = (
            4 * spec.parameters if questions and spec.parameters <= WHOLE_MODEL else 0
        )  # the whole model is in memory while answers are compared
        loaded = _run_memory(spec, scheme, weights, spec.decoder.context)["weights"]
        floats = _FLOAT_COPIES * 4 * spec.parameters if spec.parameters <= CALLS_MODEL else 0
        replayed = max(loaded + 2 * whole, int(floats))
    return _EXPORTER + max(block + states, rounding, replayed)


def _latency(
    spec: ModelSpec, scheme: Scheme, weights: dict[str, int], device: Device
) -> dict[str, float]:
    """Returns milliseconds (and tokens per second) at the device's reachable rates. The
    tower and prefill are bound by arithmetic or bandwidth, decoding by the bytes it
    reads, and all of them by the number of their kernels and by the runtime's own share.
    """
    tower = spec.vision
    patches, length = tower.grid**2 + 1, spec.pool_sizes[0] ** 2 + _TEXT_TOKENS
    shapes = linears(spec)

    def arithmetic(prefix: str, rows: int, prefill: bool = False) -> float:
        chosen = {
            name: n * k
            for name, (n, k) in shapes.items()
            if name.startswith(prefix) and "lm_head" not in name
        }
        return sum(
            2e-9 * rows * size / device.rate(scheme.linear(name, prefill))
            for name, size in chosen.items()
        )

    attention = 4e-9 * tower.layers * patches**2 * tower.width / device.rate(LinearScheme())
    vision = max(
        arithmetic("vision_tower.", patches) + attention,
        1e-6 * weights["vision"] / device.bandwidth_gbs,
    )
    prefill = max(
        arithmetic(DECODER, length, True),
        1e-6 * weights.get("prefill", weights["decoder"]) / device.bandwidth_gbs,
    )
    step = 1e-6 * (weights["decoder"] + _cache_row(spec, scheme) * length) / device.bandwidth_gbs
    # However small the model is, its kernels start one after the other.
    vision = max(vision, 1e-3 * device.kernel_us * (_KERNELS * tower.layers + _OUTSIDE))
    started = 1e-3 * device.kernel_us * (_KERNELS * spec.decoder.layers + _OUTSIDE)
    prefill, step = max(prefill, started) + _PYTHON_MS, max(step, started) + _PYTHON_MS
    return {
        "vision_ms": vision,
        "prefill_ms": prefill,
        "first_token_ms": vision + prefill,
        "per_token_ms": step,
        "tokens_per_second": 1e3 / step,
    }


def _advice(spec: ModelSpec, scheme: Scheme, plan: Plan, context: int) -> list[str]:
    found = [
        f"{plan.run_bytes / 1e9:.1f} GB of memory are needed, {plan.device.name} has "
        f"{plan.device.memory_gb:g} GB"
    ]
    cache = plan.run["cache"]
    if cache > 0.1 * plan.run_bytes:
        found.append(
            f"--context {context // 4} saves {cache * 0.75 / 1e9:.1f} GB of cache"
            + (", --kv int8 saves as much" if scheme.cache == "fp32" else "")
        )
    if scheme.linear(f"{DECODER}layers.0.mlp.up_proj.weight").bits > 4:
        found.append("--precision int4 stores the decoder in 4 bits")
    if scheme.prefill is not None:
        found.append(
            f"--precision int4 has no second decoder and saves {plan.disk['prefill'] / 1e9:.1f} GB"
        )
    return found if len(found) > 1 else [*found, "choose a smaller model or a larger device"]
