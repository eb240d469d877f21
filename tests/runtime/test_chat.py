"""Conversations: each turn computes only what is new, sees what was said before, and
comes after the one before.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime import Decoding, load
from runtime.contract.errors import ContextError, PromptError, UsageError
from runtime.contract.prompt import render
from tests.runtime.test_caches import Counted


def test_a_conversation_computes_only_what_is_new(
    built: Callable[[str], Path], scene_image: Image.Image
) -> None:
    for precision in ("fp32", "int8"):
        session = load(built(precision))
        counted = Counted(session)
        chat = session.chat(scene_image, 4)
        first = chat.ask("Hi.", 5)
        assert first.kept_tokens == 4
        counted.rows = 0
        second = chat.ask("And then?", 5)
        assert counted.images == 1 and second.cached_tokens == first.prompt_tokens + 4, (
            "all but the last token, which was never fed"
        )
        assert counted.rows == second.prompt_tokens - second.cached_tokens < 20
        assert [m.role for m in chat.messages] == ["user", "assistant"] * 2 and chat.messages[
            3
        ].content == second.text
        # The same conversation with a question about something else in between, and so nothing
        # in the cache.
        again = load(built(precision)).chat(scene_image, 4)
        assert again.ask("Hi.", 5).tokens == first.tokens
        again._runner.prefix_cache.clear()
        repeated = again.ask("And then?", 5)
        assert repeated.cached_tokens == 0 and repeated.tokens == second.tokens


def test_a_conversation_is_the_rendered_one(
    built: Callable[[str], Path], scene_image: Image.Image
) -> None:
    """Turn by turn the model sees the tokens of the whole conversation rendered at
    once.
    """
    from runtime.contract.prompt import Message, render_chat

    session = load(built("fp32"))
    chat = session.chat(scene_image, 4)
    chat.ask("Hi.", 5)
    key: Any = chat._segments[-1].key
    tokens = key[1] + chat._uncached
    second = chat.ask("And then?", 5)
    before, after = session.tokenizer.encode_prompt(
        render_chat(
            [Message("user", "Hi."), Message("assistant", "@"), Message("user", "And then?")]
        )
    )
    asked, rest = (after[: after.index(2)], after[after.index(2) :])
    answer = session.tokenizer.encode(" @")
    assert asked[-len(answer) :] == answer and rest.count(2) == 1
    keys: list[Any] = [segment.key for segment in chat._segments[1:]]
    shown = [token for key in keys for token in key[1]]
    expected = [*asked[: -len(answer)], *tokens, *rest]
    assert shown[: len(expected)] == expected
    assert second.prompt_tokens > len(before)


def test_a_conversation_that_outgrows_the_cache_ends_with_one_line(
    built: Callable[[str], Path], scene_image: Image.Image
) -> None:
    chat = load(built("fp32")).chat(scene_image, 4)
    with pytest.raises(ContextError, match="does not fit"):
        for _ in range(20):
            chat.ask("And then? " * 5, 20)
    assert len(chat.messages) % 2 == 0


def test_rows_checked_among_others_are_not_kept(
    built: Callable[[str], Path], scene_image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drafted token's row equals a stepwise one only up to rounding: the next turn
    computes it again, and so gives the same bits as without.
    """
    monkeypatch.setattr("runtime.generation.generate._DraftTimer.pays", lambda self: True)
    session = load(built("fp32"))
    real = session.engine.forward(np.ones((1, 3, 64), np.float32), 0)
    assert real.shape == (960,)
    session.clear_caches()
    said = session.ask(scene_image, "say it", "chat", 4, 30, Decoding(lookup=0)).tokens
    start = len(session.tokenizer.encode_prompt(render("chat", "say it"))[1])
    monkeypatch.setattr(
        "runtime.generation.prompt_lookup.PromptLookup.draft",
        lambda self, most: list(said[len(self._tokens) - start :][:most]),
    )
    chat = session.chat(scene_image, 4, Decoding(lookup=3))
    session.clear_caches()
    first = chat.ask("say it", 30)
    assert first.tokens == said and first.accepted_tokens > 10 and first.kept_tokens == 0
    assert chat.ask("And then?", 5).cached_tokens == first.prompt_tokens


def test_turns_of_a_conversation_come_one_after_another(
    built: Callable[[str], Path], scene_image: Image.Image
) -> None:
    chat = load(built("fp32")).chat(scene_image, 4)
    first, second = chat.stream("Hi.", 4), chat.stream("And then?", 4)
    first.finish()
    with pytest.raises(UsageError, match="another turn was answered"):
        second.finish()
    assert len(chat.messages) == 2
    for wrong in ("  ", "\ud800"):
        with pytest.raises(PromptError):
            chat.ask(wrong)


def test_an_overtaken_stream_that_is_cancelled_claims_no_rows(
    built: Callable[[str], Path], scene_image: Image.Image
) -> None:
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
