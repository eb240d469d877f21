"""The engine for ONNX Runtime's CUDA provider, its graphs and calls on the CPU's
memory: answers, caches, drafts, batches; and what it refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from PIL import Image

from runtime.contract.bundle import DECODER, read_bundle
from runtime.contract.errors import BundleError, EngineError, NonFiniteError
from runtime.data.sample import Sample
from runtime.engines import TARGETS, EngineOptions, load_engine
from runtime.engines.logits import greedy
from runtime.engines.onnxruntime.cuda import CUDA, OrtCudaEngine
from runtime.engines.onnxruntime.io_binding import HOST, Bound, Device
from runtime.generation.decoding import Decoding
from runtime.questions import Question
from runtime.session import Session
from tests.conftest import TINY
from trainer.evaluate import CheckpointAnswerer

HIDDEN, WHOLE = TINY.decoder.hidden, TINY.decoder.context


@pytest.fixture
def session(built_for: Callable[[str, str], Path]) -> Session:
    bundle = read_bundle(built_for("cuda", "fp16"))
    return Session(bundle, OrtCudaEngine(bundle, EngineOptions(threads=1), HOST))


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, count, HIDDEN)).astype(np.float32) * 0.1


def test_answers_are_pytorchs(
    session: Session, tiny_checkpoint: Path, scene_image: Image.Image
) -> None:
    reference = CheckpointAnswerer(tiny_checkpoint)
    for sample in (
        Sample("caption", "describe", ""),
        Sample("vqa", "what colour is the circle?", ""),
    ):
        expected = reference.answer_ids(scene_image, sample, None)[:10]
        found = session.ask(scene_image, sample.text, task=sample.task, max_new_tokens=10)
        assert list(found.tokens) == expected and len(expected) > 2


def test_cached_steps_equal_one_call(session: Session) -> None:
    engine, inputs = session.engine, rows(12)
    whole = engine.forward(inputs, 0)
    engine.forward(inputs[:, :5], 0)
    for at in range(5, 12):
        stepped = engine.forward(inputs[:, at : at + 1], at)
    np.testing.assert_allclose(stepped, whole, atol=2e-2 * np.abs(whole).max())
    assert stepped.argmax() == whole.argmax()


def test_a_step_does_not_see_rows_behind_it(session: Session) -> None:
    """A decoding step names the whole cache as its length: rows of an earlier, longer
    question must not count.
    """
    engine, inputs = session.engine, rows(6)
    engine.forward(inputs[:, :5], 0)
    clean = engine.forward(inputs[:, 5:], 5).copy()
    engine.forward(rows(40, seed=9) * 50, 0)
    engine.forward(inputs[:, :5], 0)
    assert np.array_equal(engine.forward(inputs[:, 5:], 5), clean)


def test_the_token_chosen_by_the_graph_is_the_logits_first_best(session: Session) -> None:
    engine = session.engine
    assert isinstance(engine, OrtCudaEngine)
    for seed in range(5):
        inputs = rows(3, seed)
        assert engine.greedy(inputs, 0) == greedy(engine.forward(inputs, 0))


def test_no_token_is_taken_from_logits_that_are_not_finite(session: Session) -> None:
    engine = session.engine
    assert isinstance(engine, OrtCudaEngine)
    with pytest.raises(NonFiniteError, match="no token was taken"):
        engine.greedy(np.full((1, 1, HIDDEN), np.nan, np.float32), 0)


def test_drafts_are_checked_as_steps_would_be(session: Session) -> None:
    engine, inputs = session.engine, rows(8)
    engine.forward(inputs[:, :4], 0)
    several = engine.verify(inputs[:, 4:], 4)
    engine.forward(inputs[:, :4], 0)
    one_by_one = np.stack([engine.forward(inputs[:, at : at + 1], at) for at in range(4, 8)])
    assert several.shape == one_by_one.shape == (4, TINY.decoder.vocab_size)
    np.testing.assert_allclose(several, one_by_one, atol=2e-2 * np.abs(one_by_one).max())


def test_a_prefix_is_reused_without_changing_the_answer(
    session: Session, scene_image: Image.Image
) -> None:
    first = session.ask(scene_image, "describe", max_new_tokens=8)
    second = session.ask(scene_image, "what shape is it?", task="vqa", max_new_tokens=8)
    assert first.cached_tokens == 0 and second.cached_tokens > 0
    session.clear_caches()
    assert (
        session.ask(scene_image, "what shape is it?", task="vqa", max_new_tokens=8).tokens
        == second.tokens
    )


def test_questions_asked_together_are_answered_as_apart(
    session: Session, scene_image: Image.Image
) -> None:
    questions = [
        Question(scene_image, text, "vqa", max_new_tokens=count)
        for text, count in (("what?", 3), ("how many?", 9), ("which?", 6))
    ]
    together = session.ask_many(questions)
    apart = [
        session.ask(q.image, q.text, q.task, max_new_tokens=q.max_new_tokens) for q in questions
    ]
    assert [answer.tokens for answer in together] == [answer.tokens for answer in apart]


def test_beams_find_what_they_find_on_the_cpu_target(
    session: Session, built: Callable[[str], Path], scene_image: Image.Image
) -> None:
    from runtime.session import load

    decoding = Decoding(beams=3)
    ours = session.ask(scene_image, "describe", max_new_tokens=6, decoding=decoding)
    assert (
        ours.tokens
        == load(built("fp32"), threads=1)
        .ask(scene_image, "describe", max_new_tokens=6, decoding=decoding)
        .tokens
    )


def test_a_step_changes_nothing_on_the_host(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a captured graph replays: the same buffers, the same total length, only
    embeddings and row number new.
    """
    engine = session.engine
    assert isinstance(engine, OrtCudaEngine)
    engine.forward(rows(1), 7)
    written: list[set[str]] = []
    plain = Bound.write

    def write(self: Bound, arrays: dict[str, np.ndarray]) -> None:
        written.append(set(arrays))
        plain(self, arrays)

    monkeypatch.setattr(Bound, "write", write)
    engine.forward(rows(1), 8)
    assert written == [{"inputs_embeds", "seqlens_k"}]
    step = next(call for shape, call in engine._calls.items() if shape.length == 1)
    assert int(step.read("total_sequence_length")) == WHOLE


