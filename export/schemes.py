"""Defines precision schemes as data: how the linear layers of each part represent
weights and activations, and how far results may drift from PyTorch.

Tolerances bound the cost of rounding: relative root-mean-square errors against PyTorch
fp32 (norm of the difference over norm of the reference; logits without their common
offset). The largest error of all golden cases counts. They lie above the error of a
correct build (docs/benchmarks.md), and so they cannot show a structural fault of the same
size. `export.parity.proof` compares structure and kernels apart from rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from calibration.linear import KERNEL_BLOCKS, SIGNED, LinearScheme
from runtime.contract.errors import UsageError

__all__ = [
    "ROUNDINGS",
    "SCHEMES",
    "TARGET_SCHEMES",
    "Scheme",
    "TargetSchemes",
    "choose_scheme",
    "find_scheme",
    "mixed",
]

ROUNDINGS = ("nearest", "mse", "gptq")
"""Methods of rounding 4-bit weights, the cheapest first."""

FLOAT = LinearScheme()
HALF = LinearScheme("fp16")
# The tower processes many tokens in every call, so it uses one scale per token. The decoder's
# most frequent call has a single token. There, one range for the call equals a scale per token
# and needs only one fused operator. Smoothing keeps the decoder's prefill accurate.
ROWS = LinearScheme("int8", "int8-row", smooth=True)
TENSOR = LinearScheme("int8", "int8-tensor", smooth=True)
STATIC = LinearScheme("int8", "int8-static", smooth=True)
WEIGHTS8 = LinearScheme("int8", block=64)
FAST4 = LinearScheme("int4", block=128, rounding="gptq", smooth=True, symmetric=True)
WEIGHTS4 = LinearScheme("int4", block=32, rounding="gptq", smooth=True)
BLOCKS4 = LinearScheme("int4", block=32, rounding="gptq", smooth=True, symmetric=True)
# TensorRT multiplies signed 8-bit integers. Activations have one calibrated scale per tensor,
# and weights have one scale per output channel.
W8A8 = LinearScheme("int8", SIGNED, smooth=True)
CHANNELS8 = LinearScheme("int8")
WHOLE4 = replace(FAST4, whole=True)
DECODER, VISION = "decoder.", "vision_tower."


@dataclass(frozen=True)
class Scheme:
    """A named precision. `parts` maps prefixes of parameter names to linear schemes.
    The longest matching prefix applies.

    `prefill`, if given, is the same mapping for a second decoder graph that serves
    calls of more than one token. `cache` is the type of keys and values (fp32, fp16 or
    int8), and `compute` is the type of other activations (fp32 or fp16). `drop` is how
    many points of task accuracy may be lost.
    """

    name: str
    parts: Mapping[str, LinearScheme]
    embeddings: str
    tolerance: Mapping[str, float]
    help: str
    prefill: Mapping[str, LinearScheme] | None = None
    cache: str = "fp32"
    compute: str = "fp32"
    drop: float = 0.5

    def entry(self, parameter: str, prefill: bool = False) -> str | None:
        """Returns the prefix that decides a parameter's scheme: the longest match, and
        the later one of equal length. Only whole name components match. Returns None if
        no prefix matches.
        """
        table = self.prefill if prefill and self.prefill is not None else self.parts
        found = [
            (len(prefix.rstrip(".")), place, prefix)
            for place, prefix in enumerate(table)
            if _covers(prefix, parameter)
        ]
        return max(found)[2] if found else None

    def linear(self, parameter: str, prefill: bool = False) -> LinearScheme:
        """Returns the scheme of a parameter."""
        table = self.prefill if prefill and self.prefill is not None else self.parts
        prefix = self.entry(parameter, prefill)
        return FLOAT if prefix is None else table[prefix]

    def half(self, parameter: str, dimensions: int) -> bool:
        """True for a tensor stored in fp16: a weight of the fp16 scheme, or, with fp16
        embeddings, a tower tensor of more than two dimensions, which embeds the
        patches.
        """
        return self.linear(parameter).weight == "fp16" or (
            self.embeddings == "fp16" and parameter.startswith(VISION) and dimensions > 2
        )

    def schemes_for(self, parameter: str) -> tuple[LinearScheme, ...]:
        """Returns all schemes in which a weight is stored."""
        both = (
            self.linear(parameter),
            *(
                [self.linear(parameter, True)]
                if self.prefill and parameter.startswith(DECODER)
                else ()
            ),
        )
        return tuple(dict.fromkeys(both))

    @property
    def row_independent(self) -> bool:
        """True if the decoder computes a position the same, whichever other positions
        are computed in the same call.
        """
        together = self.compute == "fp16" or any(  # GPU kernels differ with the row count
            linear.activation == "int8-tensor"
            for prefix, linear in self.parts.items()
            if not prefix.startswith((VISION, "pool_adapter."))
        )
        return not together

    @property
    def byte_weights(self) -> bool:
        """True if any decoder layer may have 8-bit weights and float activations."""
        decoder = (
            linear
            for prefix, linear in self.parts.items()
            if not prefix.startswith((VISION, "vision_tower", "pool_adapter"))
        )
        return any(linear.weight == "int8" and linear.activation == "float" for linear in decoder)

    @property
    def calibrates(self) -> bool:
        """True if the scheme needs calibration data."""
        tables = (*self.parts.values(), *(self.prefill or {}).values())
        return self.cache == "int8" or any(linear.calibrates for linear in tables)


def _covers(prefix: str, parameter: str) -> bool:
    whole = prefix.rstrip(".")
    return not whole or parameter == whole or parameter.startswith(f"{whole}.")


_INTEGER = {"vision": 0.06, "prefill": 0.12, "decode": 0.12}
_STATIC = {"vision": 0.2, "prefill": 0.3, "decode": 0.3}
_FOUR = {"vision": 0.25, "prefill": 0.45, "decode": 0.45}
SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "fp32",
            {"": FLOAT},
            "fp32",
            {"vision": 2e-5, "prefill": 5e-5, "decode": 5e-5},
            "exact: the same tokens as PyTorch",
        ),
        Scheme(
            "fp16",
            {"": HALF},
            "fp16",
            {"vision": 3e-3, "prefill": 5e-3, "decode": 5e-3},
            "half-size weights, float arithmetic",
        ),
        Scheme(
            "int8",
            {"": ROWS, DECODER: TENSOR},
            "fp16",
            _INTEGER,
            "8-bit weights and activations (W8A8), ranges found as they occur",
        ),
        Scheme("int8-static", {"": STATIC}, "fp16", _STATIC, "W8A8 with calibrated ranges"),
        Scheme("int8-weights", {"": WEIGHTS8}, "fp16", _INTEGER, "8-bit weights in blocks"),
        Scheme(
            "int4",
            {"": ROWS, DECODER: WEIGHTS4, "decoder.lm_head": TENSOR},
            "fp16",
            _FOUR,
            "4-bit decoder (GPTQ), W8A8 tower and head",
        ),
        Scheme(
            "int4-hybrid",
            {"": ROWS, DECODER: FAST4, "decoder.lm_head": TENSOR},
            "fp16",
            _FOUR,
            "the fastest 4 bits: symmetric blocks of 128, and a second, W8A8 decoder for prefill; "
            "larger",
            {DECODER: TENSOR},
        ),
        Scheme("int4-all", {"": WEIGHTS4}, "fp16", _FOUR, "4-bit weights everywhere (GPTQ)"),
    )
}

_FLOAT16 = {"vision": 1e-2, "prefill": 2e-2, "decode": 2e-2}


def _halves(
    name: str, parts: Mapping[str, LinearScheme], tolerance: Mapping[str, float], help: str
) -> Scheme:
    """Returns a scheme for GPUs: activations, keys and values are fp16."""
    return Scheme(name, parts, "fp16", tolerance, help, cache="fp16", compute="fp16")


@dataclass(frozen=True)
class TargetSchemes:
    """The precisions a target offers.

    `caches` are the types of key/value caches that may be chosen with `--kv`; without
    any, each scheme has its own. `auto` tells whether `--precision auto` may search
    here: it measures with the kernels of this machine.
    """

    schemes: Mapping[str, Scheme]
    caches: tuple[str, ...] = ()
    auto: bool = False


_SCHEMES: dict[str, dict[str, Scheme]] = {
    "cpu": SCHEMES,
    # The CUDA kernels multiply float activations by weights in blocks. The tower has so many
    # rows in a call that its weights cost it little.
    "cuda": {
        scheme.name: scheme
        for scheme in (
            _halves("fp16", {"": HALF}, _FLOAT16, "half precision; sums and logits in fp32"),
            _halves(
                "int8",
                {"": HALF, DECODER: WEIGHTS8},
                _INTEGER,
                "8-bit weights in the decoder, fp16 tower",
            ),
            _halves("int8-weights", {"": WEIGHTS8}, _INTEGER, "8-bit weights everywhere"),
            _halves(
                "int4",
                {"": HALF, DECODER: BLOCKS4, "decoder.lm_head": WEIGHTS8},
                _FOUR,
                "4-bit decoder (GPTQ), 8-bit head, fp16 tower",
            ),
            _halves("int4-all", {"": BLOCKS4}, _FOUR, "4-bit weights everywhere (GPTQ)"),
        )
    },
    "tensorrt": {
        scheme.name: scheme
        for scheme in (
            _halves("fp16", {"": HALF}, _FLOAT16, "half precision; norms and softmax in fp32"),
            _halves("int8", {"": W8A8}, _STATIC, "W8A8 with calibrated ranges (SmoothQuant)"),
            _halves(
                "int8-weights", {"": CHANNELS8}, _INTEGER, "8-bit weights, one scale per channel"
            ),
            _halves(
                "int4",
                {"": W8A8, DECODER: WHOLE4, "decoder.lm_head": W8A8},
                _FOUR,
                "4-bit decoder (GPTQ), W8A8 tower and head",
            ),
        )
    },
}

TARGET_SCHEMES: dict[str, TargetSchemes] = {
    "cpu": TargetSchemes(_SCHEMES["cpu"], caches=("fp32", "int8"), auto=True),
    "cuda": TargetSchemes(_SCHEMES["cuda"]),
    "tensorrt": TargetSchemes(_SCHEMES["tensorrt"]),
    "rtx": TargetSchemes(_SCHEMES["tensorrt"]),
}
"""The precisions of each target. The same name asks for the nearest precision that the
target's engine has kernels for.
"""


def find_scheme(name: str, target: str = "cpu") -> Scheme:
    """Returns the scheme of that name. Raises `UsageError` that lists the choices."""
    if target not in TARGET_SCHEMES:
        raise UsageError(f"unknown target {target!r}; choose one of: {', '.join(TARGET_SCHEMES)}")
    known = TARGET_SCHEMES[target].schemes
    if name not in known:
        where = " (or auto, for build)" if TARGET_SCHEMES[target].auto else f" for target {target}"
        raise UsageError(f"unknown precision {name!r}; choose one of: {', '.join(known)}{where}")
    return known[name]


def choose_scheme(
    name: str,
    block: int | None = None,
    rounding: str | None = None,
    cache: str | None = None,
    keep: Sequence[str] = (),
    target: str = "cpu",
) -> Scheme:
    """Returns a target's named scheme with the changes from the command line. Raises
    `UsageError` that names the choices.

    `block` and `rounding` apply to the scheme's 4-bit weights, and `cache` to keys and
    values. `keep` lists "PREFIX=SCHEME" for blocks that use another scheme.
    """
    scheme = find_scheme(name, target)
    cache = cache or scheme.cache
    choices = TARGET_SCHEMES[target].caches or (scheme.cache,)
    if cache not in choices:
        raise UsageError(f"unknown --kv {cache!r}; choose one of: {', '.join(choices)}")
    for text in keep:
        prefix, equals, other = text.partition("=")
        if not equals or not prefix:
            raise UsageError(
                f"--keep {text!r}: write BLOCK=SCHEME, for example decoder.layers.0=fp16"
            )
        kept = find_scheme(other, target)
        scheme = replace(
            mixed(scheme, {prefix: kept.linear(f"{prefix.rstrip('.')}.weight")}),
            tolerance=_loosest(scheme.tolerance, kept.tolerance),
        )
    four = [prefix for prefix, linear in scheme.parts.items() if linear.bits == 4]
    if (block or rounding) and not four:
        raise UsageError(
            f"precision {name} has no 4-bit weights, so --block and --rounding do not apply; "
            f"leave them out"
        )
    if block is not None and block not in KERNEL_BLOCKS:
        raise UsageError(
            f"--block {block} is not supported; choose one of: {', '.join(map(str, KERNEL_BLOCKS))}"
        )
    if rounding is not None and rounding not in ROUNDINGS:
        raise UsageError(f"unknown rounding {rounding!r}; choose one of: {', '.join(ROUNDINGS)}")
    changed = {
        prefix: replace(linear, **_override(block=block, rounding=rounding))
        if prefix in four
        else linear
        for prefix, linear in scheme.parts.items()
    }
    tolerance = (
        _loosest(scheme.tolerance, {**_INTEGER, "vision": 0.0})
        if cache == "int8"
        else scheme.tolerance
    )
    return replace(scheme, parts=changed, cache=cache, tolerance=tolerance)


def _loosest(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """Returns the larger tolerance of every stage, because a mixture may drift as far
    as the loosest scheme in it.
    """
    return {stage: max(one[stage], other[stage]) for stage in one}


def _override(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def mixed(scheme: Scheme, blocks: Mapping[str, LinearScheme]) -> Scheme:
    """Returns the scheme with other linear schemes for some blocks, in every graph."""
    prefill = None if scheme.prefill is None else {**scheme.prefill, **blocks}
    name = scheme.name if scheme.name.endswith("+") else f"{scheme.name}+"
    return replace(scheme, name=name, parts={**scheme.parts, **blocks}, prefill=prefill)
