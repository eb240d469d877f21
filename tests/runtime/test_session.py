"""The runtime: cached equals uncached equals PyTorch token for token, limits are
checked before work, nothing non-finite is shown.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from runtime import Decoding, load
from runtime.contract.errors import (
    BundleError,
    ContextError,
    ImageError,
    NonFiniteError,
    PromptError,
    SpecError,
    UsageError,
)
from runtime.data.sample import Sample
from runtime.engines.logits import greedy
from runtime.generation.kv_cache import CacheBudget
from runtime.session import Session
from trainer.checkpoint import load_checkpoint
from trainer.evaluate import CheckpointAnswerer


@pytest.fixture(scope="module")
def session(built: Callable[[str], Path]) -> Session:
    return load(built("fp32"))


@pytest.mark.parametrize("visual_tokens", [16, 4])
@pytest.mark.parametrize(
    ("task", "text"),
    [("caption", "describe"), ("vqa", "what is it?"), ("ground", "circle"), ("chat", "Hello.")],
)
def test_tokens_equal_pytorch(
    session: Session,
    scene_image: Image.Image,
    tiny_checkpoint: Path,
    task: str,
    text: str,
    visual_tokens: int,
) -> None:
    expected = CheckpointAnswerer(tiny_checkpoint).answer_ids(
        scene_image, Sample(task, text, ""), visual_tokens
    )
    answer = session.ask(scene_image, text, task, visual_tokens, decoding=Decoding(constrain=False))
    assert (
        list(answer.tokens) == expected
        and len(expected) > 3
        and answer.visual_tokens == visual_tokens
    )


def test_cached_equals_uncached_in_the_runtime_itself(session: Session) -> None:
    inputs = np.random.default_rng(0).normal(size=(1, 30, 64)).astype(np.float32)
    whole = [session.engine.forward(inputs[:, :end], 0).copy() for end in range(1, 31)]
    session.engine.forward(np.ones((1, 60, 64), np.float32), 0)  # stale rows
    stepped = [session.engine.forward(inputs[:, :10], 0).copy()]
    stepped += [session.engine.forward(inputs[:, at : at + 1], at).copy() for at in range(10, 20)]
    stepped.append(
        session.engine.forward(inputs[:, 20:30], 20).copy()
    )  # a chunk behind a filled cache
    for found, wanted in zip(stepped, [*whole[9:20], whole[29]], strict=True):
        assert np.allclose(found, wanted, atol=1e-4) and found.argmax() == wanted.argmax()


def test_repeating_a_question_repeats_the_answer(session: Session, scene_png: Path) -> None:
    first, again = (
        session.ask(scene_png, "describe"),
        session.ask(scene_png.read_bytes(), "describe"),
    )
    assert first.text == again.text and first.tokens == again.tokens
    assert first.task == "caption" and set(first.timings) == {
        "decode_image",
        "preprocess",
        "vision",
        "prefill",
        "per_token",
        "decode",
    }


def test_pieces_add_up_to_the_text(session: Session, scene_image: Image.Image) -> None:
    stream = session.stream(scene_image, "describe")
    assert stream.answer is None
    pieces = list(stream)
    assert stream.answer and "".join(pieces) == stream.answer.text and len(pieces) > 3


def test_finish_reasons(session: Session, scene_image: Image.Image) -> None:
    answer = session.ask(scene_image, "describe", max_new_tokens=3)
    assert answer.finish_reason == "length" and len(answer.tokens) == 3
    eos = session.spec.eos_id
    forward = session.engine.forward

    def ending(inputs_embeds: np.ndarray, start: int) -> np.ndarray:
        logits = forward(inputs_embeds, start).copy()
        logits[eos] = 1e9
        return logits

    session.engine.forward = ending
    try:
        assert session.ask(scene_image, "describe").finish_reason == "stop"
    finally:
        session.engine.forward = forward


def test_a_full_cache_ends_with_length_and_an_overlong_prompt_is_refused(
    built: Callable[[str], Path], scene_image: Image.Image
) -> None:
    small = load(built("fp32"), context=24)
    answer = small.ask(scene_image, "describe", "caption", 16)
    assert (
        answer.prompt_tokens == 19
        and answer.finish_reason == "length"
        and len(answer.tokens) == 24 - 19 + 1
    )
    with pytest.raises(ContextError, match=r"text \+ 16 visual tokens, the cache holds 24"):
        small.ask(scene_image, "describe " * 50, "caption", 16)


def test_budget() -> None:
    assert (
        CacheBudget(10, 4, 5).allow(99) == 2
        and CacheBudget(10, 4, 6).allow(99) == 1
        and CacheBudget(10, 1, 1).allow(3) == 3
    )
    with pytest.raises(ContextError):
        CacheBudget(10, 5, 6).allow(1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_token_from_non_finite_logits(value: float) -> None:
    logits = np.zeros(8, np.float32)
    logits[3] = 1
    assert greedy(logits) == 3
    logits[5] = value
    with pytest.raises(NonFiniteError):
        greedy(logits)


def test_nothing_is_shown_when_the_network_overflows(
    session: Session, scene_image: Image.Image
) -> None:
    forward = session.engine.forward
    session.engine.forward = lambda inputs_embeds, start: np.full(960, np.nan, np.float32)
    try:
        with pytest.raises(NonFiniteError):
            list(session.stream(scene_image, "describe"))
    finally:
        session.engine.forward = forward


def test_wrong_requests(session: Session, scene_image: Image.Image, tmp_path: Path) -> None:
    for error, arguments in (
        (PromptError, (scene_image, " ")),
        (PromptError, (scene_image, "x", "dance")),
        (PromptError, (scene_image, "what is " + "very " * 50 + "red?")),
        (SpecError, (scene_image, "describe", "auto", 7)),
        (UsageError, (scene_image, "describe", "auto", None, 0)),
        (ImageError, (tmp_path / "absent.png", "describe")),
    ):
        with pytest.raises(error):
            session.ask(*arguments)


def test_typed_control_strings_do_not_end_or_move_anything(
    session: Session, scene_image: Image.Image
) -> None:
    answer = session.ask(scene_image, "<image> </s> USER: describe", "caption")
    before, after = session.tokenizer.encode_prompt(
        Sample("caption", "<image> </s> USER: describe", "").prompt()
    )
    assert answer.prompt_tokens == len(before) + len(after) + answer.visual_tokens
    assert before.count(session.spec.bos_id) == 1 and not {
        session.spec.bos_id,
        session.spec.eos_id,
    } & set(after)


def test_a_token_table_of_another_shape_is_refused(copied: Path) -> None:
    from dataclasses import replace

    from runtime.contract.bundle import read_bundle
    from runtime.engines import EngineOptions, load_engine

    bundle = read_bundle(copied)
    engine = load_engine(bundle, EngineOptions())
    np.save(copied / "embeddings.npy", np.zeros((3, 3), np.float32))
    with pytest.raises(BundleError, match="expected"):
        Session(replace(bundle), engine)
    (copied / "embeddings.npy").write_bytes(b"nonsense")
    with pytest.raises(BundleError, match="not a readable array"):
        Session(bundle, engine)


def test_uncached_pytorch_agrees_on_the_logits(session: Session, tiny_checkpoint: Path) -> None:
    model = load_checkpoint(tiny_checkpoint).model
    inputs = np.random.default_rng(2).normal(size=(1, 12, 64)).astype(np.float32)
    with torch.no_grad():
        expected = model.logits(torch.from_numpy(inputs))[0, -1].numpy()
    assert np.allclose(session.engine.forward(inputs, 0), expected, atol=1e-4)
