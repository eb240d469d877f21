"""Caches: what is reused is the same to the bit, in every precision; damage and limits
cost time, never an answer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime import Decoding, Question, Session, load
from runtime.contract.bundle import cache_folder
from runtime.contract.errors import EngineError, ImageError, UsageError
from runtime.generation.image_cache import EmbeddedImage, ImageEmbeddingCache

QUESTIONS = [
    ("caption", "describe"),
    ("vqa", "what is it?"),
    ("ground", "circle"),
    ("chat", "Hello."),
    ("vqa", "how many are there?"),
]
ALL_PRECISIONS = ["fp32", "int8", "int4", "int4-hybrid"]


class Counted:
    """Counts calls of an engine, and rows of prompts."""

    def __init__(self, session: Session) -> None:
        self.images, self.rows = 0, 0
        embed, forward = session.engine.embed_image, session.engine.forward

        def counted_embed(pixels: np.ndarray, pool: np.ndarray) -> np.ndarray:
            self.images += 1
            return embed(pixels, pool)

        def counted_forward(inputs_embeds: np.ndarray, start: int) -> np.ndarray:
            self.rows += inputs_embeds.shape[1] if inputs_embeds.shape[1] > 1 else 0
            return forward(inputs_embeds, start)

        session.engine.embed_image, session.engine.forward = counted_embed, counted_forward


@pytest.mark.parametrize("precision", ALL_PRECISIONS)
def test_answers_with_and_without_cached_rows_are_the_same(
    built: Callable[[str], Path], scene_image: Image.Image, precision: str
) -> None:
    session, fresh = load(built(precision)), load(built(precision))
    other = scene_image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    reused = 0
    for image in (scene_image, other, scene_image):
        for task, text in QUESTIONS:
            fresh.runner.prefix_cache.clear()
            expected, answer = fresh.ask(image, text, task), session.ask(image, text, task)
            assert (answer.tokens, answer.text) == (
                expected.tokens,
                expected.text,
            ) and expected.cached_tokens == 0
            reused += answer.cached_tokens > 0
    assert reused == 6, (
        "caption, vqa and ground share what comes before and with the image: the chat in between "
        "does not"
    )


def test_logits_behind_cached_rows_are_bit_identical(
    built: Callable[[str], Path], scene_image: Image.Image
) -> None:
    """8-bit activations take one range per call: only equal calls give equal numbers,
    so segments are never computed together.
    """
    session = load(built("int8"))
    seen: list[np.ndarray] = []
    forward = session.engine.forward

    def kept(inputs_embeds: np.ndarray, start: int) -> np.ndarray:
        logits = forward(inputs_embeds, start)
        seen.append(logits.copy())
        return logits

    session.engine.forward = kept
    session.ask(scene_image, "what is it?", "vqa", max_new_tokens=4)
    uncached = seen[1:]
    seen.clear()
    session.ask(scene_image, "describe", "caption", max_new_tokens=4)
    seen.clear()
    session.ask(scene_image, "what is it?", "vqa", max_new_tokens=4)
    assert len(seen) == len(uncached) == 4 and all(
        np.array_equal(a, b) for a, b in zip(seen, uncached, strict=True)
    )


def test_a_second_question_computes_neither_image_nor_its_rows(
    built: Callable[[str], Path], scene_png: Path
) -> None:
    session = load(built("fp32"))
    counted = Counted(session)
    first = session.ask(scene_png, "describe the image", "caption")
    assert counted.images == 1 and counted.rows == first.prompt_tokens
    counted.rows = 0
    second = session.ask(scene_png.read_bytes(), "what is it?", "vqa")
    assert (
        counted.images == 1
        and counted.rows == second.prompt_tokens - second.cached_tokens
        and second.cached_tokens > 16
    )
    assert second.timings["vision"] == second.timings["decode_image"] == 0
    session.ask(scene_png, "what is it?", "vqa", 4)
    assert counted.images == 2, "another number of visual tokens is another embedding"


def test_beams_and_batches_leave_the_cache_usable(
    built: Callable[[str], Path], scene_image: Image.Image
) -> None:
    session, fresh = load(built("fp32")), load(built("fp32"))
    expected = fresh.ask(scene_image, "what is it?", "vqa").tokens
    session.ask(scene_image, "describe", "caption", decoding=Decoding(beams=3))
    answer = session.ask(scene_image, "what is it?", "vqa")
    assert answer.tokens == expected and answer.cached_tokens > 16
    session.replay()
    again = session.ask(scene_image, "what is it?", "vqa")
    assert again.tokens == expected and again.cached_tokens == 0, (
        "the self-test wrote over the rows"
    )


@pytest.mark.parametrize("other", ["ask", "ask_many", "self-test", "clear"])
def test_a_stream_that_was_overtaken_says_so(
    built: Callable[[str], Path], scene_image: Image.Image, other: str
) -> None:
    session = load(built("fp32"))
    first = session.stream(scene_image, "describe", "caption", decoding=Decoding(lookup=0))
    pieces = iter(first)
    next(pieces)
    uses = {
        "ask": lambda: session.ask(scene_image, "what is it?", "vqa"),
        "ask_many": lambda: session.ask_many([Question(scene_image, "what is it?", "vqa")]),
        "self-test": lambda: session.replay(),
        "clear": session.clear_caches,
    }
    uses[other]()
    with pytest.raises(UsageError, match="used again before this stream was read"):
        list(pieces)
    with pytest.raises(UsageError, match="ended in an error"):
        first.finish()
    expected = load(built("fp32")).ask(scene_image, "what is it?", "vqa")
    assert session.ask(scene_image, "what is it?", "vqa").tokens == expected.tokens


def test_an_answer_left_unread_harms_nothing(
    built: Callable[[str], Path], scene_image: Image.Image
) -> None:
    session = load(built("fp32"))
    expected = load(built("fp32")).ask(scene_image, "describe", "caption").tokens
    next(iter(session.stream(scene_image, "what is it?", "vqa")))
    assert session.ask(scene_image, "describe", "caption").tokens == expected


def test_a_failing_engine_leaves_no_rows_behind(
    built: Callable[[str], Path], scene_image: Image.Image
) -> None:
    session = load(built("fp32"))
    expected = session.ask(scene_image, "what is it?", "vqa").tokens
    forward = session.engine.forward

    def failing(inputs_embeds: np.ndarray, start: int) -> np.ndarray:
        forward(inputs_embeds, start)
        raise EngineError("lost")

    session.engine.forward = failing
    with pytest.raises(EngineError):
        session.ask(scene_image, "Hello.", "chat")
    session.engine.forward = forward
    assert session.ask(scene_image, "what is it?", "vqa").tokens == expected


def test_another_process_finds_the_embeddings(
    built: Callable[[str], Path], scene_png: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFMLLM_CACHE", str(tmp_path))
    first, second = (load(built("int8"), image_cache=1 << 20) for _ in range(2))
    expected = first.ask(scene_png, "describe")
    counted = Counted(second)
    answer = second.ask(scene_png, "where is the circle?")
    assert counted.images == 0 and answer.timings["decode_image"] == 0
    assert answer.boxes[0].box == first.ask(scene_png, "where is the circle?").boxes[0].box, (
        "the image's size travels with its embeddings"
    )
    assert second.ask(scene_png, "describe").tokens == expected.tokens
    (file,) = (cache_folder() / "images").iterdir()
    assert file.stat().st_mode & 0o077 == 0, "for this user only"
    other = load(built("fp32"), image_cache=1 << 20)
    counted = Counted(other)
    other.ask(scene_png, "describe")
    assert counted.images == 1, "another bundle's embeddings are other numbers"


@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "empty"])
def test_damaged_embeddings_are_made_again(
    damage: str,
    built: Callable[[str], Path],
    scene_png: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("INFMLLM_CACHE", str(tmp_path))
    expected = load(built("fp32"), image_cache=1 << 20).ask(scene_png, "describe")
    (file,) = (cache_folder() / "images").iterdir()
    data = bytearray(file.read_bytes())
    data[-5] ^= 64
    flipped = bytes(data)
    file.write_bytes(
        {"flip": flipped, "truncate": flipped[:-9], "extend": flipped + b"x", "empty": b""}[damage]
    )
    session = load(built("fp32"), image_cache=1 << 20)
    counted = Counted(session)
    assert session.ask(scene_png, "describe").tokens == expected.tokens and counted.images == 1


def test_the_disk_cache_stays_within_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFMLLM_CACHE", str(tmp_path))
    size = 4 * 4 * 8 + 48
    cache = ImageEmbeddingCache("bundle", 8, memory=1, disk=3 * size)
    for index in range(6):
        cache.put(f"image {index}", 2, EmbeddedImage(np.full((4, 8), index, np.float32), (3, 5)))
        for age, file in enumerate(
            sorted((tmp_path / "images").iterdir(), key=lambda f: f.stat().st_mtime_ns)
        ):
            os.utime(file, ns=(10**9 * age, 10**9 * age))
    assert len(list((tmp_path / "images").iterdir())) == 3
    fresh = ImageEmbeddingCache("bundle", 8, disk=3 * size)
    assert fresh.get("image 0", 2) is None
    found = fresh.get("image 5", 2)
    assert found and found.size == (3, 5) and (found.embeds == 5).all()
    ImageEmbeddingCache("bundle", 8, disk=size - 1).put("too large", 2, found)
    assert ImageEmbeddingCache("bundle", 8, disk=size).get("too large", 2) is None


def test_memory_is_bounded() -> None:
    cache = ImageEmbeddingCache("bundle", 8, memory=3 * 128)
    for index in range(5):
        cache.put(f"{index}", 2, EmbeddedImage(np.zeros((4, 8), np.float32), (1, 1)))
    assert [cache.get(f"{index}", 2) is not None for index in range(5)] == [
        False,
        False,
        True,
        True,
        True,
    ]


def test_a_disk_that_cannot_be_written_costs_nothing(
    built: Callable[[str], Path], scene_png: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(built("fp32"))  # verified, so that no mark need be written
    (tmp_path / "images").write_text("a file where the folder should be")
    monkeypatch.setenv("INFMLLM_CACHE", str(tmp_path))
    assert load(built("fp32"), image_cache=1 << 20).ask(scene_png, "describe").text


def test_a_damaged_picture_is_still_refused_by_name(
    built: Callable[[str], Path], scene_png: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(scene_png.read_bytes()[:200])
    with pytest.raises(ImageError, match=r"broken\.png is truncated"):
        load(built("fp32")).ask(broken, "describe")
