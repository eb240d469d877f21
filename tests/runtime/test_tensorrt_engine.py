"""The TensorRT engine on a simulated GPU: the tokens of the graphs themselves, whatever
the form, the caching and the way of decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.parity.cpu_reference import ReferenceEngine
from runtime import Decoding, Question, Session, load
from runtime.contract.bundle import read_bundle
from runtime.contract.errors import ContextError
from runtime.contract.pooling import pool_matrix
from runtime.engines.tensorrt.engine import TensorRtEngine, _moves
from tests.runtime.conftest import Install
from tests.simulated_cuda import array_at, cudaError_t

GREEDY = Decoding(lookup=0, constrain=False)
FORMS = [False, True]
RNG = np.random.default_rng(8)


def reference(path: Path, fused: bool) -> Session:
    bundle = read_bundle(path)
    return Session(bundle, ReferenceEngine(bundle, fused, threads=1))


def engine_of(session: Session) -> TensorRtEngine:
    assert isinstance(session.engine, TensorRtEngine)
    return session.engine


@pytest.fixture
def bundle(built_tensorrt: Callable[[str], Path]) -> Path:
    return built_tensorrt("fp16")


@pytest.mark.parametrize("fused", FORMS)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_answers_are_those_of_the_graphs(
    built_tensorrt: Callable[[str], Path],
    gpu: Install,
    scene_image: Image.Image,
    precision: str,
    fused: bool,
) -> None:
    path, simulation = built_tensorrt(precision), gpu(fuses=fused)
    session, expected = load(path), reference(path, fused)
    assert simulation.built == (
        ["vision-fused.onnx", "decoder-fused.onnx"] if fused else ["vision.onnx", "decoder.onnx"]
    )
    questions = [
        ("describe", "caption", 16),
        ("what is it?", "vqa", 16),
        ("red circle", "ground", 4),
        ("describe", "caption", 16),
    ]
    for text, task, tokens in questions:
        for decoding in (GREEDY, Decoding(lookup=0), Decoding(lookup=0, temperature=0.9, seed=3)):
            launched = simulation.cuda.launched
            found = session.ask(scene_image, text, task, tokens, 25, decoding)
            assert (
                found.tokens == expected.ask(scene_image, text, task, tokens, 25, decoding).tokens
                and len(found.tokens) > 2
            )
            assert simulation.cuda.launched - launched >= len(found.tokens) - 1, (
                "each token was a launch of the captured step"
            )
    assert session.ask(scene_image, "what is it?", "vqa", 16, 25, GREEDY).cached_tokens >= 16


@pytest.mark.parametrize("fused", FORMS)
def test_rows_in_the_cache_are_as_good_as_new_ones(bundle: Path, gpu: Install, fused: bool) -> None:
    gpu(fuses=fused)
    engine = engine_of(load(bundle))
    inputs = RNG.normal(size=(1, 40, 64)).astype(np.float32)
    whole = [engine.forward(inputs[:, :end], 0).copy() for end in (1, 9, 10, 12, 30, 40)]
    engine.forward(RNG.normal(size=(1, 60, 64)).astype(np.float32), 0)  # stale rows
    stepped = [engine.forward(inputs[:, :1], 0).copy()]
    stepped.append(engine.forward(inputs[:, 1:9], 1).copy())
    stepped.append(engine.forward(inputs[:, 9:10], 9).copy())
    assert engine.greedy(inputs[:, 10:11], 10) == engine.forward(inputs[:, 10:11], 10).argmax()
    stepped.append(engine.forward(inputs[:, 11:12], 11).copy())
    stepped.append(engine.forward(inputs[:, 12:30], 12).copy())
    stepped.append(engine.verify(inputs[:, 30:40], 30)[-1].copy())
    for one, other in zip(whole, stepped, strict=True):
        assert np.allclose(one, other, atol=2e-2 * np.abs(one).max())


@pytest.mark.parametrize("fused", FORMS)
@pytest.mark.parametrize("length", [1, 5, 8, 11])
def test_verify_gives_each_positions_logits(
    bundle: Path, gpu: Install, fused: bool, length: int
) -> None:
    gpu(fuses=fused)
    engine = engine_of(load(bundle))
    inputs = RNG.normal(size=(1, 6 + length, 64)).astype(np.float32)
    engine.forward(inputs[:, :6], 0)
    stepped = np.stack(
        [engine.forward(inputs[:, at : at + 1], at).copy() for at in range(6, 6 + length)]
    )
    engine.forward(inputs[:, :6], 0)
    found = engine.verify(inputs[:, 6:], 6)
    assert found.shape == (length, 960) and np.allclose(
        found, stepped, atol=2e-2 * np.abs(stepped).max()
    )


def test_only_a_token_and_a_number_come_back(
    bundle: Path, gpu: Install, scene_image: Image.Image
) -> None:
    cuda = gpu().cuda
    session = load(bundle)
    session.ask(scene_image, "describe", max_new_tokens=2, decoding=GREEDY)
    cuda.brought.clear()
    answer = session.ask(scene_image, "describe", max_new_tokens=20, decoding=GREEDY)
    logits = 256 + 4 * 960  # the row, and the sum of its magnitudes before it
    assert cuda.brought.count(logits) == 1, "the prompt's"
    assert len(cuda.brought) <= len(answer.tokens) + 1 and sum(cuda.brought) < logits + 300 * len(
        answer.tokens
    )
    session.ask(
        scene_image,
        "describe",
        max_new_tokens=20,
        decoding=Decoding(temperature=1.0, seed=1, lookup=0),
    )
    assert cuda.brought.count(logits) > 10


def test_new_rows_move_in_one_copy_where_tensors_lie_evenly(bundle: Path, gpu: Install) -> None:
    cuda = gpu(fuses=False).cuda
    engine = engine_of(load(bundle))
    for length, copies in (
        (16, 1),
        (1, 4),
        (7, 4),
    ):  # 2 layers of keys and values; a row of both heads is 64 bytes
        cuda.calls.clear()
        engine.forward(np.ones((1, length, 64), np.float32), 0)
        assert cuda.calls.count("cudaMemcpy2DAsync") == copies


@pytest.mark.parametrize(
    "fault", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"]
)
@pytest.mark.parametrize("fused", FORMS)
def test_without_a_captured_step_the_tokens_are_the_same(
    bundle: Path,
    gpu: Install,
    scene_image: Image.Image,
    capfd: pytest.CaptureFixture[str],
    fused: bool,
    fault: str,
) -> None:
    cuda = gpu(fuses=fused).cuda
    cuda.fails[fault] = [cudaError_t.cudaErrorStreamCaptureUnsupported]
    session = load(bundle)
    assert "the decoding step cannot be captured" in capfd.readouterr().err
    found = session.ask(scene_image, "describe", max_new_tokens=20, decoding=GREEDY)
    assert cuda.launched == 0
    assert (
        found.tokens
        == reference(bundle, fused)
        .ask(scene_image, "describe", max_new_tokens=20, decoding=GREEDY)
        .tokens
    )
    beams = Decoding(beams=3, constrain=False)  # rebinds the context to other caches and back
    assert session.ask(scene_image, "describe", max_new_tokens=9, decoding=beams).tokens
    assert (
        session.ask(scene_image, "describe", max_new_tokens=20, decoding=GREEDY).tokens
        == found.tokens
    )


def test_a_smaller_context_takes_the_plain_decoder(
    bundle: Path, gpu: Install, scene_image: Image.Image, capfd: pytest.CaptureFixture[str]
) -> None:
    simulation = gpu()
    session = load(bundle, context=96)
    assert "--context 96 uses the slower plain decoder" in capfd.readouterr().err
    assert session.engine.capacity == 96 and simulation.built == [
        "vision-fused.onnx",
        "decoder.onnx",
    ]
    found = session.ask(scene_image, "describe", max_new_tokens=20, decoding=GREEDY)
    assert (
        found.tokens
        == reference(bundle, False)
        .ask(scene_image, "describe", max_new_tokens=20, decoding=GREEDY)
        .tokens
    )
    with pytest.raises(ContextError, match="the cache holds 96"):
        session.ask(scene_image, "word " * 90)
    assert load(bundle, context=500).engine.capacity == 128


@pytest.mark.parametrize("fused", FORMS)
def test_several_at_once_are_as_one_by_one(
    bundle: Path, gpu: Install, scene_image: Image.Image, fused: bool
) -> None:
    cuda = gpu(fuses=fused).cuda
    session = load(bundle)
    tasks = [
        ("describe", "caption"),
        ("what is it?", "vqa"),
        ("Hello there.", "chat"),
        ("red circle", "ground"),
    ]
    questions = [
        Question(scene_image, text, task, 16, 4 + 6 * i) for i, (text, task) in enumerate(tasks)
    ]
    alone = [
        session.ask(q.image, q.text, q.task, q.visual_tokens, q.max_new_tokens, Decoding(lookup=0))
        for q in questions
    ]
    before = cuda.used
    together = session.ask_many(questions)
    assert [a.tokens for a in together] == [a.tokens for a in alone]
    assert cuda.used == before, "the slots' caches are given back"


def test_beams_do_not_depend_on_the_form(
    bundle: Path, gpu: Install, scene_image: Image.Image
) -> None:
    found = []
    for fused in FORMS:
        gpu(fuses=fused)
        session = load(bundle)
        found.append(
            session.ask(
                scene_image,
                "describe",
                max_new_tokens=20,
                decoding=Decoding(beams=4, constrain=False),
            ).tokens
        )
        assert (
            session.ask(scene_image, "describe", max_new_tokens=20, decoding=GREEDY).tokens
            != found[-1]
        )
    assert found[0] == found[1] and len(found[0]) > 5


def test_slots_take_each_others_rows_all_at_once(bundle: Path, gpu: Install) -> None:
    cuda = gpu(fuses=False).cuda
    engine = engine_of(load(bundle))
    batch = engine.batch(4, 40)

    def held() -> list[np.ndarray]:
        engine._machine.device.wait()
        return [
            np.stack(
                [array_at(cuda, at, np.float16, (2, 128, 16)).copy() for _, at in slot.addresses()]
            )
            for slot in batch._caches[:4]
        ]

    for slot in range(4):
        engine.forward(RNG.normal(size=(1, 20, 64)).astype(np.float32), 0)
        batch.fill(slot, 20)
    for sources in (
        [1, 0, 3, 2],
        [1, 2, 3, 0],
        [3, 3, 0, 0],
        [2, 2, 2, 2],
        [0, 1, 2, 3],
        [3, 1],
        [1, 1, 0, 2],
    ):
        before = held()
        batch.copy(sources, 5, 17)
        after = held()
        for slot in range(4):
            expected = before[slot].copy()
            if slot < len(sources):
                expected[:, :, 5:17] = before[sources[slot]][:, :, 5:17]
            assert np.array_equal(after[slot], expected), (sources, slot)


@pytest.mark.parametrize("seed", range(30))
def test_moves_are_one_assignment(seed: int) -> None:
    rng = np.random.default_rng(seed)
    slots = int(rng.integers(1, 9))
    sources = rng.integers(0, slots, int(rng.integers(1, slots + 1))).tolist()
    held = [*range(slots), -1]
    for target, source in _moves(sources, slots):
        held[target] = held[source]
    assert held[: len(sources)] == sources and held[len(sources) : slots] == list(
        range(len(sources), slots)
    )


def test_each_picture_and_pool_size_is_embedded(bundle: Path, gpu: Install) -> None:
    gpu()
    engine, expected = (
        load(bundle).engine,
        ReferenceEngine(read_bundle(bundle), fused=True, threads=1),
    )
    pixels = RNG.normal(size=(3, 3, 32, 32)).astype(np.float32)
    for p in (4, 2, 1):
        found = engine.embed_image(pixels, pool_matrix(4, p))
        assert found.shape == (3, p * p, 64)
        assert np.allclose(
            found,
            [expected.embed_image(one[None], pool_matrix(4, p))[0] for one in pixels],
            atol=1e-3,
        )
