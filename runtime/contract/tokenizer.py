"""Text to token ids and back, through `tokenizer.json`.

User text is always encoded as plain text: a typed `</s>` or `<image>` is characters,
never a control token. Decoding streams whole code points.
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
    """A `tokenizer.json` bound to a model's special ids."""

    def __init__(self, inner: _Tokenizer, spec: ModelSpec) -> None:
        inner.encode_special_tokens = True  # special strings in text stay text
        inner.no_padding()
        inner.no_truncation()
        self._inner = inner
        self._special = {spec.bos_id, spec.eos_id, spec.pad_id}
        self.bos_id, self.eos_id = spec.bos_id, spec.eos_id
        self.length = lru_cache(maxsize=4096)(lambda ids: len(self.decode(ids)))
        """Characters of a tuple of ids by themselves; remembered, for streams ask it of
        every token.
        """

    @classmethod
    def load(cls, path: Path, spec: ModelSpec) -> Tokenizer:
        """Reads `tokenizer.json`; raises `BundleError` if it is missing, damaged or
        larger than the model's vocabulary.
        """
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise BundleError(
                    f"{path} is larger than {_MAX_BYTES} bytes; this is no tokenizer of ours"
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
                f"{spec.decoder.vocab_size}; they do not belong together"
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
        """Token ids of plain text, no control tokens added."""
        try:
            return list(self._inner.encode(text, add_special_tokens=False).ids)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise PromptError(
                f"the tokenizer cannot encode {text!r:.40} ({error}); use other words, or repair "
                f"tokenizer.json"
            ) from None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, control tokens left out."""
        return str(
            self._inner.decode(
                [i for i in ids if i not in self._special], skip_special_tokens=False
            )
        )

    def encode_prompt(self, prompt: Prompt) -> tuple[list[int], list[int]]:
        """Ids before and after the visual embeddings; the beginning-of-sequence id
        comes first.
        """
        return [self.bos_id, *self.encode(prompt.before)], self.encode(prompt.after)

    def pieces(self) -> dict[int, str]:
        """The text of every token that stands for the same plain ASCII text wherever it
        occurs (control tokens and parts of characters do not).
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
        """The `tokenizer.json`, for libraries that read one."""
        return str(self._inner.to_str())

    @property
    def vocab_size(self) -> int:
        """Number of tokens known to the tokenizer (at most the model's vocabulary)."""
        return int(self._inner.get_vocab_size(with_added_tokens=True))


class TextStream:
    """Turns ids that arrive one by one into pieces of text made of whole code points.

    Only the ids since the last whole piece are decoded, behind those of the piece
    before: what a token reads as depends on its neighbour at most.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._known = 0  # of `_ids`, those whose text was shown
        self._behind = 0  # characters of their text

    def push(self, token: int) -> str:
        """Adds one id and returns the text that became certain, possibly empty."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        return self._shown(text)

    def finish(self) -> str:
        """The remaining text; an incomplete code point appears as U+FFFD."""
        return self._shown(self._tokenizer.decode(self._ids))

    def _shown(self, text: str) -> str:
        piece = text[self._behind :]
        if piece:
            self._ids = self._ids[self._known :]
            self._known, self._behind = len(self._ids), self._tokenizer.length(tuple(self._ids))
        return piece
