"""Sample sheets during training: at regular intervals the model answers a few held-out
questions, and an image shows the answers with boxes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from runtime.contract.boxes import parse_box
from runtime.contract.errors import InfMLLMError
from runtime.contract.tokenizer import Tokenizer
from runtime.data.sample import Example
from runtime.output.draw_boxes import draw_boxes, truth_and_found
from trainer.checkpoint import Checkpoint
from trainer.evaluate import CheckpointAnswerer
from trainer.model import InfMLLM

__all__ = ["sample_sheet"]

_TILE, _LINE, _ROWS, _CHARACTERS = 256, 14, 6, 44
_COLUMNS = 3
SHEET_EXAMPLES = 6


def sample_sheet(model: InfMLLM, tokenizer: Tokenizer, examples: Sequence[Example]) -> Image.Image:
    """Draws up to six images, each with one answer per task. True boxes are green,
    predicted boxes red.
    """
    was_training = model.training
    model.eval()
    answerer = CheckpointAnswerer(Path(), Checkpoint(Path(), model, tokenizer, {}, ""))
    tiles = []
    for example in examples[:SHEET_EXAMPLES]:
        with suppress(InfMLLMError):  # the scoring at the end reports bad examples
            tiles.append(_tile(answerer, example))
    model.train(was_training)
    rows = max(1, -(-len(tiles) // _COLUMNS))
    height = _TILE + _ROWS * _LINE
    sheet = Image.new("RGB", (_COLUMNS * _TILE, rows * height), "white")
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % _COLUMNS * _TILE, index // _COLUMNS * height))
    return sheet


def _tile(answerer: CheckpointAnswerer, example: Example) -> Image.Image:
    image, samples = example.load()
    boxes, lines = [], list[str]()
    for sample in {sample.task: sample for sample in samples}.values():
        answer = answerer.answer(image, sample, None)
        if sample.box:
            boxes += truth_and_found(image.size, sample.box, parse_box(answer))
        lines.append(f"{sample.text}: {answer}")
    picture = draw_boxes(image, boxes)
    picture.thumbnail((_TILE, _TILE))
    tile = Image.new("RGB", (_TILE, _TILE + _ROWS * _LINE), "white")
    tile.paste(picture, (0, 0))
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default(11)
    wrapped = [
        part
        for line in lines
        for part in textwrap.wrap(line.encode("latin-1", "replace").decode("latin-1"), _CHARACTERS)
    ]
    for index, line in enumerate(wrapped[:_ROWS]):
        draw.text((2, picture.height + 1 + index * _LINE), line, fill="black", font=font)
    return tile
