"""Converts text to token ids and back with `tokenizer.json`.

User text is always encoded as plain text: a typed `</s>` or `<image>` never becomes a
control token. Streamed decoding yields only complete Unicode code points.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from tokenizers import Tokenizer as _Tokenizer

from runtime.contract.errors import BundleError, PromptError
from runtime.contract.prompt import Prompt
from runtime.contract.spec import ModelSpec

__all__ = ["TextStream", "Tokenizer"]

_MAX_BYTES = 64 << 20


class Tokenizer:
    """A `tokenizer.json` combined with a model's special token ids."""

    def __init__(self, inner: _Tokenizer, spec: ModelSpec) -> None:
        inner.encode_special_tokens = True  # encode special strings in user text as plain text
        inner.no_padding()
        inner.no_truncation()
        self._inner = inner
        self._special = {spec.bos_id, spec.eos_id, spec.pad_id}
        self.bos_id, self.eos_id = spec.bos_id, spec.eos_id
        self.length = lru_cache(maxsize=4096)(lambda ids: len(self.decode(ids)))
        """Returns how many characters a tuple of ids decodes to on its own. It is
        cached, because streams need it for every token.
        """

    @classmethod
    def load(cls, path: Path, spec: ModelSpec) -> Tokenizer:
        """Reads `tokenizer.json`. Raises `BundleError` if it is missing or damaged, if
        its ids exceed the model's vocabulary, or if it has added tokens that user text
        could match.
        """
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise BundleError(
                    f"{path} is larger than {_MAX_BYTES} bytes, so it is not a supported tokenizer"
                )
            inner = _Tokenizer.from_file(str(path))
        except BundleError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception
            raise BundleError(
                f"{path} cannot be read as a tokenizer ({error}); re-create the checkpoint or "
                f"bundle"
            ) from None
        highest = max(inner.get_vocab(with_added_tokens=True).values(), default=0)
        if highest >= spec.decoder.vocab_size:
            raise BundleError(
                f"{path} has token id {highest}, the model's vocabulary has "
                f"{spec.decoder.vocab_size} tokens; they do not belong together, use the model's "
                f"own tokenizer"
            )
        plain = [
            token.content
            for token in inner.get_added_tokens_decoder().values()
            if not token.special
        ]
        if plain:
            raise BundleError(
                f"{path} has added tokens that user text could match, such as {plain[0]!r:.40}; "
                f"mark them special"
            )
        return cls(inner, spec)

    def encode(self, text: str) -> list[int]:
        """Encodes plain text as token ids and adds no control tokens."""
        try:
            return list(self._inner.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise PromptError(
                f"the tokenizer cannot encode {text!r:.40} ({error}); use other words, or repair "
                f"tokenizer.json"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """Decodes token ids to text and leaves out control tokens."""
        return str(
            self._inner.decode(
                [i for i in ids if i not in self._special], skip_special_tokens=False
            )
        )

    def encode_prompt(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        """Returns the ids before and after the visual embeddings. The first list starts
        with the beginning-of-sequence id, and later turns follow the end-of-sequence id.
        """
        after = self.encode(prompt.after)
        for turn in prompt.turns:
            after += self.encode_turn(turn)
        return [self.bos_id, *self.encode(prompt.before)], after

    def encode_turn(self, turn: str) -> list[int]:
        """Returns the ids of a conversation's later turn: the end-of-sequence id of the
        answer before it, then the text.
        """
        return [self.eos_id, *self.encode(turn)]

    def pieces(self) -> dict[int, str]:
        """Returns the text of every token that decodes to the same plain ASCII text in
        any position. Control tokens and parts of characters are left out.
        """
        spaces = str.maketrans(
            {"\u2581": " ", "\u0120": " "}
        )  # how SentencePiece and byte-level BPE write a space
        found = {
            token: key.translate(spaces)
            for key, token in self._inner.get_vocab(with_added_tokens=False).items()
        }
        return {
            token: text
            for token, text in found.items()
            if text.isascii() and token not in self._special and not text.startswith("<0x")
        }

    def to_json(self) -> str:
        """Returns the content of `tokenizer.json`, for other libraries that read it."""
        return str(self._inner.to_str())

    @property
    def vocab_size(self) -> int:
        """Number of tokens in the tokenizer, at most the size of the model's
        vocabulary.
        """
        return int(self._inner.get_vocab_size(with_added_tokens=True))


class TextStream:
    """Turns ids that arrive one by one into pieces of text made of complete code
    points.

    A token's text can depend on the token before it, but on no earlier one. Each call
    therefore decodes only the ids since the last emitted piece, preceded by the ids of
    that piece.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._known = 0  # number of `_ids` whose text was already returned
        self._behind = 0  # number of characters in that text

    def push(self, token: int) -> str:
        """Adds one id and returns the text that became complete, possibly empty."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        return self._show(text)

    def finish(self) -> str:
        """Returns the remaining text; an incomplete code point appears as U+FFFD."""
        return self._show(self._tokenizer.decode(self._ids))

    def _show(self, text: str) -> str:
        piece = text[self._behind :]
        if piece:
            self._ids = self._ids[self._known :]
            self._known, self._behind = len(self._ids), self._tokenizer.length(tuple(self._ids))
        return piece
