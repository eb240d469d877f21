"""Every data set reader on small files in its real format, mixing, and augmentation
that keeps boxes right.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.contract.errors import DataError
from tests.conftest import TINY
from tests.trainer.data_files import VOC_OBJECT, dump, jsonl, pictures, refcoco, voc
from trainer.datasets import DATASETS, open_source, read_examples


def coco(folder: Path) -> str:
    pictures(folder / "train2017", "000000000009.jpg")
    data = {
        "images": [{"id": 9, "file_name": "000000000009.jpg", "width": 100, "height": 80}],
        "annotations": [
            {"id": i, "image_id": 9, "caption": text}
            for i, text in enumerate(("A cat sits.\n", "One  cat."))
        ],
    }
    return f"coco:{dump(folder / 'captions.json', data)},images={folder / 'train2017'}"


def vqav2(folder: Path) -> str:
    pictures(folder / "train2014", "COCO_train2014_000000000009.jpg")
    questions = {
        "data_subtype": "train2014",
        "questions": [
            {"image_id": 9, "question": "How many cats?", "question_id": 90},
            {"image_id": 9, "question": "Is it?", "question_id": 91},
        ],
    }
    annotations = {
        "annotations": [
            {
                "question_id": number,
                "image_id": 9,
                "answer_type": kind,
                "multiple_choice_answer": best,
                "answers": [{"answer": best, "answer_id": i} for i in range(9)]
                + [{"answer": "other", "answer_id": 9}],
            }
            for number, kind, best in ((90, "number", "2"), (91, "yes/no", "yes"))
        ]
    }
    asked, answers = dump(folder / "q.json", questions), dump(folder / "a.json", annotations)
    return f"vqav2:{asked},answers={answers},images={folder / 'train2014'}"


def llava(folder: Path) -> str:
    pictures(folder / "images", "x.jpg")
    turns = [
        ("human", "What is it?\n<image>"),
        ("gpt", "A cat."),
        ("human", "And its color?"),
        ("gpt", "Grey."),
    ]
    rows = [
        {
            "id": "1",
            "image": "x.jpg",
            "conversations": [{"from": role, "value": text} for role, text in turns],
        }
    ]
    return f"llava:{dump(folder / 'llava.json', rows)},images={folder / 'images'}"


MAKERS = {
    "coco": coco,
    "vqav2": vqav2,
    "refcoco": refcoco,
    "llava": llava,
    "jsonl": jsonl,
    "voc": voc,
    "synthetic": lambda folder: "synthetic:3",
}


@pytest.mark.parametrize("name", DATASETS)
def test_every_reader_reads_and_trains(name: str, tmp_path: Path) -> None:
    text = MAKERS[name](tmp_path)
    examples = read_examples(text)
    assert examples and all(
        sample.prompt() and sample.answer for example in examples for sample in example.load()[1]
    )
    source = open_source([text])
    first, again = (source.draw(np.random.default_rng(5), False, TINY) for _ in range(2))
    assert first.samples == again.samples and first.samples and source.texts()
    image, _ = first.load()
    assert name == "synthetic" or image.size == (TINY.vision.image_size,) * 2
    if source.dense_classes:
        assert isinstance(first.dense, np.ndarray) and first.dense.shape == (
            TINY.vision.grid**2,
            len(source.dense_classes) + 4 + 64,
        )


def test_what_readers_find(tmp_path: Path) -> None:
    [caption] = read_examples(coco(tmp_path))[0].samples
    assert caption.references == ("A cat sits.", "One cat.") and caption.answer == "A cat sits."
    count, yes = read_examples(vqav2(tmp_path))[0].samples
    assert (count.answer, count.kind, len(count.references), yes.answer) == (
        "2",
        "number",
        10,
        "yes",
    )
    left, cat = read_examples(refcoco(tmp_path))[0].samples
    assert left.box == pytest.approx((0.1, 0.25, 0.6, 0.88125)) and (left.text, cat.text) == (
        "left cat",
        "cat",
    )
    first, later = read_examples(llava(tmp_path))[0].samples
    assert first.text == "What is it?" and first.answer == "A cat." and len(first.messages) == 1
    assert (
        later.answer == "Grey."
        and [m.role for m in later.messages] == ["user", "assistant", "user"]
        and later.kind == "later turn"
    )
    caption, count, presence, box = read_examples(voc(tmp_path))[0].samples
    assert caption.answer == "a picture with a potted plant" and (count.text, count.answer) == (
        "how many potted plants are there?",
        "1",
    )
    assert (
        presence.answer == "yes"
        and box.box == pytest.approx((0.1, 0.25, 0.6, 0.875))
        and box.text == "potted plant"
    )


FAULTS: dict[str, tuple[str, str, Any, str]] = {
    # reader: file, what is replaced, by what, words of the message
    "coco": ("captions.json", '"image_id": 9', '"image_id": 7', "image_id 7"),
    "coco picture": ("captions.json", "000000000009.jpg", "gone.jpg", "does not exist"),
    "coco json": ("captions.json", "{", "", "not valid JSON"),
    "vqav2": ("a.json", '"question_id": 91', '"question_id": 5', "question 91 has no answer"),
    "vqav2 long": ("q.json", "Is it?", "what is it, " * 20, "has 60 words, expected at most 50"),
    "refcoco": ("testA.json", "70.5", "99.5", "does not lie inside"),
    "refcoco box": ("testA.json", "[10.0, 20, 60, 70.5]", '["a"]', "expected [x1, y1, x2, y2]"),
    "llava": ("llava.json", '"gpt"', '"human"', "alternate"),
    "llava picture": ("llava.json", '"image": "x.jpg", ', "", "no image"),
    "jsonl": ("d.jsonl", '"cat"', "3", "d.jsonl:1"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_bad_rows_are_named_or_left_out_with_a_count(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, old, new, words = FAULTS[case]
    text = MAKERS[case.split()[0]](tmp_path)
    path = tmp_path / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError) as caught:
        read_examples(text)
    assert (
        words in str(caught.value)
        and file.split(".")[0] in str(caught.value)
        and "\n" not in str(caught.value)
    )
    if "json" in case.split()[1:]:
        return
    if case.startswith("vqav2"):
        assert len(read_examples(text, skip_bad=True)[0].samples) == 1
        assert "left out 1 bad rows" in capsys.readouterr().err
    else:
        with pytest.raises(DataError, match="no samples"):
            read_examples(text, skip_bad=True)


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        (VOC_OBJECT.format("cat", 10, 20, 10, 70), "does not lie inside"),
        (VOC_OBJECT.format("cat", 10, 20, 101, 70), "does not lie inside"),
        (VOC_OBJECT.format("cat", "x", 20, 30, 70), "expected a number"),
        ("<object><name>cat</name></object>", "lacks its"),
        ("<object>", "not valid XML"),
    ],
)
def test_bad_annotations(objects: str, words: str, tmp_path: Path) -> None:
    text = voc(
        tmp_path,
        objects + VOC_OBJECT.format("dog", 1, 1, 50, 50) if "not valid" not in words else objects,
    )
    with pytest.raises(DataError, match=words):
        read_examples(text)
    if "not valid" not in words:
        assert any(sample.text == "dog" for sample in read_examples(text, skip_bad=True)[0].samples)


def test_names_of_classes(tmp_path: Path) -> None:
    text = voc(tmp_path, VOC_OBJECT.format("Platelets", 1, 1, 50, 50))
    assert read_examples(text)[0].samples[1].text == "how many platelets are there?"
    names = dump(
        tmp_path / "names.json", {"Platelets": ["platelet", "platelets"], "WBC": "white cell"}
    )
    texts = [sample.text for sample in read_examples(f"{text},names={names}")[0].samples]
    assert "platelet" in texts and "how many white cells are there?" in texts
    for wrong, words in (
        ({}, "no words for class"),
        ({"Platelets": 3}, "expected a word"),
        ([], "not a JSON object"),
    ):
        dump(names, wrong)
        with pytest.raises(DataError, match=words):
            read_examples(f"{text},names={names}")


def test_entities_are_not_expanded(tmp_path: Path) -> None:
    text = voc(tmp_path)
    (tmp_path / "Annotations" / "x.xml").write_text(
        '<!DOCTYPE a [<!ENTITY b "c">]><annotation>&b;</annotation>'
    )
    with pytest.raises(DataError, match="entities"):
        read_examples(text)
