"""One session shared by several threads: every answer equals the one that a single thread
gets, or the thread is told that its stream was overtaken.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from runtime import Decoding, Question, Session, load
from runtime.contract.errors import UsageError

COLOURS = ("red", "blue", "green", "yellow")
TEXTS = ("what color is the disc?", "where is the disc?", "describe the image")
ROUNDS = 4
WAIT = 120  # seconds until a test that hangs fails


def disc(colour: str) -> Image.Image:
    image = Image.new("RGB", (48, 48), "white")
    image.paste(colour, (8, 8, 40, 40))
    return image


IMAGES = {colour: disc(colour) for colour in COLOURS}


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    """Lets threads interrupt each other after microseconds, so that a race shows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def ask(session: Session, colour: str) -> list[object]:
    return [session.ask(IMAGES[colour], text, max_new_tokens=8).tokens for text in TEXTS]


def ask_with_beams(session: Session, colour: str) -> list[object]:
    options = Decoding(beams=2)
    return [session.ask(IMAGES[colour], TEXTS[0], max_new_tokens=6, decoding=options).tokens]


def ask_many(session: Session, colour: str) -> list[object]:
    questions = [Question(IMAGES[colour], text, max_new_tokens=6) for text in TEXTS[:2]]
    return [answer.tokens for answer in session.ask_many(questions)]


def converse(session: Session, colour: str) -> list[object]:
    chat = session.chat(IMAGES[colour], 4)
    return [chat.ask(text, 6).tokens for text in ("Hello.", "And then?")]


def replay(session: Session, colour: str) -> list[object]:
    return [session.replay()]


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Runs all calls at once, each in a thread of its own. Returns their results."""
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        start.wait(WAIT)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [one.result(WAIT) for one in [pool.submit(run, call) for call in calls]]


@pytest.mark.parametrize("uses", [(ask,) * 4, (ask, ask_many, converse, ask_with_beams)])
def test_four_threads_get_the_answers_of_one(
    built: Callable[[str], Path], uses: tuple[Callable[[Session, str], list[object]], ...]
) -> None:
    alone, shared = load(built("fp32"), threads=1), load(built("fp32"), threads=1)
    expected = [use(alone, colour) for use, colour in zip(uses, COLOURS, strict=True)]
    assert len({str(tokens) for tokens in expected}) == len(COLOURS), "answers tell images apart"

    def rounds(use: Callable[[Session, str], list[object]], colour: str) -> list[list[object]]:
        return [use(shared, colour) for _ in range(ROUNDS)]

    found = together(
        *(partial(rounds, use, colour) for use, colour in zip(uses, COLOURS, strict=True))
    )
    assert found == [[tokens] * ROUNDS for tokens in expected]


def test_a_self_test_waits_for_the_answers(built: Callable[[str], Path]) -> None:
    session = load(built("fp32"), threads=1)
    expected = [ask(session, "red"), replay(session, "red")]
    for _ in range(ROUNDS):
        assert together(lambda: ask(session, "red"), lambda: replay(session, "red")) == expected


def test_streams_of_four_threads_are_right_or_refused(built: Callable[[str], Path]) -> None:
    alone, shared = load(built("fp32"), threads=1), load(built("fp32"), threads=1)
    expected = {c: alone.ask(IMAGES[c], TEXTS[2], max_new_tokens=8).text for c in COLOURS}

    def read(colour: str) -> list[str]:
        found = []
        for _ in range(2 * ROUNDS):
            stream = shared.stream(IMAGES[colour], TEXTS[2], max_new_tokens=8)
            try:
                found.append("".join(stream))
            except UsageError as error:
                assert "used again before this stream was read" in str(error)
                assert stream.answer is None
        return found

    texts = together(*(partial(read, colour) for colour in COLOURS))
    for colour, found in zip(COLOURS, texts, strict=True):
        assert set(found) <= {expected[colour]}
    assert ask(shared, "red") == ask(alone, "red")


def test_threads_may_read_one_stream(built: Callable[[str], Path]) -> None:
    session = load(built("fp32"), threads=1)
    expected = session.ask(IMAGES["blue"], TEXTS[2], max_new_tokens=20)
    stream = session.stream(IMAGES["blue"], TEXTS[2], max_new_tokens=20)
    pieces = together(*[lambda: list(stream)] * 4)
    assert sorted(piece for found in pieces for piece in found) == sorted(
        session.stream(IMAGES["blue"], TEXTS[2], max_new_tokens=20)
    )
    assert stream.answer is not None and stream.answer.tokens == expected.tokens


def test_turns_of_one_conversation_queue(built: Callable[[str], Path]) -> None:
    session = load(built("fp32"), threads=1)
    chat = session.chat(IMAGES["green"], 4)
    answers = together(*[lambda: chat.ask("Hello.", 4)] * 4)
    assert [message.role for message in chat.messages] == ["user", "assistant"] * 4
    alone = load(built("fp32"), threads=1).chat(IMAGES["green"], 4)
    expected = [alone.ask("Hello.", 4).tokens for _ in range(4)]
    assert sorted(answer.tokens for answer in answers) == sorted(expected)


def test_schemas_of_two_threads_are_not_exchanged(built: Callable[[str], Path]) -> None:
    pytest.importorskip("llguidance")
    session = load(built("fp32"), threads=1)

    def said(word: str) -> set[str]:
        options = Decoding(schema=f'{{"const": "{word}"}}')
        return {
            session.ask(IMAGES["red"], TEXTS[2], max_new_tokens=20, decoding=options).text
            for _ in range(ROUNDS)
        }

    assert together(lambda: said("yes"), lambda: said("no")) == [{'"yes"'}, {'"no"'}]
