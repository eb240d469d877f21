"""Constrained answers: whatever the weights say, a grounding answer is a box, a JSON
answer follows its schema, a stop text ends it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from runtime import Decoding, Session, load
from runtime.contract.boxes import box_continues, box_ends, find_boxes, format_box, parse_box
from runtime.contract.errors import UsageError
from runtime.generation.answer_text import AnswerText
from runtime.generation.constraints import BoxGrammar, JsonSchema
from runtime.generation.sampling import Sampler

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "count": {"type": "integer", "minimum": 0, "maximum": 9},
        "colour": {"enum": ["red", "blue", "größer"]},
    },
    "required": ["count", "colour"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def session(built: Callable[[str], Path]) -> Session:
    return load(built("fp32"))


def test_the_box_grammar_is_what_the_reader_reads() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        text = format_box(rng.random(4).tolist())
        assert box_ends(text) and parse_box(text)
        for cut in range(len(text) + 1):
            assert box_continues(text[:cut]), text[:cut]
    for text in (
        "0.12345",
        "2",
        "1.5",
        "0.1,0.2,",
        "0.1 ",
        " ",
        "0.1,0.2 0.3,0.4 ",
        "-",
        "0..",
        ".5",
    ):
        assert not box_continues(text), text
    for text in ("", "0.1,0.2 0.3,", "0.1,0.2 0.3,1.", "0.1,0.2 0.3"):
        assert box_continues(text) and not box_ends(text), text


@pytest.mark.parametrize("seed", range(12))
def test_any_logits_give_a_box(session: Session, seed: int) -> None:
    grammar, eos = BoxGrammar(session.tokenizer, 960), session.spec.eos_id
    rng = np.random.default_rng(seed)
    for decoding in (
        Decoding(),
        Decoding(temperature=5.0, seed=seed),
        Decoding(repetition_penalty=1.5),
    ):
        chooser, tokens = Sampler(decoding, eos, grammar), []
        while (token := chooser(rng.normal(size=960).astype(np.float32) * 5)) != eos:
            tokens.append(token)
            assert len(tokens) < 40
        text = session.tokenizer.decode(tokens)
        assert parse_box(text) is not None and len(find_boxes(text)) == 1, text


def test_a_random_model_answers_with_boxes(session: Session, scene_image: Image.Image) -> None:
    for beams in (1, 4):
        for task, text in (("ground", "red circle"), ("auto", "where is the square?")):
            answer = session.ask(scene_image, text, task, decoding=Decoding(beams=beams))
            assert (
                answer.finish_reason == "stop" and len(answer.boxes) == 1 and parse_box(answer.text)
            ), answer.text
    free = session.ask(scene_image, "red circle", "ground", decoding=Decoding(constrain=False))
    assert not free.boxes and parse_box(free.text) is None


@pytest.mark.parametrize("mode", ["stretch", "pad"])
@pytest.mark.parametrize("size", [(400, 100), (64, 333), (50, 50)])
def test_boxes_are_in_pixels_of_the_original_picture(
    built: Callable[[str], Path], size: tuple[int, int], mode: str
) -> None:
    """Whatever the preprocessing: boxes are in [0, 1] of the displayed width and
    height, by the model's convention, and are scaled by those.
    """
    from dataclasses import replace

    bundle = load(built("fp32"))
    bundle.spec = replace(bundle.spec, image_mode=mode)
    (found,) = bundle.ask(Image.new("RGB", size, (9, 99, 9)), "red circle", "ground").boxes
    assert found.phrase == "red circle" and all(0 <= value <= 1 for value in found.relative)
    assert found.box == pytest.approx(
        [r * s for r, s in zip(found.relative, (*size, *size), strict=True)]
    )


@pytest.mark.parametrize(
    "decoding", [{}, {"temperature": 1.5, "seed": 4}, {"beams": 3}, {"lookup": 4}], ids=str
)
def test_json_follows_its_schema(
    session: Session, scene_image: Image.Image, decoding: dict[str, object]
) -> None:
    settings = Decoding(schema=json.dumps(SCHEMA), **decoding)  # type: ignore[arg-type]
    answer = session.ask(scene_image, "describe", "caption", max_new_tokens=80, decoding=settings)
    assert answer.finish_reason == "stop"
    found = json.loads(answer.text)
    assert (
        set(found) == {"count", "colour"}
        and 0 <= found["count"] <= 9
        and found["colour"] in SCHEMA["properties"]["colour"]["enum"]
    )


def test_a_form_that_is_complete_ends_however_short(
    session: Session, scene_image: Image.Image
) -> None:
    for settings in ({}, {"beams": 5}, {"temperature": 1.0, "seed": 1}):
        decoding = Decoding(schema='{"enum": ["red", "blue"]}', min_new_tokens=25, **settings)
        answer = session.ask(scene_image, "describe", "caption", decoding=decoding)
        assert json.loads(answer.text) in ("red", "blue") and answer.finish_reason == "stop"
    boxed = session.ask(
        scene_image, "circle", "ground", decoding=Decoding(beams=3, min_new_tokens=29)
    )
    assert boxed.boxes


def test_json_cut_short_says_so(session: Session, scene_image: Image.Image) -> None:
    answer = session.ask(
        scene_image,
        "describe",
        "caption",
        max_new_tokens=3,
        decoding=Decoding(schema=json.dumps(SCHEMA)),
    )
    assert answer.finish_reason == "length"


@pytest.mark.parametrize(
    "schema",
    [
        "",
        "nonsense",
        "[]",
        "[" * 100_000,
        '{"type": "unheard-of"}',
        '{"$ref": "#/nowhere"}',
        '{"$ref": "#"}',
        '{"const": "\\ud800"}',
        '{"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}',
    ],
    ids=lambda schema: schema[:30],
)
def test_a_schema_that_cannot_be_followed_is_refused(
    session: Session, scene_image: Image.Image, schema: str
) -> None:
    with pytest.raises(UsageError, match="JSON schema"):
        session.ask(scene_image, "describe", decoding=Decoding(schema=schema))


def test_states_are_values(session: Session) -> None:
    """Beams branch: taking a token from a state must not change it."""
    grammar = JsonSchema(session.tokenizer, 960, json.dumps(SCHEMA))
    start = grammar.start()
    before = grammar.allowed(start).copy()
    token = int(before.argmax())
    grammar.after(start, token)
    assert np.array_equal(grammar.allowed(start), before)
    assert not np.array_equal(grammar.allowed(grammar.after(start, token)), before)


def test_stop_texts_end_the_answer_and_are_no_part_of_it(
    session: Session, scene_image: Image.Image
) -> None:
    whole = session.ask(scene_image, "describe", max_new_tokens=20)
    stop = whole.text[7:10]
    for lookup in (0, 4):
        stream = session.stream(
            scene_image,
            "describe",
            max_new_tokens=20,
            decoding=Decoding(stop=(stop, "never"), lookup=lookup),
        )
        pieces = list(stream)
        assert stream.answer and stream.answer.finish_reason == "stop"
        assert stream.answer.text == "".join(pieces) == whole.text[
            : whole.text.index(stop)
        ] and len(stream.answer.tokens) < len(whole.tokens)
    searched = session.ask(scene_image, "describe", max_new_tokens=20, decoding=Decoding(beams=3))
    stop = searched.text[8:10]
    beams = session.ask(
        scene_image,
        "describe",
        max_new_tokens=20,
        decoding=Decoding(beams=3, stop=(stop,), length_penalty=-5.0),
    )
    assert stop not in beams.text and beams.finish_reason == "stop" and len(beams.tokens) < 20


def test_text_that_may_become_a_stop_text_is_held_back(session: Session) -> None:
    tokenizer = session.tokenizer
    ids = tokenizer.encode(" a red circle and a red square")
    for stop in ("square", "red s", "circle", "x", "a red circle and a red square!"):
        words, shown = AnswerText(tokenizer, (stop,)), ""
        for token in ids:
            shown += words.push(token)
            assert "a red circle and a red square".startswith(shown) and stop not in shown
        shown += words.finish()
        assert shown == words.text == "a red circle and a red square".partition(stop)[0]


def test_cancelling_keeps_what_was_said(session: Session, scene_image: Image.Image) -> None:
    stream = session.stream(scene_image, "describe", max_new_tokens=30)
    pieces = []
    for piece in stream:
        pieces.append(piece)
        if len(pieces) == 3:
            stream.cancel()
    assert (
        stream.answer
        and stream.answer.finish_reason == "cancelled"
        and stream.answer.text == "".join(pieces)
    )
    assert 3 <= len(stream.answer.tokens) < 30
    searched = session.stream(scene_image, "describe", decoding=Decoding(beams=3))
    searched.cancel()
    given_up = searched.finish()
    assert given_up.finish_reason == "cancelled" and len(given_up.tokens) <= 1
    assert given_up.text == session.tokenizer.decode(given_up.tokens).lstrip(" "), (
        "text and tokens agree"
    )


def test_streams_are_whole_code_points(session: Session) -> None:
    text = "größer 🦜 中文 ok"
    words, pieces = AnswerText(session.tokenizer), []
    for token in session.tokenizer.encode(text):
        pieces.append(words.push(token))
    pieces.append(words.finish())
    assert (
        "".join(pieces) == text
        and all("\ufffd" not in piece for piece in pieces)
        and sum(map(bool, pieces)) > 3
    )
    assert re.fullmatch(r".*🦜.*", "".join(pieces))
