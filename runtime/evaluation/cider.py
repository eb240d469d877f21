"""CIDEr-D, the consensus score of captions (arXiv 1411.5726): n-grams are weighted by
their rarity among the references.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

__all__ = ["cider"]

_ORDERS = 4
_SIGMA = 6.0
_WORD = re.compile(r"\w+(?:'\w+)?")

Ngrams = Counter[tuple[str, ...]]


def _ngrams(text: str) -> Ngrams:
    words = _WORD.findall(text.lower())
    return Counter(
        tuple(words[i : i + n]) for n in range(1, _ORDERS + 1) for i in range(len(words) - n + 1)
    )


def cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Returns one score per caption, 0 to 10 (papers print the mean times 100). The
    rarity of n-grams is counted within the given references.
    """
    reference_grams = [[_ngrams(text) for text in texts] for texts in references]
    seen: Counter[tuple[str, ...]] = Counter()
    for texts in reference_grams:
        seen.update({gram for grams in texts for gram in grams})
    documents = math.log(max(1, len(references)))

    def weigh(grams: Ngrams) -> list[dict[tuple[str, ...], float]]:
        vectors: list[dict[tuple[str, ...], float]] = [{} for _ in range(_ORDERS)]
        for gram, count in grams.items():
            vectors[len(gram) - 1][gram] = count * (documents - math.log(max(1.0, seen[gram])))
        return vectors

    return [
        _score(_ngrams(answer), texts, weigh)
        for answer, texts in zip(answers, reference_grams, strict=True)
    ]


def _length(grams: Ngrams) -> int:
    """Returns the number of bigrams, which the reference implementation uses as length."""
    return sum(count for gram, count in grams.items() if len(gram) == 2)


def _score(
    answer: Ngrams,
    texts: Sequence[Ngrams],
    weigh: Callable[[Ngrams], list[dict[tuple[str, ...], float]]],
) -> float:
    found, total = weigh(answer), 0.0
    for text in texts:
        expected = weigh(text)
        penalty = math.exp(-((_length(answer) - _length(text)) ** 2) / (2 * _SIGMA**2))
        for mine, theirs in zip(found, expected, strict=True):
            norm = math.sqrt(sum(v * v for v in mine.values())) * math.sqrt(
                sum(v * v for v in theirs.values())
            )
            if norm:
                total += (
                    penalty
                    * sum(
                        min(value, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0)
                        for gram, value in mine.items()
                    )
                    / norm
                )
    return 10 * total / (_ORDERS * len(texts))
