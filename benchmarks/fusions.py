"""Measures the gain of graph rewrites on this machine. It times the same decoder in
several forms, prompt and single steps, interleaved in one run.

Forms: canonical (standard operators, caches copied), GroupQueryAttention, and
GroupQueryAttention with a layer's projections packed into one matrix product (the form
that builds use).

python benchmarks/fusions.py [--shape nano|wide] [--repetitions 30]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch

from calibration.linear import LinearScheme
from export.capture import capture
from export.passes import SIMPLIFY, run_passes
from export.passes.group_query_attention import GROUP_QUERY_ATTENTION
from export.passes.pack_projections import pack_projections
from runtime.contract.graphs import (
    INPUTS_EMBEDS,
    LOGITS,
    POSITION_IDS,
    SEQLENS_K,
    TOTAL_LENGTH,
    present,
)
from runtime.contract.spec import DecoderSpec, ModelSpec, VisionSpec
from runtime.engines.onnxruntime.sessions import session_options
from trainer.config import find_preset
from trainer.model import InfMLLM

_PROMPT, _CONTEXT, _STEPS = 75, 128, 16
WIDE = ModelSpec(
    "wide",
    VisionSpec(image_size=32, patch_size=8, width=32, layers=1, heads=4, mlp_width=64),
    DecoderSpec(
        vocab_size=2048, hidden=2048, layers=3, heads=32, kv_heads=4, mlp_width=5632, context=512
    ),
    (4,),
)


class Form:
    """An ONNX Runtime session for one form of the decoder, with its caches."""

    def __init__(self, model: ir.Model, spec: DecoderSpec) -> None:
        data = ir.to_proto(model).SerializeToString()
        self._session = ort.InferenceSession(
            data, session_options(None), providers=["CPUExecutionProvider"]
        )
        self._names = [value.name for value in self._session.get_inputs()]
        self._caches = {
            name: ort.OrtValue.ortvalue_from_numpy(
                np.zeros((1, spec.kv_heads, _CONTEXT, spec.head_dim), np.float32)
            )
            for name in self._names
            if "cache" in name
        }

    def run(self, embeds: np.ndarray, start: int) -> np.ndarray:
        """Returns the logits of one call. Caches are updated in place if the graph
        supports it; otherwise the outputs replace them.
        """
        end = start + embeds.shape[1]
        feed = {
            INPUTS_EMBEDS: embeds,
            POSITION_IDS: np.arange(start, end)[None],
            SEQLENS_K: np.array([end - 1], np.int32),
            TOTAL_LENGTH: np.array(end, np.int32),
        }
        binding, in_place = self._session.io_binding(), POSITION_IDS not in self._names
        for name in self._names:
            binding.bind_ortvalue_input(
                name,
                self._caches[name]
                if name in self._caches
                else ort.OrtValue.ortvalue_from_numpy(feed[name]),
            )
        for name, cache in self._caches.items():
            binding.bind_ortvalue_output(present(name), cache) if in_place else binding.bind_output(
                present(name)
            )
        binding.bind_output(LOGITS)
        self._session.run_with_iobinding(binding)
        found = dict(zip([*map(present, self._caches), LOGITS], binding.get_outputs(), strict=True))
        if not in_place:
            self._caches = {name: found[present(name)] for name in self._caches}
        return np.asarray(found[LOGITS].numpy())


def main() -> None:
    """Prints the median times of each form, and its largest difference from the
    canonical form.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=("nano", "wide"), default="nano")
    parser.add_argument("--repetitions", type=int, default=30)
    given = parser.parse_args()
    spec = find_preset("nano").spec if given.shape == "nano" else WIDE
    model = InfMLLM(spec, torch.Generator().manual_seed(0)).eval()
    canonical = capture(spec, lambda name: model.get_parameter(name).detach()).decoder
    run_passes(canonical, SIMPLIFY)
    lowered = canonical.clone()
    GROUP_QUERY_ATTENTION(lowered)
    packed = lowered.clone()
    pack_projections(lambda name: LinearScheme())(packed)
    forms = {
        name: Form(graph, spec.decoder)
        for name, graph in (
            ("canonical", canonical),
            ("GroupQueryAttention", lowered),
            ("packed", packed),
        )
    }
    embeds = (
        np.random.default_rng(0).normal(size=(1, _PROMPT, spec.decoder.hidden)).astype(np.float32)
    )
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    results: dict[str, np.ndarray] = {}
    for _ in range(given.repetitions + 2):
        for name, form in forms.items():
            started = time.perf_counter()
            form.run(embeds, 0)
            middle = time.perf_counter()
            for step in range(_STEPS):
                results[name] = form.run(embeds[:, step : step + 1], _PROMPT + step)
            times[name].append(
                (1e3 * (middle - started), 1e3 * (time.perf_counter() - middle) / _STEPS)
            )
    for name, rows in times.items():
        prefill, decode = (statistics.median(column) for column in zip(*rows[2:], strict=True))
        error = float(np.abs(results[name] - results["canonical"]).max())
        print(
            f"{name:20} prefill {prefill:.2f} ms, step {decode:.3f} ms, largest difference from "
            f"canonical {error:.1e}"
        )


if __name__ == "__main__":
    main()
