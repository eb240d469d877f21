"""Caches: what is reused is the same to the bit, in every precision; damage and limits cost time, never an answer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime import Decoding, Question, Session, load
from runtime.contract.bundle import cache_folder
from runtime.contract.errors import ContextError, EngineError, ImageError, PromptError, UsageError
from runtime.contract.prompt import render
from runtime.features import FeatureCache, Features
from runtime.selftest import replay

QUESTIONS = [("caption", "describe"), ("vqa", "what is it?"), ("ground", "circle"), ("chat", "Hello."), ("vqa", "how many are there?")]
ALL_PRECISIONS = ["fp32", "int8", "int4", "int4-hybrid"]


class Counted:
    """Counts calls of an engine, and rows of prompts."""

    def __init__(self, session: Session) -> None:
        self.images, self.rows = 0, 0
        embed, forward = session.engine.embed_image, session.engine.forward

        def counted_embed(*arguments: np.ndarray) -> np.ndarray:
            self.images += 1
            return embed(*arguments)

        def counted_forward(inputs: np.ndarray, start: int) -> np.ndarray:
            self.rows += inputs.shape[1] if inputs.shape[1] > 1 else 0
            return forward(inputs, start)

        session.engine.embed_image, session.engine.forward = counted_embed, counted_forward  # type: ignore[method-assign]


@pytest.mark.parametrize("precision", ALL_PRECISIONS)
def test_answers_with_and_without_cached_rows_are_the_same(built: Callable[[str], Path], scene_image: Image.Image, precision: str) -> None:
    session, fresh = load(built(precision)), load(built(precision))
    other = scene_image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    reused = 0
    for image in (scene_image, other, scene_image):
        for task, text in QUESTIONS:
            fresh.prefix.forget()
            expected, answer = fresh.ask(image, text, task), session.ask(image, text, task)
            assert (answer.tokens, answer.text) == (expected.tokens, expected.text) and expected.cached_tokens == 0
            reused += answer.cached_tokens > 0
    assert reused == 6, "caption, vqa and ground share what comes before and with the image: the chat in between does not"


def test_logits_behind_cached_rows_are_bit_identical(built: Callable[[str], Path], scene_image: Image.Image) -> None:
    """8-bit activations take one range per call: only equal calls give equal numbers, so segments are never computed together."""
    session = load(built("int8"))
    seen: list[np.ndarray] = []
    forward = session.engine.forward

    def kept(inputs: np.ndarray, start: int) -> np.ndarray:
        logits = forward(inputs, start)
        seen.append(logits.copy())
        return logits

    session.engine.forward = kept  # type: ignore[method-assign]
    session.ask(scene_image, "what is it?", "vqa", max_new_tokens=4)
    uncached = seen[1:]
    seen.clear()
    session.ask(scene_image, "describe", "caption", max_new_tokens=4)
    seen.clear()
    session.ask(scene_image, "what is it?", "vqa", max_new_tokens=4)
    assert len(seen) == len(uncached) == 4 and all(np.array_equal(a, b) for a, b in zip(seen, uncached, strict=True))


def test_a_second_question_computes_neither_image_nor_its_rows(built: Callable[[str], Path], scene_png: Path) -> None:
    session = load(built("fp32"))
    counted = Counted(session)
    first = session.ask(scene_png, "describe the image", "caption")
    assert counted.images == 1 and counted.rows == first.prompt_tokens
    counted.rows = 0
    second = session.ask(scene_png.read_bytes(), "what is it?", "vqa")
    assert counted.images == 1 and counted.rows == second.prompt_tokens - second.cached_tokens and second.cached_tokens > 16
    assert second.timings["vision"] == second.timings["decode_image"] == 0
    session.ask(scene_png, "what is it?", "vqa", 4)
    assert counted.images == 2, "another number of visual tokens is another embedding"


def test_a_conversation_computes_only_what_is_new(built: Callable[[str], Path], scene_image: Image.Image) -> None:
    for precision in ("fp32", "int8"):
        session = load(built(precision))
        counted = Counted(session)
        chat = session.chat(scene_image, 4)
        first = chat.ask("Hi.", 5)
        assert first.kept_tokens == 4
        counted.rows = 0
        second = chat.ask("And then?", 5)
        assert counted.images == 1 and second.cached_tokens == first.prompt_tokens + 4, "all but the last token, which was never fed"
        assert counted.rows == second.prompt_tokens - second.cached_tokens < 20
        assert [m.role for m in chat.messages] == ["user", "assistant"] * 2 and chat.messages[3].content == second.text
        # The same conversation with a question about something else in between, and so nothing in the cache.
        again = load(built(precision)).chat(scene_image, 4)
        assert again.ask("Hi.", 5).tokens == first.tokens
        again._session.prefix.forget()
        repeated = again.ask("And then?", 5)
        assert repeated.cached_tokens == 0 and repeated.tokens == second.tokens


def test_a_conversation_is_the_rendered_one(built: Callable[[str], Path], scene_image: Image.Image) -> None:
    """Turn by turn the model sees the tokens of the whole conversation rendered at once."""
    from runtime.contract.prompt import Message, render_chat

    session = load(built("fp32"))
    chat = session.chat(scene_image, 4)
    chat.ask("Hi.", 5)
    tokens = chat._segments[-1].key[1] + chat._unfed  # type: ignore[index]
    text = session.tokenizer.decode(tokens)
    second = chat.ask("And then?", 5)
    before, after = session.tokenizer.encode_prompt(render_chat([Message("user", "Hi."), Message("assistant", "@"), Message("user", "And then?")]))
    first, _, rest = session.tokenizer.decode(after).partition(" @")
    shown = session.tokenizer.decode([token for segment in chat._segments[:-1] for token in (segment.key[1] if segment.key[0] != "image" else ())])
    assert shown == first + text + rest and second.prompt_tokens > len(before)


def test_a_conversation_that_outgrows_the_cache_ends_with_one_line(built: Callable[[str], Path], scene_image: Image.Image) -> None:
    chat = load(built("fp32")).chat(scene_image, 4)
    with pytest.raises(ContextError, match="does not fit"):
        for _ in range(20):
            chat.ask("And then? " * 5, 20)
    assert len(chat.messages) % 2 == 0


def test_beams_and_batches_leave_the_cache_usable(built: Callable[[str], Path], scene_image: Image.Image) -> None:
    session, fresh = load(built("fp32")), load(built("fp32"))
    expected = fresh.ask(scene_image, "what is it?", "vqa").tokens
    session.ask(scene_image, "describe", "caption", decoding=Decoding(beams=3))
    answer = session.ask(scene_image, "what is it?", "vqa")
    assert answer.tokens == expected and answer.cached_tokens > 16
    replay(session, session.bundle.tolerance)
    again = session.ask(scene_image, "what is it?", "vqa")
    assert again.tokens == expected and again.cached_tokens == 0, "the self-test wrote over the rows"


@pytest.mark.parametrize("other", ["ask", "ask_many", "self-test", "forget"])
def test_a_stream_that_was_overtaken_says_so(built: Callable[[str], Path], scene_image: Image.Image, other: str) -> None:
    session = load(built("fp32"))
    first = session.stream(scene_image, "describe", "caption", decoding=Decoding(lookup=0))
    pieces = iter(first)
    next(pieces)
    uses = {
        "ask": lambda: session.ask(scene_image, "what is it?", "vqa"),
        "ask_many": lambda: session.ask_many([Question(scene_image, "what is it?", "vqa")]),
        "self-test": lambda: replay(session, session.bundle.tolerance),
        "forget": session.forget,
    }
    uses[other]()
    with pytest.raises(UsageError, match="used again before this stream was read"):
        list(pieces)
    with pytest.raises(UsageError, match="ended in an error"):
        first.finish()
    expected = load(built("fp32")).ask(scene_image, "what is it?", "vqa")
    assert session.ask(scene_image, "what is it?", "vqa").tokens == expected.tokens


def test_an_overtaken_stream_that_is_cancelled_claims_no_rows(built: Callable[[str], Path], scene_image: Image.Image) -> None:
    session, fresh = load(built("fp32")), load(built("fp32"))
    chats = [one.chat(scene_image, 4, Decoding(lookup=0)) for one in (session, fresh)]
    for chat in chats:
        chat.ask("Describe it.", 6)
    old = session.stream(scene_image, "Describe it.", "chat", 4, 12, Decoding(lookup=0))
    pieces = iter(old)
    for _ in range(3):
        next(pieces)
    session.ask(scene_image, "Describe it.", "chat", 4, 1)
    old.cancel()
    with pytest.raises(UsageError, match="used again"):
        list(pieces)
    assert chats[0].ask("And then?", 8).tokens == chats[1].ask("And then?", 8).tokens


def test_rows_checked_among_others_are_not_kept(built: Callable[[str], Path], scene_image: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafted token's row equals a stepwise one only up to rounding: the next turn computes it again, and so gives the same bits as without."""
    monkeypatch.setattr("runtime.generate._Pays.__bool__", lambda self: True)
    session = load(built("fp32"))
    real = session.engine.forward(np.ones((1, 3, 64), np.float32), 0)
    assert real.shape == (960,)
    session.forget()
    said = session.ask(scene_image, "say it", "chat", 4, 30, Decoding(lookup=0)).tokens
    monkeypatch.setattr("runtime.lookup.Lookup.draft", lambda self, most: list(said[len(self._tokens) - start :][:most]))
    chat = session.chat(scene_image, 4, Decoding(lookup=3))
    start = len(session.tokenizer.encode_prompt(render("chat", "say it"))[1])
    session.forget()
    first = chat.ask("say it", 30)
    assert first.tokens == said and first.accepted_tokens > 10 and first.kept_tokens == 0
    assert chat.ask("And then?", 5).cached_tokens == first.prompt_tokens


