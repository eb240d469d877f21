"""Tries the table of mutants: builds a small model's bundle in one form, plants each
fault in a copy, and lets the proof judge.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from calibration.parts import FRESH
from calibration.samples import Case, draw_cases, draw_examples
from export.parity.cpu_reference import reference_session
from export.parity.proof import prove
from export.pipeline import BuildOptions, build
from export.schemes import choose_scheme
from runtime.contract.bundle import read_bundle
from runtime.contract.errors import InfMLLMError
from runtime.contract.spec import DecoderSpec, ModelSpec, VisionSpec
from runtime.session import load
from tests.mutants.edit import Edit, refresh
from tests.mutants.programs import RUNTIME_MUTANTS
from tests.mutants.table import MUTANTS
from trainer.checkpoint import StoredCheckpoint, open_checkpoint, save_checkpoint
from trainer.datasets.scene_text import corpus
from trainer.model import InfMLLM
from trainer.tokenize import build_tokenizer

__all__ = ["FORMS", "Outcome", "small_checkpoint", "try_form", "try_runtime"]

FORMS: dict[str, tuple[str, str, dict[str, str], bool]] = {
    "cpu/fp32": ("cpu", "fp32", {}, False),
    "cpu/fp16": ("cpu", "fp16", {}, False),
    "cpu/int8": ("cpu", "int8", {}, False),
    "cpu/int8 kv8": ("cpu", "int8", {"cache": "int8"}, False),
    "cpu/int8-static": ("cpu", "int8-static", {}, False),
    "cpu/int8-weights": ("cpu", "int8-weights", {}, False),
    "cpu/int4": ("cpu", "int4", {}, False),
    "cpu/int4-hybrid": ("cpu", "int4-hybrid", {}, False),
    "cpu/int4-all": ("cpu", "int4-all", {}, False),
    "cuda/fp16": ("cuda", "fp16", {}, False),
    "cuda/int8": ("cuda", "int8", {}, False),
    "cuda/int4": ("cuda", "int4", {}, False),
    "tensorrt/fp16 plain": ("tensorrt", "fp16", {}, False),
    "tensorrt/fp16 fused": ("tensorrt", "fp16", {}, True),
    "tensorrt/int8 plain": ("tensorrt", "int8", {}, False),
    "tensorrt/int8 fused": ("tensorrt", "int8", {}, True),
    "tensorrt/int8-weights plain": ("tensorrt", "int8-weights", {}, False),
    "tensorrt/int8-weights fused": ("tensorrt", "int8-weights", {}, True),
    "tensorrt/int4 plain": ("tensorrt", "int4", {}, False),
    "tensorrt/int4 fused": ("tensorrt", "int4", {}, True),
}
"""The forms of a bundle: target, precision, options of the scheme, and whether the fused
graphs are changed instead of the plain ones.
"""

_SPEC = ModelSpec(
    name="mutants",
    vision=VisionSpec(image_size=32, patch_size=8, width=32, layers=2, heads=4, mlp_width=64),
    decoder=DecoderSpec(
        vocab_size=960, hidden=64, layers=2, heads=4, kv_heads=2, mlp_width=96, context=128
    ),
    pool_sizes=(4, 2),
)
_SEED = 40499


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant in one form. `old` tells whether golden cases alone refuse
    it (None: not tried).
    """

    form: str
    name: str
    part: str
    caught: bool
    named: bool
    said: str
    old: bool | None = None


def small_checkpoint(path: Path, seed: int = 5) -> Path:
    """Saves a small random model in which every parameter matters: no bias is zero, and no
    norm is one.
    """
    model = InfMLLM(_SPEC, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * (0.2 if "norm" in name and "weight" in name else 0.05))
    tokenizer = build_tokenizer(corpus()).to_str()
    card = {"recipe": "random", "data": [{"name": "synthetic"}]}
    save_checkpoint(path, model, tokenizer, card)
    return path


def try_form(form: str, checkpoint: Path, folder: Path, old: bool = False) -> list[Outcome]:
    """Plants every applicable fault in one form. The unchanged bundle must pass."""
    target, precision, options, fused = FORMS[form]
    stored, cases = _cases(checkpoint)
    good = folder / form.replace("/", "-").replace(" ", "-")
    scheme = choose_scheme(precision, target=target, **options)  # type: ignore[arg-type]
    build(BuildOptions(checkpoint, scheme, target, good, allow_unverified=True, questions=0))
    judged = prove(read_bundle(good), stored, cases)
    assert all(finding.passed for finding in judged), [str(f) for f in judged if not f.passed]
    files = (
        ("vision-fused.onnx", "decoder-fused.onnx") if fused else ("vision.onnx", "decoder.onnx")
    )
    return list(_planted(form, good, folder / "mutant", stored, cases, files, old))


def _planted(
    form: str,
    good: Path,
    copy: Path,
    stored: StoredCheckpoint,
    cases: list[Case],
    files: tuple[str, str],
    old: bool,
) -> Iterator[Outcome]:
    for mutant in MUTANTS:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(good, copy)
        changed = mutant.change(Edit(copy, stored.spec, *files))
        if not changed:
            continue
        refresh(copy)
        said = _judge(copy, stored, cases)
        before = _golden_cases_refuse(copy, "fused" in files[0]) if old else None
        named = (changed if isinstance(changed, str) else mutant.place) in said
        yield Outcome(form, mutant.name, mutant.part, bool(said), named, said, before)
    shutil.rmtree(copy, ignore_errors=True)


def _judge(bundle: Path, stored: StoredCheckpoint, cases: list[Case]) -> str:
    """Returns what the proof says against a bundle; empty if nothing."""
    try:
        findings = prove(read_bundle(bundle), stored, cases)
    except InfMLLMError as error:
        return str(error)
    return next((str(finding) for finding in findings if not finding.passed), "")


def _golden_cases_refuse(path: Path, fused: bool) -> bool:
    try:
        bundle = read_bundle(path)
        session = load(path) if bundle.target == "cpu" else reference_session(bundle, fused)
        return not all(stage.passed for stage in session.replay())
    except InfMLLMError:
        return True


def try_runtime(checkpoint: Path, good: Path) -> list[Outcome]:
    """Runs every wrong program over a good bundle for the CPU."""
    stored, cases = _cases(checkpoint)
    outcomes = []
    for mutant in RUNTIME_MUTANTS:
        with _patched() as patch:
            mutant.change(patch)
            said = _judge(good, stored, cases)
        outcomes.append(Outcome("runtime", mutant.name, mutant.part, bool(said), True, said))
    return outcomes


@contextmanager
def _patched() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def _cases(checkpoint: Path) -> tuple[StoredCheckpoint, list[Case]]:
    stored = open_checkpoint(checkpoint)
    examples = draw_examples("synthetic", 3, FRESH)
    return stored, draw_cases(examples, stored.spec, stored.tokenizer, _SEED)
