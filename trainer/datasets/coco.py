"""COCO captions: `captions_train2017.json`, with its images in `images=FOLDER`
(default: the file's own folder).
"""

from __future__ import annotations

from collections import defaultdict

from runtime.data.bad_rows import Faults, field
from runtime.data.data_argument import DataSource
from runtime.data.sample import Example, Sample
from trainer.datasets.files import picture, read_json, rows

__all__ = ["read"]

PROMPT = "describe"


def read(source: DataSource, faults: Faults) -> list[Example]:
    """Reads one example per image, with one caption sample. All its human captions are
    references; training draws one of them each time. Raises `DataError`.
    """
    data = read_json(source.path)
    names: dict[int, str] = {}
    for index, row in enumerate(rows(data, "images", source.path)):
        with faults.row(f"{source.path}: images[{index}]"):
            names[field(row, "id", int)] = field(row, "file_name", str)
    captions: dict[int, list[str]] = defaultdict(list)
    for index, row in enumerate(rows(data, "annotations", source.path)):
        with faults.row(f"{source.path}: annotations[{index}]"):
            image = field(row, "image_id", int)
            if image not in names:
                raise ValueError(f"image_id {image} is not among the images")
            captions[image].append(" ".join(field(row, "caption", str).split()))
    examples = []
    for image, texts in captions.items():
        with faults.row(f"{source.path}: image {image}"):
            sample = Sample("caption", PROMPT, texts[0], references=tuple(texts)).checked()
            examples.append(
                Example(
                    picture(source.folder("images"), names[image]),
                    (sample,),
                    name=f"{source.path}: image {image}",
                )
            )
    return examples
