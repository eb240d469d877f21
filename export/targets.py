"""Defines targets as data: which graphs a target's bundle contains, and how each graph
is made from a canonical one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from calibration.calibrate import Calibrated
from export.passes import GraphPass
from export.passes.companion_row import COMPANION_ROW
from export.passes.cuda_operators import MULTI_HEAD_ATTENTION, ONE_PICTURE, SIMPLIFIED_NORMS
from export.passes.explicit_kernels import EXPLICIT_KERNELS
from export.passes.group_query_attention import GROUP_QUERY_ATTENTION
from export.passes.half import to_half
from export.passes.int8_cache import int8_cache
from export.passes.integer_kernels import BLOCK_KERNELS, INTEGER_KERNELS
from export.passes.logits_to_keep import KEEP_LOGITS
from export.passes.pack_projections import pack_projections
from export.passes.plain_operators import PLAIN_ATTENTION, PLAIN_GELU, PLAIN_NORMS
from export.passes.quantise import Kernels, quantise_linears, store_half
from export.passes.tensorrt_attention import FUSED_CACHE, PLAIN_CACHE, fixed_capacity
from export.passes.token_outputs import FIRST_TOKEN_OUTPUTS, TOKEN_OUTPUTS
from export.schemes import Scheme
from runtime.contract.errors import UsageError
from runtime.contract.graphs import IMAGE_EMBEDS, LOGITS, LOGITS_MASS, PIXELS, POOL

__all__ = ["LOWERING", "GraphPlan", "Lowering", "find_lowering"]


@dataclass(frozen=True)
class GraphPlan:
    """How one graph of a bundle is made.

    `base` is the canonical graph it comes from, `passes` are its passes, and `opset` is
    its opset (0: as captured). `fixed` tells whether its cache has a fixed length.
    `weights_of` names the graph whose weights it refers to. If that is empty, the graph
    stores its own weights.
    """

    base: str
    passes: tuple[GraphPass, ...] = ()
    opset: int = 0
    fixed: bool = False
    weights_of: str = ""


@dataclass(frozen=True)
class Lowering:
    """A target's graphs by name, in the order they are packed, its kernels of integer
    layers, and graph values that stay fp32 in a half graph.

    `batches` tells whether its engine decodes several sequences side by side.
    `byte_weights` are passes that decoders with 8-bit weights and float activations get
    first; `packs` is whether projections of one input are one product. `compare_on_cpu`
    is true where the target's engine runs on other machines: the build is then compared
    with PyTorch through `export.parity.cpu_reference`. `saturation_safe` is true where
    8-bit weights are rounded so that the kernels of x86 CPUs without VNNI stay exact.
    """

    graphs: Mapping[str, GraphPlan]
    kernels: Kernels
    full_values: frozenset[str] = frozenset()
    byte_weights: tuple[GraphPass, ...] = ()
    packs: bool = True
    compare_on_cpu: bool = False
    saturation_safe: bool = False
    batches: bool = True

    def form(self, graph: str, scheme: Scheme, capacity: int) -> list[GraphPass]:
        """Returns the passes that turn the canonical graph into this one, without those
        for precision. `capacity` is the length of fixed caches.
        """
        plan = self.graphs[graph]
        first = self.byte_weights if plan.base == "decoder" and scheme.byte_weights else ()
        return [*first, *plan.passes, *([fixed_capacity(capacity)] if plan.fixed else [])]

    def precision(self, graph: str, scheme: Scheme, calibrated: Calibrated) -> list[GraphPass]:
        """Returns the passes that give the named graph its precision. The name may also
        be "prefill", which is a second decoder.
        """
        linear = partial(scheme.linear, prefill=graph == "prefill")
        decoder = not graph.startswith("vision")
        pack = [pack_projections(linear)] if decoder and self.packs else []
        halves = scheme.compute == "fp16"
        store = [] if halves else [store_half(scheme.half)]
        last = [to_half(self.full_values)] if halves else []
        cache = [int8_cache(calibrated)] if decoder and scheme.cache == "int8" else []
        return [*pack, *store, quantise_linears(linear, calibrated, self.kernels), *last, *cache]


_FULL_VALUES = frozenset({PIXELS, POOL, IMAGE_EMBEDS, LOGITS, LOGITS_MASS})
LOWERING: dict[str, Lowering] = {
    "cpu": Lowering(
        {
            "vision": GraphPlan("vision"),
            "decoder": GraphPlan("decoder", (GROUP_QUERY_ATTENTION, KEEP_LOGITS)),
        },
        INTEGER_KERNELS,
        saturation_safe=True,
    ),
    # Uses operators and an opset for which ONNX Runtime's CUDA provider has kernels
    # (export/passes/cuda_kernels.py). An operator without one would silently run on the CPU.
    "cuda": Lowering(
        {
            "vision": GraphPlan("vision", (ONE_PICTURE, MULTI_HEAD_ATTENTION), 20),
            "decoder": GraphPlan(
                "decoder", (GROUP_QUERY_ATTENTION, SIMPLIFIED_NORMS, TOKEN_OUTPUTS), 20
            ),
        },
        BLOCK_KERNELS,
        _FULL_VALUES,
        compare_on_cpu=True,
    ),
    # The plain graphs use what TensorRT 10.3 parses, at the first opset with 4-bit weights in
    # blocks. The fused graphs use what 10.15 added, at the first opset that has it.
    "tensorrt": Lowering(
        {
            "vision": GraphPlan("vision", (PLAIN_GELU, PLAIN_ATTENTION), 21),
            "vision-fused": GraphPlan("vision", (PLAIN_GELU,), 24, weights_of="vision"),
            "decoder": GraphPlan("decoder", (PLAIN_CACHE, PLAIN_NORMS, FIRST_TOKEN_OUTPUTS), 21),
            "decoder-fused": GraphPlan(
                "decoder",
                (FUSED_CACHE, PLAIN_NORMS, FIRST_TOKEN_OUTPUTS),
                24,
                fixed=True,
                weights_of="decoder",
            ),
        },
        EXPLICIT_KERNELS,
        _FULL_VALUES,
        (COMPANION_ROW,),
        # TensorRT merges projections itself, and it would split packed 8-bit projections
        # again at every step.
        packs=False,
        compare_on_cpu=True,
        batches=False,
    ),
}

LOWERING["rtx"] = LOWERING["tensorrt"]  # the same compiler, as a plugin of ONNX Runtime


def find_lowering(target: str) -> Lowering:
    """Returns the lowering of a target. Raises `UsageError` that lists the choices."""
    if target not in LOWERING:
        raise UsageError(f"unknown target {target!r}; choose one of: {', '.join(LOWERING)}")
    return LOWERING[target]
