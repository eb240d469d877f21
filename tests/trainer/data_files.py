"""Helpers shared by `test_datasets.py` and `test_data_sources.py`."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image


def dump(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data))
    return path


def pictures(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", (100, 80), (90, 120, 60)).save(folder / name)


def refcoco(folder: Path) -> str:
    pictures(folder / "train2014", "COCO_train2014_000000000009.jpg")
    rows = [
        {
            "img_name": "COCO_train2014_000000000009.jpg",
            "bbox": [10.0, 20, 60, 70.5],
            "segment_id": 1,
            "sentences": [{"sent": "left cat", "sent_id": 1}, {"sent": "cat", "sent_id": 2}],
        }
    ]
    return f"refcoco:{dump(folder / 'testA.json', rows)},images={folder}"


def jsonl(folder: Path) -> str:
    pictures(folder / "images", "x.jpg")
    (folder / "d.jsonl").write_text(
        json.dumps(
            {"image": "images/x.jpg", "task": "ground", "phrase": "cat", "box": [10, 20, 60, 70]}
        )
        + "\n"
    )
    return str(folder / "d.jsonl")


VOC_OBJECT = (
    "<object><name>{}</name><difficult>0</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
    "<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def voc(folder: Path, objects: str = VOC_OBJECT.format("potted_plant", 10, 20, 60, 70)) -> str:
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pictures(folder / "JPEGImages", "x.jpg")
    size = "<size><width>100</width><height>80</height><depth>3</depth></size>"
    (folder / "Annotations" / "x.xml").write_text(
        f"<annotation><filename>x.jpg</filename>{size}{objects}</annotation>"
    )
    (folder / "ImageSets" / "Main" / "train.txt").write_text("x\n")
    return f"voc:{folder}"
