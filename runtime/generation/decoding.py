"""How an answer is decoded: `Decoding`, one frozen description of everything that
chooses tokens, checked on creation.

Terms and order are those of `transformers`: repetition penalty, then temperature,
top-k, top-p, min-p; beams with a length penalty.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.contract.errors import UsageError
from runtime.contract.prompt import TASKS

__all__ = ["Decoding"]

_MAX_BEAMS, _MAX_STOPS, _MAX_SEED = 16, 16, 2**63


@dataclass(frozen=True)
class Decoding:
    """Options of one answer. The default is greedy: the most likely token each time.

    `beams` > 1 searches that many sequences side by side, scored by log probability
    over length ** `length_penalty`. `temperature` > 0 samples: `top_k` keeps that many
    tokens (0: all), `top_p` the likeliest whose sum reaches it, `min_p` those at least
    that likely relative to the likeliest; `seed` makes it repeatable.
    `repetition_penalty` > 1 makes tokens of the answer less likely to come again.
    `min_new_tokens` forbids an earlier end; `stop` are texts that end the answer and
    are no part of it. `constrain` holds grounding answers to the box grammar; `schema`
    (JSON Schema, as text) holds any answer to JSON of that form. `lookup` tokens at
    most are drafted from the question and the answer so far and checked in one step (0:
    never; None: where that cannot change a token): faster where text repeats, and the
    same tokens. Raises `UsageError`.
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
    lookup: int | None = None

    def __post_init__(self) -> None:
        for name, kinds in _KINDS.items():
            value = getattr(self, name)
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
            "0.01 to 100, 1 being none",
        )
        _check("length_penalty", self.length_penalty, -10 <= self.length_penalty <= 10, "-10 to 10")
        _check("min_new_tokens", self.min_new_tokens, self.min_new_tokens >= 0, "0 or more")
        _check("lookup", self.lookup, self.lookup is None or 0 <= self.lookup <= 16, "0 to 16")
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
                "top_k, top_p and min_p choose what is sampled from; give a temperature above 0 too"
            )

    @property
    def plain(self) -> bool:
        """True if the token is simply the likeliest one that is allowed."""
        return self.temperature == 0 and self.repetition_penalty == 1 and self.min_new_tokens == 0

    @classmethod
    def published(cls, task: str, **changes: object) -> Decoding:
        """The published settings of a task (model-spec: beams, shortest answer, length
        penalty), with changes.
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
    **dict.fromkeys(("beams", "min_new_tokens", "top_k"), (int,)),
    **dict.fromkeys(
        ("length_penalty", "temperature", "top_p", "min_p", "repetition_penalty"), _REAL
    ),
    **dict.fromkeys(("seed", "lookup"), _MAYBE),
    "stop": (tuple,),
    "constrain": (bool,),
    "schema": (str, type(None)),
}


def _check(name: str, value: object, ok: bool, expected: str) -> None:
    if not ok:
        raise UsageError(f"{name.replace('_', '-')} is {value!r:.60}, expected {expected}")
