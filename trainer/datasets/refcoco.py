"""RefCOCO, RefCOCO+ and RefCOCOg in the format of the published InfMLLM evaluation: a
JSON list of `{img_name, bbox, sentences: [{sent}]}`.

`bbox` is x1, y1, x2, y2 in pixels. The images are in `images=FOLDER` (default: the
file's own folder), directly or in train2014/ and val2014/.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from runtime.contract.boxes import Box
from runtime.contract.image import image_size
from runtime.data.bad_rows import Faults, field
from runtime.data.data_argument import DataSource
from runtime.data.sample import Example, Sample
from trainer.datasets.files import picture, read_json, rows

__all__ = ["read"]

_OVERSHOOT = 1.0  # pixels


def read(source: DataSource, faults: Faults) -> list[Example]:
    """Reads one example per image with all its phrases. Boxes are checked against the
    image size. Raises `DataError`.
    """
    found: dict[Path, list[Sample]] = defaultdict(list)
    sizes: dict[Path, tuple[int, int]] = {}
    for index, row in enumerate(rows(read_json(source.path), "", source.path)):
        where = f"{source.path}: row {index}"
        with faults.row(where):
            path = _picture(source.folder("images"), field(row, "img_name", str))
            sizes[path] = sizes.get(path) or image_size(path)
            box = _inside(_box(field(row, "bbox", list)), *sizes[path])
            for sentence in field(row, "sentences", list):
                sample = (
                    Sample("ground", field(sentence, "sent", str), "", pixel_box=box)
                    .placed(*sizes[path], where)
                    .checked()
                )
                found[path].append(sample)
    return [Example(path, tuple(samples), name=str(path)) for path, samples in found.items()]


def _picture(folder: Path, name: str) -> Path:
    part = "train2014" if "train" in name else "val2014"
    return picture(folder / part if (folder / part).is_dir() else folder, name)


def _inside(box: Box, width: int, height: int) -> Box:
    """Clips a box that overshoots the image by at most one pixel; the published files
    have such boxes. A box with a larger overshoot is bad data and is returned
    unchanged, for the later check to reject.
    """
    x1, y1, x2, y2 = box
    close = min(x1, y1) >= -_OVERSHOOT and x2 <= width + _OVERSHOOT and y2 <= height + _OVERSHOOT
    return (
        (max(0.0, x1), max(0.0, y1), min(float(width), x2), min(float(height), y2))
        if close
        else box
    )


def _box(values: list[object]) -> Box:
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(values) != 4 or len(numbers) != 4:
        raise ValueError(f'"bbox" is {values!r:.60}, expected [x1, y1, x2, y2] in pixels')
    return numbers[0], numbers[1], numbers[2], numbers[3]
