"""The proof refuses planted faults and names their place, and it refuses nothing good. Each
test says which precision it compares.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.blocks import StreamedModel
from calibration.linear import fake_activation
from calibration.parts import FRESH
from calibration.samples import draw_cases, draw_examples
from export.parity.calls import Conversation, replay_calls
from export.parity.float_view import float_view
from export.parity.proof import prove
from export.parity.rounded_engine import RoundedEngine
from export.parity.rounding import round_activation
from export.parity.stored_weights import StoredWeight
from export.pipeline import BuildOptions, build
from export.schemes import choose_scheme
from runtime.contract.bundle import read_bundle
from runtime.parity import centred
from tests.mutants.programs import RUNTIME_MUTANTS
from tests.mutants.score import Outcome, small_checkpoint, try_form, try_runtime
from tests.mutants.table import MUTANTS
from trainer.checkpoint import DEMO, open_checkpoint

_QUICK = ("cpu/int8 kv8",)
_SLOW = ("cpu/fp32", "cpu/int4", "cuda/int4", "tensorrt/int8 plain", "tensorrt/int4 fused")
# benchmarks/mutation_score.py tries all forms.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("mutants") / "checkpoint")


def _judge(outcomes: list[Outcome]) -> None:
    let_through = [(outcome.form, outcome.name) for outcome in outcomes if not outcome.caught]
    assert not let_through
    caught = [outcome for outcome in outcomes if outcome.caught]
    unnamed = [(outcome.name, outcome.said) for outcome in caught if not outcome.named]
    assert len(unnamed) <= 0.1 * len(caught), unnamed


def test_the_table_has_what_it_promises() -> None:
    assert len(MUTANTS) + len(RUNTIME_MUTANTS) >= 60
    parts = {mutant.part for mutant in MUTANTS} | {mutant.part for mutant in RUNTIME_MUTANTS}
    assert parts >= {
        "tower", "adapter", "decoder", "token table", "tokenizer", "prompt", "preprocessing",
        "KV cache", "batching", "speculation", "beams", "packing",
    }  # fmt: skip


@pytest.mark.parametrize(
    "form", [*_QUICK, *(pytest.param(form, marks=pytest.mark.slow) for form in _SLOW)]
)
def test_no_planted_fault_passes(form: str, checkpoint: Path, tmp_path: Path) -> None:
    outcomes = try_form(form, checkpoint, tmp_path)
    assert len(outcomes) >= 45
    _judge(outcomes)


def test_no_wrong_program_passes(checkpoint: Path, tmp_path: Path) -> None:
    good = tmp_path / "good"
    build(BuildOptions(checkpoint, choose_scheme("int8"), "cpu", good, questions=0))
    _judge(try_runtime(checkpoint, good))


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))]
)
def test_good_bundles_of_many_models_pass(seed: int, tmp_path: Path) -> None:
    path = small_checkpoint(tmp_path / "checkpoint", 100 + seed)
    stored = open_checkpoint(path)
    cases = draw_cases(
        draw_examples("synthetic", 3, replace(FRESH, seed=seed)),
        stored.spec,
        stored.tokenizer,
        seed,
    )
    for precision in ("int8", "int8-static", "int4-hybrid"):
        out = tmp_path / precision
        build(BuildOptions(path, choose_scheme(precision), "cpu", out, questions=0))
        failed = [str(f) for f in prove(read_bundle(out), stored, cases) if not f.passed]
        assert not failed


@pytest.mark.slow
def test_the_demo_passes_in_every_precision(tmp_path: Path) -> None:
    stored = open_checkpoint(DEMO)
    cases = draw_cases(draw_examples("synthetic", 3, FRESH), stored.spec, stored.tokenizer, 7)
    for target, precision in (("cpu", "int8"), ("cpu", "int4-all"), ("tensorrt", "int8")):
        out = tmp_path / f"{target}-{precision}"
        scheme = choose_scheme(precision, target=target)
        build(BuildOptions(DEMO, scheme, target, out, questions=0))
        failed = [str(f) for f in prove(read_bundle(out), stored, cases) if not f.passed]
        assert not failed


def test_the_rounded_engine_is_the_uncached_model(checkpoint: Path, tmp_path: Path) -> None:
    """float32: the reference of calls agrees with the model that has no cache."""
    stored = open_checkpoint(checkpoint)
    out = tmp_path / "fp32"
    build(BuildOptions(checkpoint, choose_scheme("fp32"), "cpu", out, questions=0))
    bundle = read_bundle(out)
    examples = draw_examples("synthetic", 2, FRESH)
    cases = draw_cases(examples, stored.spec, stored.tokenizer, 3)
    traces = StreamedModel(stored.spec, stored.read).run_blockwise(cases)
    talks = []
    for trace in traces:
        case, embeds = trace.case, trace.image_embeds
        assert embeds is not None
        talks.append(
            Conversation(case.pixels, case.pool_size, case.before, case.after, case.answer, embeds)
        )
    vision, decoder = (
        float_view(bundle.file(file), stored.spec) for file in ("vision.onnx", "decoder.onnx")
    )
    engine = RoundedEngine(stored.spec, vision, decoder, decoder, stored.read, 128)
    table = stored.read("decoder.embed_tokens.weight").numpy()
    seen = 0
    for result in replay_calls(engine, table, stored.spec, talks, True):
        trace = traces[result.sequence]
        assert trace.logits is not None and trace.image_embeds is not None
        prompt = len(trace.case.before) + len(trace.image_embeds) + len(trace.case.after)
        row = result.position - prompt + 1
        if result.position < 0:
            expected = trace.image_embeds
        elif row >= 0:
            expected = trace.logits[row]
        else:
            continue
        seen += 1
        distance = np.linalg.norm(centred(result.values) - centred(expected))
        assert distance < 1e-5 * np.linalg.norm(centred(expected)), result.call
    assert seen > 20


def test_rounding_follows_the_operators() -> None:
    """int8: against the operators' definitions, written out in numpy."""
    x = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)

    def weight(activation: str, static: tuple[float, int] | None = None) -> StoredWeight:
        nothing = np.zeros((1, 1), np.float32)
        return StoredWeight(
            "w", "int8", (40, 4), activation, 16, lambda: (nothing,) * 3, static=static
        )

    def found(kind: str, static: tuple[float, int] | None = None) -> np.ndarray:
        return round_activation(torch.from_numpy(x), weight(kind, static)).numpy()

    scale = np.abs(x).max(-1, keepdims=True) / 127
    np.testing.assert_allclose(found("int8-row"), np.round(x / scale) * scale, atol=1e-6)
    step = (x.max() - x.min()) / 255
    zero = np.round(-x.min() / step)
    levels = np.clip(np.round(x / step) + zero, 0, 255)
    np.testing.assert_allclose(found("int8-tensor"), (levels - zero) * step, atol=1e-6)
    clipped = np.clip(np.round(x / 0.01) + 100, 0, 255)
    np.testing.assert_allclose(found("int8-static", (0.01, 100)), (clipped - 100) * 0.01, atol=1e-6)
    signed = np.clip(np.round(x / 0.01), -128, 127)
    np.testing.assert_allclose(found("int8-signed", (0.01, 0)), signed * 0.01, atol=1e-6)
    parts = [x[:, :16], x[:, 16:32], x[:, 32:]]
    scales = [np.abs(part).max(-1, keepdims=True) / 127 for part in parts]
    blocks = [np.round(part / s) * s for part, s in zip(parts, scales, strict=True)]
    np.testing.assert_allclose(found("block"), np.concatenate(blocks, axis=1), atol=1e-6)
    same = fake_activation(torch.from_numpy(x), "int8-row").numpy()
    np.testing.assert_allclose(found("int8-row"), same, atol=1e-6)
