"""Lists the kernels of ONNX Runtime's CUDA provider for the operators that our graphs
use. An operator without a kernel would run on the CPU, inside the network.

Source: docs/OperatorKernels.md of github.com/microsoft/onnxruntime at 001d12d2, section
CUDAExecutionProvider. A kernel registered without a last version serves only graphs
whose operator version is the kernel's first. If a newer opset redefines the operator,
it has no kernel until one is added. Therefore the graphs are written at opset 20.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CUDA_KERNELS", "FOLDED", "Kernel"]

_FLOATS = frozenset({"FLOAT", "FLOAT16"})
_ANY = _FLOATS | {"INT64", "INT32"}
FOLDED = frozenset({"::Constant"})
"""Operators that are folded away before the graph runs."""


@dataclass(frozen=True)
class Kernel:
    """The versions of an operator from `first` to `last` (None: `first` alone, see
    above), and the types that its first input may have.
    """

    first: int
    last: int | None = None
    types: frozenset[str] = _FLOATS

    def serves(self, since: int, dtype: str) -> bool:
        """True for a node whose operator is defined since version `since`, and whose
        first input has type `dtype`.
        """
        return dtype in self.types and (
            since == self.first or (self.last is not None and self.first <= since <= self.last)
        )


_HALF = frozenset(
    {"FLOAT16"}
)  # GroupQueryAttention has fp16 and bf16 only, so this target has no fp32 scheme
CUDA_KERNELS: dict[str, Kernel] = {
    "::Abs": Kernel(13),
    "::Add": Kernel(14),
    "::ArgMax": Kernel(13),
    "::Cast": Kernel(19, 20, _ANY),
    "::Concat": Kernel(13, None, _ANY),
    "::Conv": Kernel(11, 21),
    "::Gather": Kernel(13, None, _ANY),
    "::Gelu": Kernel(20),
    "::LayerNormalization": Kernel(17),
    "::MatMul": Kernel(13),
    "::Mul": Kernel(14),
    "::ReduceSum": Kernel(13),
    "::Reshape": Kernel(19, 20, _ANY),
    "::Sigmoid": Kernel(13),
    "::SimplifiedLayerNormalization": Kernel(1),
    "::Slice": Kernel(13, None, _ANY),
    "::Split": Kernel(18),
    "::Transpose": Kernel(13, 20, _ANY),
    "com.microsoft::GroupQueryAttention": Kernel(1, None, _HALF),
    "com.microsoft::MatMulNBits": Kernel(1),
    "com.microsoft::MultiHeadAttention": Kernel(1),
}
