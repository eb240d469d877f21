"""Constraints on the tokens of an answer: the box grammar, and JSON of a given schema.

A constraint is a state machine over tokens without side effects, so that beams and
drafted tokens can branch. `start` returns the first state, `allowed` the tokens that
may follow a state, and `after` the next state.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.contract.boxes import box_continues, box_ends
from runtime.contract.errors import UsageError, kind_name
from runtime.contract.tokenizer import Tokenizer

__all__ = ["BoxGrammar", "Constraint", "JsonSchema"]

Mask = NDArray[np.bool_]


class Constraint(Protocol):
    """See the module docstring. States are values that no call changes."""

    def start(self) -> Any:
        """Returns the state before the first token."""
        ...

    def allowed(self, state: Any) -> Mask:
        """Returns a mask [V] of the tokens that may come next. It includes the end
        token where the answer may end.
        """
        ...

    def after(self, state: Any, token: int) -> Any:
        """Returns the state after an allowed token (not the end token)."""
        ...


class BoxGrammar:
    """One box in the format of `runtime.contract.boxes`: `x1,y1 x2,y2`. A state is the
    text so far.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int) -> None:
        self._eos, self._vocabulary = tokenizer.eos_id, vocabulary
        self._pieces = {
            token: text
            for token, text in tokenizer.pieces().items()
            if text and not set(text) - set("0123456789., ")
        }
        self._allowed = lru_cache(maxsize=256)(self._find)
        if not self.allowed("").any():
            raise UsageError(
                "this model's tokenizer has no tokens to write a box; allow free text with --free"
            )

    def start(self) -> str:
        """See `Constraint`."""
        return ""

    def allowed(self, state: str) -> Mask:
        """See `Constraint`."""
        return self._allowed(state)

    def _find(self, state: str) -> Mask:
        mask = np.zeros(self._vocabulary, np.bool_)
        following = ((token, (state + text).lstrip(" ")) for token, text in self._pieces.items())
        mask[[token for token, text in following if text and box_continues(text)]] = True
        mask[self._eos] = box_ends(state.strip(" "))
        return mask

    def after(self, state: str, token: int) -> str:
        """See `Constraint`."""
        return (state + self._pieces[token]).lstrip(" ")


class JsonSchema:
    """JSON that follows a schema, through llguidance. States are its matchers."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, schema: str) -> None:
        try:
            import llguidance
        except ImportError:
            raise UsageError(
                "--json-schema needs llguidance, which is not installed; run: pip install "
                "'infmllm-edge[json]'"
            ) from None
        try:
            parsed = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"the JSON schema is not valid JSON ({error}); give a JSON Schema object in a file"
            ) from None
        if not isinstance(parsed, dict):
            raise UsageError(
                f"the JSON schema is {kind_name(type(parsed))}, expected an object such as "
                f"{{'type': 'object', …}}"
            )
        self._vocabulary, self._eos = vocabulary, tokenizer.eos_id
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(
                parsed, overrides={"whitespace_flexible": False}
            )
        except (ValueError, RecursionError) as error:
            raise _unusable(str(error)) from None
        words = llguidance.LLTokenizer(
            tokenizer.to_json(), n_vocab=vocabulary, eos_token=tokenizer.eos_id
        )
        self._first = llguidance.LLMatcher(words, grammar, log_level=0)
        if self._first.is_error():
            raise _unusable(self._first.get_error())
        self.allowed(self._first.deep_copy())  # raises here if nothing can satisfy the schema

    def start(self) -> Any:
        """See `Constraint`."""
        return self._first.deep_copy()

    def allowed(self, state: Any) -> Mask:
        """See `Constraint`."""
        if state.is_stopped():
            mask = np.zeros(self._vocabulary, np.bool_)
            mask[self._eos] = True
            return mask
        mask = np.unpackbits(np.frombuffer(state.compute_bitmask(), np.uint8), bitorder="little")[
            : self._vocabulary
        ].astype(np.bool_)
        if state.is_error():
            raise _unusable(state.get_error())
        return mask

    def after(self, state: Any, token: int) -> Any:
        """See `Constraint`."""
        following = state.deep_copy()
        if not following.consume_token(token):
            raise _unusable(following.get_error())
        return following


def _unusable(reason: str) -> UsageError:
    return UsageError(
        f"the JSON schema cannot be used: {' '.join(reason.split()):.200}; simplify it"
    )
