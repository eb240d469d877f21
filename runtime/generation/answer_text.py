"""The text of an answer while its tokens arrive: whole characters only, cut at the
first stop text.
"""

from __future__ import annotations

from collections.abc import Sequence

from runtime.contract.tokenizer import TextStream, Tokenizer

__all__ = ["AnswerText"]


class AnswerText:
    """Collects tokens as text, without the space that answers begin with.

    Text that may turn out to be the beginning of a stop text is held back until the
    next tokens decide.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._stream, self._stop = TextStream(tokenizer), tuple(stop)
        self._held = ""
        self.text, self.stopped = "", False

    def push(self, token: int) -> str:
        """Adds a token and returns the new text that is certain, possibly empty."""
        return self._add(self._stream.push(token), final=False)

    def finish(self) -> str:
        """Returns the text that was held back."""
        return self._add(self._stream.finish(), final=True)

    def _add(self, piece: str, final: bool) -> str:
        if self.stopped:
            return ""
        new = piece if self.text or self._held else piece.lstrip(" ")
        waiting = self._held + new
        places = [place for text in self._stop if (place := waiting.find(text)) >= 0]
        if places:
            waiting, self.stopped, final = waiting[: min(places)], True, True
        keep = 0 if final else self._possible_stop(waiting)
        certain, self._held = waiting[: len(waiting) - keep], waiting[len(waiting) - keep :]
        self.text += certain
        return certain

    def _possible_stop(self, text: str) -> int:
        """Length of the longest end of `text` that a stop text may begin with."""
        return max(
            (
                size
                for stop in self._stop
                for size in range(1, len(stop))
                if text.endswith(stop[:size])
            ),
            default=0,
        )