def test_turns_of_a_conversation_come_one_after_another(built: Callable[[str], Path], scene_image: Image.Image) -> None:
    chat = load(built("fp32")).chat(scene_image, 4)
    first, second = chat.stream("Hi.", 4), chat.stream("And then?", 4)
    first.finish()
    with pytest.raises(UsageError, match="another turn was answered"):
        second.finish()
    assert len(chat.messages) == 2
    for wrong in ("  ", "\ud800"):
        with pytest.raises(PromptError):
            chat.ask(wrong)


def test_an_answer_left_unread_harms_nothing(built: Callable[[str], Path], scene_image: Image.Image) -> None:
    session = load(built("fp32"))
    expected = load(built("fp32")).ask(scene_image, "describe", "caption").tokens
    next(iter(session.stream(scene_image, "what is it?", "vqa")))
    assert session.ask(scene_image, "describe", "caption").tokens == expected


def test_a_failing_engine_leaves_no_rows_behind(built: Callable[[str], Path], scene_image: Image.Image) -> None:
    session = load(built("fp32"))
    expected = session.ask(scene_image, "what is it?", "vqa").tokens
    forward = session.engine.forward

    def failing(inputs: np.ndarray, start: int) -> np.ndarray:
        forward(inputs, start)
        raise EngineError("lost")

    session.engine.forward = failing  # type: ignore[method-assign]
    with pytest.raises(EngineError):
        session.ask(scene_image, "Hello.", "chat")
    session.engine.forward = forward  # type: ignore[method-assign]
    assert session.ask(scene_image, "what is it?", "vqa").tokens == expected


