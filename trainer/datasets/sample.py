"""`Sample`, the one form every data set yields: a picture reference, a task, the user's text, the answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import Image

from runtime.contract.boxes import Box
from runtime.contract.prompt import Message, Prompt, render, render_chat

__all__ = ["Example", "Sample"]


@dataclass(frozen=True)
class Sample:
    """One question on one picture.

    `text` is the prompt, question, phrase or instruction; `answer` the expected text (for grounding the box as text); `box` is in [0, 1] of the
    displayed picture. For a conversation `messages` holds all turns but the last answer, and `text` repeats its last user turn.
    """

    task: str
    text: str
    answer: str
    box: Box | None = None
    messages: tuple[Message, ...] = ()
    kind: str = ""

    def prompt(self) -> Prompt:
        """The rendered prompt."""
        return render_chat(self.messages) if self.messages else render(self.task, self.text)


@dataclass(frozen=True)
class Example:
    """A displayed picture (RGB) with the samples asked about it; `dense` optionally holds labels per patch for the warm-up stage."""

    image: Image.Image
    samples: tuple[Sample, ...]
    name: str = ""
    dense: object | None = field(default=None, repr=False)
