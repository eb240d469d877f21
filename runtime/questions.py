"""The values of the public interface: `Question` goes in, `Answer` with its
`FoundBox`es comes out, and `Stream` yields the text while it is generated.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from PIL import Image

from runtime.contract.arguments import check_text, whole_number
from runtime.contract.boxes import Box
from runtime.contract.errors import UsageError

__all__ = ["AUTO", "Answer", "FoundBox", "ImageSource", "Question", "Stream"]

ImageSource = str | os.PathLike[str] | bytes | Image.Image
"""A path, the bytes of an image file, or an RGB `PIL.Image`."""

AUTO = "auto"
"""The task that is detected from the text of the question."""


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Args:
        image: A path, the bytes of an image file, or an RGB `PIL.Image`.
        text: The question, for example "describe" or "where is the red circle?".
        task: "caption", "vqa", "ground", "chat", or "auto" to detect it from the text.
        visual_tokens: How many visual tokens to use; the model's default if None.
        max_new_tokens: The longest answer in tokens; the task's default if None.

    Raises:
        UsageError: An argument has the wrong type.
    """

    image: ImageSource
    text: str
    task: str = AUTO
    visual_tokens: int | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        check_text("text", self.text)
        check_text("task", self.task)
        for name in ("visual_tokens", "max_new_tokens"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))


@dataclass(frozen=True)
class FoundBox:
    """A box in an answer: the phrase it belongs to, `box` in pixels of the displayed
    image, and `relative` in [0, 1].
    """

    phrase: str
    box: Box
    relative: Box


@dataclass(frozen=True)
class Answer:
    """The answer to one question.

    Attributes:
        text: The answer as text.
        task: The task the question was answered as.
        boxes: The boxes found in the text.
        finish_reason: "stop" (the model or a stop text ended the answer), "length" (the
            token limit or the end of the cache) or "cancelled".
        tokens: The generated token ids.
        prompt_tokens: Cache rows filled by the prompt, text and image together.
        visual_tokens: How many of them belong to the image.
        timings: Milliseconds per stage.
        cached_tokens: How many prompt tokens were in the key/value cache already.
        drafted_tokens: Tokens drafted by prompt-lookup speculative decoding.
        accepted_tokens: Drafted tokens that were accepted.
        kept_tokens: How many tokens of the answer stay in the cache for a next turn.
        step_ms: Milliseconds of each call of the decoder after the prompt.
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
    """Iterate over it to receive the text in pieces of whole characters; afterwards
    `answer` holds the result.

    `lock` is its session's: each step of the iteration holds it, and `finish` holds it
    until the answer is complete, so that threads wait for each other.
    """

    pieces: Iterator[str]
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)
    answer: Answer | None = None
    cancelled: bool = field(default=False, init=False)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        with self.lock:
            return next(self.pieces)

    def cancel(self) -> None:
        """Ends the answer at the next token; any thread may call it.

        `answer` then holds the text so far, with the finish reason "cancelled".
        """
        self.cancelled = True

    def finish(self) -> Answer:
        """Reads the stream to its end.

        Returns:
            The complete answer.

        Raises:
            UsageError: The stream ended in an error before the answer was complete.
        """
        with self.lock:
            for _ in self.pieces:
                pass
        if self.answer is None:
            raise UsageError(
                "this stream ended in an error before its answer was complete; ask again"
            )
        return self.answer
