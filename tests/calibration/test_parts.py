"""Parts of a data set are disjoint, whatever its files are called."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from calibration.parts import (
    AUTO,
    CALIBRATION,
    FRESH,
    GOLDENS,
    MIN_DISJOINT,
    QUESTIONS,
    SENSITIVITY,
    cut_part,
    is_disjoint,
)
from calibration.samples import draw_examples, overlap
from runtime.data.sample import Example, Sample

PARTS = (GOLDENS, FRESH, QUESTIONS, AUTO, SENSITIVITY, CALIBRATION)


def examples(folder: Path, images: int) -> list[Example]:
    """Two rows for each image, and a copy of the first image under another name."""
    rng, found = np.random.default_rng(0), []
    for index in range(images):
        path = folder / f"{index}.png"
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
        for text in ("what is it?", "describe"):
            found.append(Example(path, (Sample("vqa", text, "x"),), f"{index} {text}"))
    copy = folder / "copy.png"
    copy.write_bytes((folder / "0.png").read_bytes())
    return [*found, Example(copy, (Sample("vqa", "is it a copy?", "yes"),), "copy")]


@pytest.mark.parametrize("images", [MIN_DISJOINT, 40, 101])
def test_parts_share_no_image_and_cover_all(images: int, tmp_path: Path) -> None:
    rows = examples(tmp_path, images)
    parts = [
        {Path(str(row.picture)).read_bytes() for row in cut_part(rows, part)} for part in PARTS
    ]
    assert is_disjoint(rows) and all(parts[place] for place in (0, 1, 2, 3, 5))
    for one, other in itertools.combinations(parts, 2):
        assert not one & other
    assert len(set().union(*parts)) == images
    assert sum(len(cut_part(rows, part)) for part in PARTS) == len(rows)


def test_the_same_image_stays_in_its_part_under_another_name(tmp_path: Path) -> None:
    rows = examples(tmp_path, 30)
    for part in PARTS:
        names = {row.name.split()[0] for row in cut_part(rows, part)}
        assert ("0" in names) == ("copy" in names)


def test_small_data_sets_are_not_cut_and_say_so(tmp_path: Path) -> None:
    rows = examples(tmp_path, MIN_DISJOINT - 1)
    assert not is_disjoint(rows)
    assert all(len(cut_part(rows, part)) == len(rows) for part in PARTS)
    lines = [
        json.dumps({"image": f"{index}.png", "task": "caption", "answer": "x"})
        for index in range(MIN_DISJOINT - 1)
    ]
    (tmp_path / "small.jsonl").write_text("\n".join(lines))
    said = overlap(str(tmp_path / "small.jsonl"))
    assert "fewer than 12 images" in said and "calibrated on; add more" in said
    assert overlap("synthetic") == ""
    assert len(draw_examples(str(tmp_path / "small.jsonl"), 5, QUESTIONS)) == 5