def test_another_process_finds_the_embeddings(built: Callable[[str], Path], scene_png: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFMLLM_CACHE", str(tmp_path))
    first, second = (load(built("int8"), image_cache=1 << 20) for _ in range(2))
    expected = first.ask(scene_png, "describe")
    counted = Counted(second)
    answer = second.ask(scene_png, "where is the circle?")
    assert counted.images == 0 and answer.timings["decode_image"] == 0
    assert answer.boxes[0].box == first.ask(scene_png, "where is the circle?").boxes[0].box, "the picture's size travels with its embeddings"
    assert second.ask(scene_png, "describe").tokens == expected.tokens
    (file,) = (cache_folder() / "images").iterdir()
    assert file.stat().st_mode & 0o077 == 0, "for this user only"
    other = load(built("fp32"), image_cache=1 << 20)
    counted = Counted(other)
    other.ask(scene_png, "describe")
    assert counted.images == 1, "another bundle's embeddings are other numbers"


@pytest.mark.parametrize("damage", ["flip", "truncate", "extend", "empty"])
def test_damaged_embeddings_are_made_again(
    damage: str, built: Callable[[str], Path], scene_png: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFMLLM_CACHE", str(tmp_path))
    expected = load(built("fp32"), image_cache=1 << 20).ask(scene_png, "describe")
    (file,) = (cache_folder() / "images").iterdir()
    data = bytearray(file.read_bytes())
    data[-5] ^= 64
    file.write_bytes({"flip": bytes(data), "truncate": data[:-9], "extend": data + b"x", "empty": b""}[damage])
    session = load(built("fp32"), image_cache=1 << 20)
    counted = Counted(session)
    assert session.ask(scene_png, "describe").tokens == expected.tokens and counted.images == 1


def test_the_disk_cache_stays_within_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFMLLM_CACHE", str(tmp_path))
    size = 4 * 4 * 8 + 48
    cache = FeatureCache("bundle", 8, memory=1, disk=3 * size)
    for index in range(6):
        cache.put(f"picture {index}", 2, Features(np.full((4, 8), index, np.float32), (3, 5)))
        for age, file in enumerate(sorted((tmp_path / "images").iterdir(), key=lambda f: f.stat().st_mtime_ns)):
            os.utime(file, ns=(10**9 * age, 10**9 * age))
    assert len(list((tmp_path / "images").iterdir())) == 3
    fresh = FeatureCache("bundle", 8, disk=3 * size)
    assert fresh.get("picture 0", 2) is None
    found = fresh.get("picture 5", 2)
    assert found and found.size == (3, 5) and (found.embeds == 5).all()
    FeatureCache("bundle", 8, disk=size - 1).put("too large", 2, found)
    assert FeatureCache("bundle", 8, disk=size).get("too large", 2) is None


def test_memory_is_bounded() -> None:
    cache = FeatureCache("bundle", 8, memory=3 * 128)
    for index in range(5):
        cache.put(f"{index}", 2, Features(np.zeros((4, 8), np.float32), (1, 1)))
    assert [cache.get(f"{index}", 2) is not None for index in range(5)] == [False, False, True, True, True]


def test_a_disk_that_cannot_be_written_costs_nothing(
    built: Callable[[str], Path], scene_png: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(built("fp32"))  # verified, so that no mark need be written
    (tmp_path / "images").write_text("a file where the folder should be")
    monkeypatch.setenv("INFMLLM_CACHE", str(tmp_path))
    assert load(built("fp32"), image_cache=1 << 20).ask(scene_png, "describe").text


def test_a_damaged_picture_is_still_refused_by_name(built: Callable[[str], Path], scene_png: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(scene_png.read_bytes()[:200])
    with pytest.raises(ImageError, match=r"broken\.png is truncated"):
        load(built("fp32")).ask(broken, "describe")
