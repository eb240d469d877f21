"""VQAv2: a questions file, with `answers=` its annotations file and `images=` the COCO
folder (default: the file's own folder).
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from runtime.contract.errors import UsageError
from runtime.data.bad_rows import Faults, field
from runtime.data.data_argument import DataSource
from runtime.data.sample import Example, Sample
from trainer.datasets.files import picture, read_json, rows

__all__ = ["read"]


def read(source: DataSource, faults: Faults) -> list[Example]:
    """Reads one example per image. The answers of ten people are the references; the
    most common one is the training answer. Raises `DataError`.
    """
    if "answers" not in source.options:
        raise UsageError(
            f"data {source.text!r} has no answers=FILE with the annotations; write "
            f"vqav2:QUESTIONS.json,answers=ANNOTATIONS.json,images=FOLDER"
        )
    answers_path = Path(source.options["answers"])
    answers: dict[int, tuple[str, tuple[str, ...], str]] = {}
    for index, row in enumerate(rows(read_json(answers_path), "annotations", answers_path)):
        with faults.row(f"{answers_path}: annotations[{index}]"):
            people = tuple(
                str(field(given, "answer", str)) for given in field(row, "answers", list)
            )
            answers[field(row, "question_id", int)] = (
                field(row, "multiple_choice_answer", str),
                people,
                str(row.get("answer_type", "")),
            )
    data = read_json(source.path)
    found: dict[Path, list[Sample]] = defaultdict(list)
    for index, row in enumerate(rows(data, "questions", source.path)):
        with faults.row(f"{source.path}: questions[{index}]"):
            number = field(row, "question_id", int)
            if number not in answers:
                raise ValueError(f"question {number} has no answer in {answers_path}")
            answer, people, kind = answers[number]
            sample = Sample(
                "vqa", field(row, "question", str), answer, kind=kind, references=people
            ).checked()
            path = picture(source.folder("images"), _file_name(data, row))
            found[path].append(sample)
    return [Example(path, tuple(samples), name=str(path)) for path, samples in found.items()]


def _file_name(data: Any, row: Any) -> str:
    """Returns COCO's file name of a question's image."""
    return f"COCO_{field(data, 'data_subtype', str)}_{field(row, 'image_id', int):012d}.jpg"
