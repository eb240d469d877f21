"""The official VQA answer comparison: normalisation and the accuracy over several
people's answers (VQA evaluation, arXiv 1505.00468).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["normalise_answer", "vqa_accuracy"]

_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    word: str(value)
    for value, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
} | {"none": "0"}
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's "
    "how'd how'll how's I'd've I'm I've isn't it'd it'll "
    "let's ma'am might've mightn't must've mustn't needn't not've o'clock oughtn't shan't "
    "she'd've should've shouldn't that'd that's there'd "
    "there're there's they'd they'll they're they've wasn't we've weren't what'll what're what's "
    "what've when's where'd where's where've who'd "
    "who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're "
    "you've"
)
_RESTORED = {word.replace("'", "").lower(): word.lower() for word in _CONTRACTIONS.split()}
_AMBIGUOUS = {
    "lets",
    "hed",
    "shed",
    "ill",
    "id",
    "its",
    "were",
    "well",
    "wed",
}  # without the apostrophe these are words themselves, so they stay
_PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_\-<>@`?!]")
_COMMA = re.compile(r"(?<=\d),(?=\d)")
_FULL_STOP = re.compile(r"\.(?!\d)")
_LEAST_PEOPLE = 3


def normalise_answer(text: str) -> str:
    """Normalises an answer: lower case, no punctuation or articles, number words as
    digits, contractions with their apostrophe, single spaces.
    """
    text = " ".join(text.lower().split())
    text = _COMMA.sub("", text)
    text = _PUNCTUATION.sub(" ", text)
    text = _FULL_STOP.sub("", text).replace(",", " ")
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(
        _RESTORED.get(word, word) if word not in _AMBIGUOUS else word
        for word in words
        if word not in _ARTICLES
    )


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Returns the accuracy of an answer in [0, 1], after normalising all texts.

    With four or more references, it is min(1, agreeing / 3), averaged over leaving out
    each reference in turn. With fewer, it is 1 if the answer equals any of them, else
    0.
    """
    found, given = (
        normalise_answer(answer),
        [normalise_answer(reference) for reference in references],
    )
    if len(given) < _LEAST_PEOPLE + 1:
        return float(found in given)
    agreeing = sum(reference == found for reference in given)
    return sum(
        min(1.0, (agreeing - (reference == found)) / _LEAST_PEOPLE) for reference in given
    ) / len(given)
