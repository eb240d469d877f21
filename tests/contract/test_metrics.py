"""Scores against independent references and worked cases; intervals against exact
computations.
"""

from __future__ import annotations

import math
import random

import pytest

from runtime.data.sample import Sample
from runtime.evaluation.cider import cider
from runtime.evaluation.metrics import (
    Scoreboard,
    Scored,
    caption_right,
    mean_interval,
    proportion_interval,
    score,
)
from runtime.evaluation.vqa_accuracy import normalise_answer, vqa_accuracy


def vqa(answer: str, expected: str, *people: str) -> float:
    return score(Sample("vqa", "what?", expected, references=people), answer).value


def test_scores() -> None:
    assert vqa(" Red. ", "red") == 1 and vqa("dark red", "red") == 0
    assert caption_right("a red circle and a blue square", "a blue square, a red circle")
    assert caption_right("a smear with a cell and 2 discs", "a smear with 2 discs and a cell")
    assert not caption_right("a red circle", "a red circle and a red circle")
    whole = Sample("ground", "x", "", box=(0, 0, 1, 1))
    assert score(whole, "0.00,0.00 0.50,1.00") == Scored(1.0, 0.5, (0, 0, 0.5, 1))
    assert score(whole, "nothing") == Scored(0.0, 0.0, None)
    several = Sample("caption", "describe", "a cat", references=("a cat", "one dog"))
    assert score(several, "one dog").value == 1 and score(several, "a bird").value == 0
    board = Scoreboard()
    for text in ("yes", "no", "yes", "yes"):
        board.add("vqa", score(Sample("vqa", "is it?", "yes"), text))
    figures = board.figures()["vqa"]
    assert (
        figures["count"] == 4
        and figures["accuracy"] == 75
        and 0 < figures["low"] < 75 < figures["high"] < 100
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Dog.", "dog"),
        ("two", "2"),
        ("None", "0"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("t-shirt", "t shirt"),
        ("dont", "don't"),
        ("black, white", "black white"),
        ("a/b", "b"),
        ("well", "well"),
    ],
)
def test_official_vqa_normalisation(text: str, expected: str) -> None:
    assert normalise_answer(text) == expected


def test_official_vqa_accuracy() -> None:
    people = ["2"] * 3 + ["3"] * 7
    assert vqa_accuracy("two", people) == pytest.approx(
        0.3 * 2 / 3 + 0.7
    )  # leaving out one who agrees leaves two
    assert vqa_accuracy("3", people) == 1 and vqa_accuracy("4", people) == 0
    assert vqa_accuracy("yes", ["Yes"]) == 1
    assert vqa("2", "3", *people) == pytest.approx(0.9)


def test_cider_equals_the_reference_implementation() -> None:
    from pycocoevalcap.cider.cider import Cider

    rng = random.Random(0)
    words = [
        "a",
        "red",
        "blue",
        "dog",
        "cat",
        "sits",
        "runs",
        "on",
        "under",
        "the",
        "mat",
        "tree",
        "very",
        "quickly",
    ]
    references = [
        [" ".join(rng.choices(words, k=rng.randint(2, 12))) for _ in range(rng.randint(1, 4))]
        for _ in range(40)
    ]
    answers = [
        rng.choice(texts)
        if rng.random() < 0.3
        else " ".join(rng.choices(words, k=rng.randint(1, 12)))
        for texts in references
    ]
    _, expected = Cider().compute_score(
        dict(enumerate(references)), {index: [answer] for index, answer in enumerate(answers)}
    )
    assert cider(answers, references) == pytest.approx(list(expected), abs=1e-9)
    assert max(expected) > 1


def test_intervals() -> None:
    low, high = proportion_interval([1.0] * 8 + [0.0] * 2)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # Wilson, 8 of 10
    assert proportion_interval([1.0] * 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    values = [0.2, 0.4, 0.9]
    spread = 1.959964 * math.sqrt(sum((v - 0.5) ** 2 for v in values) / 2 / 3)
    assert mean_interval(values) == pytest.approx((max(0, 0.5 - spread), min(1, 0.5 + spread)))
