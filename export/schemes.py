"""Precision schemes as data: what happens to the linear weights and activations of each part, and how far results may drift from PyTorch.

Tolerances are relative root-mean-square errors against PyTorch fp32 (norm of the difference over norm of the reference), the largest of all golden
cases. They sit above what a correct build shows (int8 on the demo: 0.07) and below what a broken kernel or a wrong scale produces (saturating
products: 0.24; a wrong scale: 1 or more).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from runtime.contract.errors import UsageError

__all__ = ["SCHEMES", "LinearScheme", "Scheme", "find_scheme"]


@dataclass(frozen=True)
class LinearScheme:
    """Storage of a weight (fp32, fp16, int8 per output channel) and precision of the activation it meets.

    Activations: "float", "int8-row" (a symmetric scale per token) or "int8-tensor" (one range for all tokens of a call).
    """

    weight: str = "fp32"
    activation: str = "float"


FLOAT = LinearScheme()
HALF = LinearScheme("fp16")
ROWS = LinearScheme("int8", "int8-row")
TENSOR = LinearScheme("int8", "int8-tensor")

# The tower sees many tokens in every call and takes a scale per token. The decoder's hot call is one token, where one range is a scale per token
# already and a single fused operator; its prefill has more, which the parity gate watches.
W8A8 = {"": ROWS, "decoder.": TENSOR}


@dataclass(frozen=True)
class Scheme:
    """A named precision. `parts` maps prefixes of parameter names to their linear scheme, the longest match counting."""

    name: str
    parts: Mapping[str, LinearScheme]
    embeddings: str
    tolerance: Mapping[str, float]
    help: str

    def linear(self, parameter: str) -> LinearScheme:
        """The scheme of a parameter by its longest matching prefix."""
        matches = [prefix for prefix in self.parts if parameter.startswith(prefix)]
        return self.parts[max(matches, key=len)] if matches else FLOAT


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp32", {"": FLOAT}, "fp32", {"vision": 2e-5, "prefill": 5e-5, "decode": 5e-5}, "exact: the same tokens as PyTorch"),
        Scheme("fp16", {"": HALF}, "fp16", {"vision": 3e-3, "prefill": 5e-3, "decode": 5e-3}, "half-size weights, float arithmetic"),
        Scheme("int8", W8A8, "fp16", {"vision": 0.06, "prefill": 0.12, "decode": 0.12}, "8-bit weights and activations (W8A8)"),
    )
}


def find_scheme(name: str) -> Scheme:
    """The scheme of that name; raises `UsageError` listing the choices."""
    if name not in SCHEMES:
        raise UsageError(f"unknown precision {name!r}; choose one of: {', '.join(SCHEMES)}")
    return SCHEMES[name]
