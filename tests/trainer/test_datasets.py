"""Every data set reader on small files in its real format, mixing, and augmentation
that keeps boxes right.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer as RawTokenizer

from runtime.contract.errors import DataError, ImageError, UsageError
from runtime.contract.tokenizer import Tokenizer
from runtime.data.sample import Sample
from tests.conftest import TINY
from trainer.batch import Batch, pack, positions
from trainer.datasets import DATASETS, open_source, read_examples
from trainer.datasets.draw import Mixture, PictureCache
from trainer.datasets.source import BadBatch, BatchStream

BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd"
NAMES = Path(__file__).parents[2] / "docs" / "examples" / "bccd-names.json"


def dump(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data))
    return path


def pictures(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        Image.new("RGB", (100, 80), (90, 120, 60)).save(folder / name)


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
    "refcoco": ("testA.json", "70.5", "99.5", "does not lie inside"),
    "refcoco box": ("testA.json", "[10.0, 20, 60, 70.5]", '["a"]', "expected [x1, y1, x2, y2]"),
    "llava": ("llava.json", '"gpt"', '"human"', "alternate"),
    "llava picture": ("llava.json", '"image": "x.jpg", ', "", "no picture"),
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
    if case == "vqav2":
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
        ([], "no JSON object"),
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


@pytest.mark.parametrize(
    "text",
    [
        "voc:nowhere",
        "coco:gone.json",
        "gone.jsonl",
        "jsonl:x,answers=y",
        "synthetic,weight=-1",
        "synthetic,weight",
        "synthetic:none",
    ],
)
def test_bad_data_arguments(text: str) -> None:
    with pytest.raises((DataError, UsageError)) as caught:
        open_source([text]) if "weight" in text else read_examples(text)
    assert "\n" not in str(caught.value)


def test_a_damaged_picture_is_drawn_around_only_if_told_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = jsonl(tmp_path)
    line = '{"image": "images/x.jpg", "task": "vqa", "question": "what?", "answer": "x"}\n'
    Image.new("RGB", (100, 80)).save(tmp_path / "images" / "bad.jpg")
    data = (tmp_path / "images" / "bad.jpg").read_bytes()
    (tmp_path / "images" / "bad.jpg").write_bytes(data[: len(data) // 2])
    Path(text).write_text(line + line.replace("x.jpg", "bad.jpg"))
    strict, lenient = open_source([text]), open_source([text], skip_bad=True)
    with pytest.raises(ImageError, match=r"bad\.jpg"):
        for seed in range(40):
            strict.draw(np.random.default_rng(seed), False, TINY)
    drawn = [lenient.draw(np.random.default_rng(seed), False, TINY) for seed in range(40)]
    assert len(drawn) == 40 and capsys.readouterr().err.count("bad.jpg") == 1


def test_sources_are_mixed_by_weight(tmp_path: Path) -> None:
    mixed = open_source([f"{jsonl(tmp_path)},weight=3", "synthetic"])
    assert isinstance(mixed, Mixture) and mixed.dense_classes == ()
    drawn = [mixed.draw(np.random.default_rng(seed), False, TINY) for seed in range(200)]
    own = sum(example.samples[0].text == "cat" for example in drawn)
    assert 120 < own < 180 and all(example.dense is None for example in drawn)


def test_the_cache_keeps_to_its_limit(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png")
    cache = PictureCache(limit=100 * 80 * 3)
    assert cache.open(tmp_path / "a.png") is cache.open(tmp_path / "a.png")
    assert cache.open(tmp_path / "b.png") is not cache.open(tmp_path / "b.png")


@pytest.mark.skipif(not BCCD.is_dir(), reason=f"{BCCD} is absent")
def test_real_photographs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"BloodImage_00343\.xml: object 3: box"):
        read_examples(f"voc:{BCCD},split=train")
    examples = read_examples(
        f"voc:{BCCD},split=train,names={NAMES},scene=a blood smear", skip_bad=True
    )
    assert len(examples) == 205 and "left out 1 bad rows" in capsys.readouterr().err
    test = read_examples(f"voc:{BCCD},split=test,names={NAMES}")
    assert (
        len(test) == 72
        and sum(
            s.text == "white blood cell" and s.task == "ground" for e in test for s in e.samples
        )
        == 65
    )


def test_labels_of_different_things_are_not_mixed(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
    cats = [voc(tmp_path / name, VOC_OBJECT.format("cat", 1, 1, 50, 50)) for name in ("one", "two")]
    dogs = voc(tmp_path / "three", VOC_OBJECT.format("dog", 1, 1, 50, 50))
    assert (
        open_source(cats).dense_classes == (2,) and open_source([cats[0], dogs]).dense_classes == ()
    )


def test_an_annotation_of_another_size_is_a_bad_row(tmp_path: Path) -> None:
    text = voc(tmp_path)
    Image.new("RGB", (50, 80)).save(tmp_path / "JPEGImages" / "x.jpg")
    with pytest.raises(DataError, match="50x80, its annotation says 100x80"):
        read_examples(text)


def test_a_box_a_pixel_outside_is_clamped_as_the_published_files_need(tmp_path: Path) -> None:
    text = refcoco(tmp_path)
    path = tmp_path / "testA.json"
    path.write_text(path.read_text().replace("70.5", "80.75"))
    assert read_examples(text)[0].samples[0].box == pytest.approx((0.1, 0.25, 0.6, 1.0))


def test_too_long_samples_are_named_or_left_out(tmp_path: Path, tokenizer_json: str) -> None:
    tokenizer = Tokenizer(RawTokenizer.from_str(tokenizer_json), TINY)
    pictures(tmp_path, "x.png")
    rows = [
        {"image": "x.png", "task": "caption", "answer": answer}
        for answer in ("a cat", "word " * 900)
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = open_source([str(tmp_path / "d.jsonl")])
    bad = next(
        found
        for index in range(20)
        if isinstance(found := BatchStream(source, TINY, tokenizer, 2, 0)[index], BadBatch)
    )
    assert "x.png" in bad.message and "positions" in bad.message
    for index in range(20):
        batch = BatchStream(source, TINY, tokenizer, 2, 0, skip_bad=True)[index]
        assert isinstance(batch, Batch) and batch.ids.shape[1] < 100
    samples = [Sample("caption", "describe", "red " * 60)] * 20
    assert (
        len(pack(samples, tokenizer, 4, TINY.decoder.context).ids)
        <= 1024
        < positions(samples, tokenizer, 4)
    )
