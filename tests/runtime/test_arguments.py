"""Arguments of the Python API: the wrong type is one line that names the argument, and
NumPy's numbers are numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime import Decoding, Question, load
from runtime.contract.errors import UsageError
from runtime.engines import EngineOptions


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"text": None}, "text is None, expected text"),
        ({"text": b"describe"}, "text is b'describe', expected text"),
        ({"task": None}, "task is None, expected text"),
        ({"max_new_tokens": "5"}, "max_new_tokens is '5', expected a whole number"),
        ({"max_new_tokens": 5.0}, "max_new_tokens is 5.0, expected a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens is True, expected a whole number"),
        ({"visual_tokens": "4"}, "visual_tokens is '4', expected a whole number"),
    ],
)
def test_a_question_names_the_wrong_argument(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        Question(**{"image": "a.png", "text": "describe"} | arguments)  # type: ignore[arg-type]


def test_engine_options_name_the_wrong_argument(built: Callable[[str], Path]) -> None:
    for wrong in ("2", 2.0, True):
        with pytest.raises(UsageError, match=f"threads is {wrong!r}, expected a whole number"):
            load(built("fp32"), threads=wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="context is 0, expected at least 1"):
        EngineOptions(context=0)
    assert EngineOptions(threads=np.int64(2)).threads == 2  # type: ignore[arg-type]


def test_a_turn_names_the_wrong_argument(
    built: Callable[[str], Path], scene_image: Image.Image
) -> None:
    chat = load(built("fp32")).chat(scene_image)
    with pytest.raises(UsageError, match="text is None"):
        chat.ask(None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="max_new_tokens is '5'"):
        chat.ask("Hello.", "5")  # type: ignore[arg-type]
    assert not chat.messages


def test_decoding_must_be_a_decoding(
    built: Callable[[str], Path], scene_image: Image.Image
) -> None:
    session = load(built("fp32"))
    wrong: Any = {}
    for call in (
        lambda: session.ask(scene_image, "describe", decoding=wrong),
        lambda: session.ask_many([Question(scene_image, "describe")], wrong),
        lambda: session.chat(scene_image, decoding=wrong),
    ):
        with pytest.raises(UsageError, match=r"decoding is \{\}, expected a runtime\.Decoding"):
            call()


def test_numpy_numbers_are_numbers() -> None:
    sampled = Decoding(temperature=np.float64(0.5), top_k=np.int64(3))  # type: ignore[arg-type]
    assert sampled == Decoding(temperature=0.5, top_k=3)
    assert type(sampled.temperature) is float and type(sampled.top_k) is int
    assert Decoding(temperature=np.float32(0.5)).temperature == 0.5  # type: ignore[arg-type]
    question = Question("a.png", "describe", max_new_tokens=np.int64(5))  # type: ignore[arg-type]
    assert question.max_new_tokens == 5 and type(question.max_new_tokens) is int
    with pytest.raises(UsageError, match=r"top-k is 3\.0, expected int"):
        Decoding(temperature=0.5, top_k=np.float64(3))  # type: ignore[arg-type]
