"""Decoding options: `Decoding`, a frozen description of everything that affects the
choice of tokens, checked on creation.

Terms and order are those of `transformers`: repetition penalty, then temperature,
top-k, top-p, min-p; beams with a length penalty.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real

from runtime.contract.errors import UsageError
from runtime.contract.prompt import TASKS

__all__ = ["Decoding", "checked_decoding"]

_MAX_BEAMS, _MAX_STOPS, _MAX_SEED = 16, 16, 2**63


@dataclass(frozen=True)
class Decoding:
    """Options of one answer. The default is greedy: the most likely token each time.

    Args:
        beams: Above 1, searches that many sequences side by side, scored by log
            probability over length ** `length_penalty`.
        length_penalty: See `beams`.
        min_new_tokens: Shortest answer in tokens; an earlier end is forbidden.
        temperature: Above 0, samples tokens.
        top_k: Samples from that many most likely tokens (0: all).
        top_p: Samples from the most likely tokens whose probabilities sum up to this.
        min_p: Samples from tokens at least this likely relative to the most likely.
        repetition_penalty: Above 1, makes tokens of the answer less likely to recur.
        seed: Makes sampling repeatable.
        stop: Texts that end the answer and are not part of it.
        constrain: Limits grounding answers to the box grammar.
        schema: JSON Schema, as text; limits any answer to JSON of that form.
        lookup: Drafts at most this many tokens from the question and the answer so far,
            and checks them in one step (0: never). Faster where text repeats, with the
            same tokens up to float rounding.

    Raises:
        UsageError: An option is out of range, or options exclude each other.
    """

    beams: int = 1
    length_penalty: float = 1.0
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    constrain: bool = True
    schema: str | None = None
    lookup: int = 0

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            value = _plain_number(getattr(self, name))
            object.__setattr__(self, name, value)
            _check(
                name,
                value,
                type(value) in kinds,
                f"{' or '.join(kind.__name__ for kind in kinds)}".replace("NoneType", "None"),
            )
        _check("stop", self.stop, all(type(text) is str for text in self.stop), "a tuple of texts")
        _check("beams", self.beams, 1 <= self.beams <= _MAX_BEAMS, f"1 to {_MAX_BEAMS}")
        _check(
            "temperature",
            self.temperature,
            self.temperature == 0 or 1e-3 <= self.temperature <= 100,
            "0 (greedy), or 0.001 to 100",
        )
        _check("top_k", self.top_k, self.top_k >= 0, "0 (all) or more")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1")
        _check("min_p", self.min_p, 0 <= self.min_p < 1, "0 to below 1")
        _check(
            "repetition_penalty",
            self.repetition_penalty,
            0.01 <= self.repetition_penalty <= 100,
            "0.01 to 100 (1: no penalty)",
        )
        _check("length_penalty", self.length_penalty, -10 <= self.length_penalty <= 10, "-10 to 10")
        _check("min_new_tokens", self.min_new_tokens, self.min_new_tokens >= 0, "0 or more")
        _check("lookup", self.lookup, 0 <= self.lookup <= 16, "0 to 16")
        _check("seed", self.seed, self.seed is None or 0 <= self.seed < _MAX_SEED, "0 or more")
        _check(
            "stop",
            self.stop,
            len(self.stop) <= _MAX_STOPS and all(self.stop),
            f"at most {_MAX_STOPS} texts, none empty",
        )
        if self.beams > 1 and self.temperature > 0:
            raise UsageError(
                f"beams {self.beams} and temperature {self.temperature} exclude each other; "
                f"choose beam search or sampling"
            )
        if self.beams > 1 and self.lookup:
            raise UsageError(
                f"beams {self.beams} and lookup {self.lookup} exclude each other; leave one out"
            )
        if self.temperature == 0 and (self.top_k or self.top_p < 1 or self.min_p):
            raise UsageError(
                "top_k, top_p and min_p only apply to sampling; give a temperature above 0"
            )

    @property
    def plain(self) -> bool:
        """True if each token is simply the most likely one that is allowed."""
        return self.temperature == 0 and self.repetition_penalty == 1 and self.min_new_tokens == 0

    @classmethod
    def published(cls, task: str, **changes: object) -> Decoding:
        """Returns the published settings of a task (model-spec: beams, shortest answer,
        length penalty), with `changes` applied.
        """
        found = TASKS[task]
        settings = {
            "beams": found.beams,
            "length_penalty": found.length_penalty,
            "min_new_tokens": found.min_new_tokens,
        }
        return cls(**{**settings, **changes})  # type: ignore[arg-type]


_REAL, _MAYBE = (int, float), (int, type(None))
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("beams", "min_new_tokens", "top_k", "lookup"), (int,)),
    **dict.fromkeys(
        ("length_penalty", "temperature", "top_p", "min_p", "repetition_penalty"), _REAL
    ),
    "seed": _MAYBE,
    "stop": (tuple,),
    "constrain": (bool,),
    "schema": (str, type(None)),
}


def checked_decoding(value: object) -> Decoding:
    """Returns the argument `decoding`. Raises `UsageError` unless it is a `Decoding`."""
    if not isinstance(value, Decoding):
        raise UsageError(f"decoding is {value!r:.60}, expected a runtime.Decoding")
    return value


def _plain_number(value: object) -> object:
    """Returns a NumPy number as Python's int or float, and anything else unchanged."""
    if isinstance(value, bool | int | float) and type(value) in (bool, int, float):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _check(name: str, value: object, ok: bool, expected: str) -> None:
    if not ok:
        raise UsageError(f"{name.replace('_', '-')} is {value!r:.60}, expected {expected}")
