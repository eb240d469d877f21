"""The engine for the TensorRT-RTX plugin, its calls on the CPU's memory, and what a
machine without plugin or GPU is told.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

import runtime.engines
from runtime.contract.bundle import read_bundle
from runtime.contract.errors import EngineError, NonFiniteError
from runtime.contract.graphs import INPUTS_EMBEDS
from runtime.data.sample import Sample
from runtime.engines import EngineOptions, load_engine
from runtime.engines.onnxruntime.io_binding import HOST
from runtime.engines.onnxruntime.tensorrt_rtx import RTX, OrtRtxEngine, _provider_options
from runtime.generation.decoding import Decoding
from runtime.questions import Question
from runtime.session import Session
from tests.conftest import TINY
from trainer.evaluate import CheckpointAnswerer

HIDDEN = TINY.decoder.hidden


@pytest.fixture
def session(built_for: Callable[[str, str], Path]) -> Session:
    bundle = read_bundle(built_for("rtx", "fp16"))
    return Session(bundle, OrtRtxEngine(bundle, EngineOptions(threads=1), HOST))


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A plugin package whose library is not there."""
    module = ModuleType("onnxruntime_ep_nv_tensorrt_rtx")
    module.get_library_path = lambda: "/nowhere/libplugin.so"  # type: ignore[attr-defined]
    module.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_answers_are_pytorchs(
    session: Session, tiny_checkpoint: Path, scene_image: Image.Image
) -> None:
    assert all(stage.passed for stage in session.replay())
    sample = Sample("vqa", "what colour is the circle?", "")
    expected = CheckpointAnswerer(tiny_checkpoint).answer_ids(scene_image, sample, None)[:10]
    assert (
        list(session.ask(scene_image, sample.text, task="vqa", max_new_tokens=10).tokens)
        == expected
        and len(expected) > 2
    )


def test_caches_are_written_in_place_and_rows_behind_do_not_count(session: Session) -> None:
    engine, inputs = (
        session.engine,
        np.random.default_rng(0).normal(size=(1, 9, HIDDEN)).astype(np.float32) * 0.1,
    )
    whole = engine.forward(inputs, 0).copy()
    engine.forward(inputs[:, :8] * 40, 0)
    engine.forward(inputs[:, :5], 0)
    for at in range(5, 9):
        stepped = engine.forward(inputs[:, at : at + 1], at)
    np.testing.assert_allclose(stepped, whole, atol=2e-2 * np.abs(whole).max())
    assert engine.greedy(inputs[:, 8:], 8) == stepped.argmax()
    with pytest.raises(NonFiniteError, match="no token was taken"):
        engine.greedy(inputs[:, :1] * np.nan, 0)


def test_questions_together_and_beams_equal_those_apart(
    session: Session, scene_image: Image.Image
) -> None:
    questions = [
        Question(scene_image, text, "vqa", max_new_tokens=count)
        for text, count in (("what?", 3), ("how many?", 7))
    ]
    together = session.ask_many(questions)
    apart = [
        session.ask(q.image, q.text, q.task, max_new_tokens=q.max_new_tokens) for q in questions
    ]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in apart]
    batch = session.engine.batch(2, 20)
    batch.fill(0, 9)
    batch.fill(1, 9)
    inputs = np.random.default_rng(1).normal(size=(2, 1, HIDDEN)).astype(np.float32) * 0.1
    first = batch.step(inputs, np.array([9, 9], np.int32))
    batch.copy([1, 0], 9, 10)
    batch.copy([1, 0], 9, 10)
    assert np.array_equal(batch.step(inputs, np.array([9, 9], np.int32)), first)
    beams = session.ask(scene_image, "describe", max_new_tokens=5, decoding=Decoding(beams=2))
    assert len(beams.tokens) > 0


def test_without_the_plugin_there_is_one_clear_line(built_for: Callable[[str, str], Path]) -> None:
    with pytest.raises(
        EngineError,
        match=r"plugin is not installed; run: pip install onnxruntime-ep-nv-tensorrt-rtx-cu13 "
        r".*doctor --target rtx",
    ):
        load_engine(read_bundle(built_for("rtx", "fp16")), EngineOptions())


def test_a_plugin_that_does_not_load_is_named_with_the_reason(
    built_for: Callable[[str, str], Path], plugin: ModuleType
) -> None:
    with pytest.raises(
        EngineError, match=r"plugin does not load: .*/nowhere/libplugin.so.*needs an NVIDIA driver"
    ) as caught:
        load_engine(read_bundle(built_for("rtx", "fp16")), EngineOptions())
    assert "\n" not in str(caught.value)


def test_a_plugin_without_a_gpu_says_so(
    built_for: Callable[[str, str], Path], plugin: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered: list[tuple[str, str]] = []
    monkeypatch.setattr(
        ort, "register_execution_provider_library", lambda *names: registered.append(names)
    )
    with pytest.raises(EngineError, match="finds no RTX GPU; it needs Ampere or newer"):
        load_engine(read_bundle(built_for("rtx", "fp16")), EngineOptions())
    assert registered == [(RTX.provider, "/nowhere/libplugin.so")]


def test_a_tensorrt_bundle_runs_in_the_plugin_where_tensorrt_is_not_installed(
    built_for: Callable[[str, str], Path],
    plugin: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made: list[str] = []

    def absent(target: runtime.engines.Target, *_: object) -> object:
        made.append(target.name)
        if target.name == "tensorrt":
            raise ModuleNotFoundError("No module named 'tensorrt'", name="tensorrt")
        return "the engine"

    monkeypatch.setattr(runtime.engines, "_create", absent)
    bundle = read_bundle(built_for("tensorrt", "fp16"))
    assert load_engine(bundle, EngineOptions()) == "the engine" and made == ["tensorrt", "rtx"]
    assert "plugin on a desktop RTX GPU runs this bundle" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, plugin.__name__)
    with pytest.raises(
        EngineError, match=r"target tensorrt needs tensorrt, which is not installed; .*\[tensorrt\]"
    ):
        load_engine(bundle, EngineOptions())


def test_profiles_reach_from_one_token_to_the_whole_context(
    built_for: Callable[[str, str], Path],
) -> None:
    bundle, spec = read_bundle(built_for("rtx", "fp16")), TINY.decoder
    options = _provider_options(
        bundle, EngineOptions(), {INPUTS_EMBEDS: (1, spec.context, spec.hidden)}
    )
    cache = f"key_cache.0:1x{spec.kv_heads}x{spec.context}x{spec.head_dim}"
    assert options["nv_profile_min_shapes"].startswith(
        f"{INPUTS_EMBEDS}:1x1x{spec.hidden},{cache},"
    )
    assert options["nv_profile_max_shapes"].startswith(
        f"{INPUTS_EMBEDS}:1x{spec.context}x{spec.hidden},{cache},"
    )
    assert Path(options["nv_runtime_cache_path"]).is_dir()