def test_without_the_provider_there_is_one_clear_line(
    built_for: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(
        EngineError,
        match=r"has no CUDAExecutionProvider; .*pip install 'onnxruntime-gpu\[cuda,cudnn\]'",
    ) as caught:
        load_engine(read_bundle(built_for("cuda", "fp16")), EngineOptions())
    assert "\n" not in str(caught.value) and TARGETS["cuda"].extra == "gpu"


def test_a_session_that_fell_back_to_the_cpu_is_refused(
    built_for: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime goes on without a provider whose libraries are missing. Here the
    name is on its list, and nothing is behind it.
    """
    monkeypatch.setattr(
        ort, "get_available_providers", lambda: [CUDA.provider, "CPUExecutionProvider"]
    )
    bundle = read_bundle(built_for("cuda", "fp16"))
    with pytest.raises(EngineError, match=r"cannot run on the GPU: .*infmllm-export doctor"):
        OrtCudaEngine(bundle, EngineOptions(threads=1))
    absent = Device(
        "CUDAExecutionProvider", "cpu"
    )  # not told to forbid the CPU: the session itself is asked
    with pytest.raises(
        EngineError, match="would run on CPUExecutionProvider, not CUDAExecutionProvider"
    ):
        OrtCudaEngine(bundle, EngineOptions(threads=1), absent)


def test_graphs_of_another_model_are_refused(
    built_for: Callable[[str, str], Path], built: Callable[[str], Path], tmp_path: Path
) -> None:
    import shutil
    from dataclasses import replace

    folder = Path(shutil.copytree(built_for("cuda", "fp16"), tmp_path / "mixed"))
    for name in (DECODER, "decoder.weights"):
        shutil.copyfile(built("fp16") / name, folder / name)
    bundle = replace(read_bundle(built_for("cuda", "fp16")), path=folder)
    with pytest.raises(BundleError, match="do not belong together"):
        OrtCudaEngine(bundle, EngineOptions(threads=1), HOST)
