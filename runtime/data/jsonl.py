"""The project's own data format: one JSON object per line, with image paths relative to
the file. Every error names the file and the line number.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.contract.errors import DataError
from runtime.contract.image import image_size
from runtime.contract.prompt import Message
from runtime.data.bad_rows import Faults
from runtime.data.sample import Example, Sample

__all__ = ["read_jsonl"]

_MAX_LINE = 1 << 20


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'"{key}" is {value!r:.40}, expected text')
    return value


def _caption(row: dict[str, Any]) -> Sample:
    return Sample(
        "caption", _text(row, "prompt") if "prompt" in row else "describe", _text(row, "answer")
    )


def _vqa(row: dict[str, Any]) -> Sample:
    return Sample("vqa", _text(row, "question"), _text(row, "answer"))


def _ground(row: dict[str, Any]) -> Sample:
    box = row.get("box")
    if (
        not isinstance(box, list)
        or len(box) != 4
        or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in box)
    ):
        raise ValueError(f'"box" is {box!r:.60}, expected [x1, y1, x2, y2] in pixels')
    return Sample(
        "ground",
        _text(row, "phrase"),
        "",
        pixel_box=(float(box[0]), float(box[1]), float(box[2]), float(box[3])),
    )


def _chat(row: dict[str, Any]) -> Sample:
    turns = row.get("messages")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError('"messages" is not a list of {"role", "content"} objects')
    messages = [Message(_text(turn, "role"), _text(turn, "content")) for turn in turns]
    if (
        len(messages) < 2
        or len(messages) % 2
        or [m.role for m in messages] != ["user", "assistant"] * (len(messages) // 2)
    ):
        raise ValueError("messages must alternate user and assistant and end with the assistant")
    return Sample("chat", messages[-2].content, messages[-1].content, messages=tuple(messages[:-1]))


_READERS: dict[str, Callable[[dict[str, Any]], Sample]] = {
    "caption": _caption,
    "vqa": _vqa,
    "ground": _ground,
    "chat": _chat,
}


def read_jsonl(path: Path, faults: Faults | None = None) -> list[Example]:
    """Reads one example per line, in file order; images are opened later. Raises
    `DataError` at the first bad line, unless `faults` is set to skip bad rows.
    """
    faults = faults or Faults()
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise DataError(
            f"data file {path} cannot be read ({error.strerror}); check the path"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"data file {path} is not UTF-8 text ({error.reason} at byte {error.start}); save it "
            f"as UTF-8"
        ) from None
    examples = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            with faults.row(f"{path}:{number}"):
                examples.append(_read_line(line, path, number))
    if not examples:
        raise DataError(f"data file {path} has no samples; expected one JSON object per line")
    return examples


def _read_line(line: str, path: Path, number: int) -> Example:
    if len(line) > _MAX_LINE:
        raise ValueError(f"line is longer than {_MAX_LINE} characters")
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("the line is not a JSON object")
    task = row.get("task")
    if not isinstance(task, str) or task not in _READERS:
        raise ValueError(f'"task" is {task!r:.40}, expected one of {", ".join(_READERS)}')
    image = path.parent / _text(row, "image")
    sample = _READERS[task](row).checked()
    if not image.is_file():
        raise ValueError(f"image {image} does not exist")
    if sample.pixel_box:
        sample = sample.placed(*image_size(image), f"{path}:{number}")
    return Example(image, (sample,), name=f"{path}:{number}")
