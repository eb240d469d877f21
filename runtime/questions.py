"""What a question comes back as: `Answer` with its boxes, and `Stream`, which yields
the text while it is generated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from runtime.contract.boxes import Box
from runtime.contract.errors import UsageError
from runtime.contract.tokenizer import TextStream, Tokenizer

__all__ = ["Answer", "AnswerText", "FoundBox", "Stream"]


@dataclass(frozen=True)
class FoundBox:
    """A box the answer contains: what it stands for, in pixels of the displayed picture
    and in [0, 1].
    """

    phrase: str
    box: Box
    relative: Box


@dataclass(frozen=True)
class Answer:
    """The outcome of one question.

    `finish_reason` is "stop" (the model ended it, or a stop text), "length" (token
    limit or full cache) or "cancelled". `tokens` are the generated ids, `cached_tokens`
    how many of `prompt_tokens` were in the cache already. `timings` are milliseconds
    per stage, `step_ms` of each call of the decoder after the prompt. `drafted_tokens`
    were looked up, `accepted_tokens` of them right; the first `kept_tokens` of the
    answer stay in the cache.
    """

    text: str
    task: str
    boxes: tuple[FoundBox, ...]
    finish_reason: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    visual_tokens: int
    timings: dict[str, float]
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    kept_tokens: int = 0
    step_ms: tuple[float, ...] = ()


@dataclass
class Stream:
    """Iterate to receive the text in pieces of whole code points; afterwards `answer`
    holds the result.
    """

    pieces: Iterator[str]
    answer: Answer | None = None
    cancelled: bool = field(default=False, init=False)

    def __iter__(self) -> Iterator[str]:
        return self.pieces

    def cancel(self) -> None:
        """Ends the answer at the next token, from this thread or another; `answer` then
        holds what there is, its finish reason "cancelled".
        """
        self.cancelled = True

    def finish(self) -> Answer:
        """Reads to the end and returns the answer."""
        for _ in self.pieces:
            pass
        if self.answer is None:
            raise UsageError("this stream ended in an error before its answer was whole; ask again")
        return self.answer


class AnswerText:
    """The text of an answer as it grows: whole code points, without the separator
    answers begin with, up to the first stop text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._words, self._stop = TextStream(tokenizer), tuple(stop)
        self._held = ""
        self.text, self.stopped = "", False

    def push(self, token: int) -> str:
        """The text that became certain with this token, possibly empty."""
        return self._add(self._words.push(token), final=False)

    def finish(self) -> str:
        """What was held back."""
        return self._add(self._words.finish(), final=True)

    def _add(self, piece: str, final: bool) -> str:
        if self.stopped:
            return ""
        new = piece if self.text or self._held else piece.lstrip(" ")
        waiting = self._held + new
        places = [place for text in self._stop if (place := waiting.find(text)) >= 0]
        if places:
            waiting, self.stopped, final = waiting[: min(places)], True, True
        keep = 0 if final else self._undecided(waiting)
        shown, self._held = waiting[: len(waiting) - keep], waiting[len(waiting) - keep :]
        self.text += shown
        return shown

    def _undecided(self, text: str) -> int:
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
