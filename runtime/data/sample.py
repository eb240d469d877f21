"""`Sample`, the common form of every question about an image, and `Example`, an image
with its samples. Training and evaluation share both.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from runtime.contract.boxes import Box, check_inside, format_box, to_unit_box
from runtime.contract.image import open_image
from runtime.contract.prompt import Message, Prompt, render, render_chat

__all__ = ["Example", "Sample"]


@dataclass(frozen=True)
class Sample:
    """One question about one image.

    `text` is the prompt, question, phrase or instruction. `answer` is the expected
    text; for grounding it is the box as text. `box` is in [0, 1] of the displayed
    image. `pixel_box` replaces `box` until the image size is known. For a conversation,
    `messages` holds all turns except the last answer, and `text` repeats its last user
    turn. `kind` names a finer class for reports. `references` holds the answers of
    several people if the data set has them; `answer` is then the one used in training.
    """

    task: str
    text: str
    answer: str
    box: Box | None = None
    messages: tuple[Message, ...] = ()
    kind: str = ""
    pixel_box: Box | None = None
    references: tuple[str, ...] = ()

    def prompt(self) -> Prompt:
        """Renders the prompt."""
        return render_chat(self.messages) if self.messages else render(self.task, self.text)

    def checked(self) -> Sample:
        """Returns the sample if its prompt renders and its texts are valid Unicode.
        Raises `PromptError` or `ValueError`.
        """
        (self.prompt().text + self.answer).encode("utf-8")
        return self

    def placed(self, width: int, height: int, where: str) -> Sample:
        """Returns a sample with `box` and `answer` computed from `pixel_box`. Raises
        `DataError` if the box is not inside a width x height image.
        """
        if self.pixel_box is None:
            return self
        check_inside(self.pixel_box, width, height, f"{where}: box {list(self.pixel_box)}")
        box = to_unit_box(self.pixel_box, width, height)
        return replace(self, box=box, answer=format_box(box), pixel_box=None)


@dataclass(frozen=True)
class Example:
    """An image (RGB, or the path of one) with the samples that ask about it. `dense`
    optionally holds labels per patch for the warm-up stage.
    """

    picture: Image.Image | Path
    samples: tuple[Sample, ...]
    name: str = ""
    dense: object | None = field(default=None, repr=False)

    def load(self) -> tuple[Image.Image, tuple[Sample, ...]]:
        """Opens the image and returns it with its samples, whose boxes are in [0, 1].
        Raises `ImageError` or `DataError`.
        """
        image = self.picture if isinstance(self.picture, Image.Image) else open_image(self.picture)
        return image, tuple(sample.placed(*image.size, self.name) for sample in self.samples)
