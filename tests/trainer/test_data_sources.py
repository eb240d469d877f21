"""Data sources: arguments, mixtures, caches, and rows that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer as RawTokenizer

from runtime.contract.errors import DataError, ImageError, UsageError
from runtime.contract.tokenizer import Tokenizer
from runtime.data.sample import Sample
from tests.conftest import TINY
from tests.trainer.data_files import VOC_OBJECT, dump, jsonl, pictures, refcoco, voc  # noqa: F401
from trainer.batch import Batch, pack, positions
from trainer.datasets import open_source, read_examples
from trainer.datasets.draw import Mixture, PictureCache
from trainer.datasets.source import BadBatch, BatchStream

BCCD = Path(__file__).parents[3] / "shared" / "data" / "bccd"


NAMES = Path(__file__).parents[2] / "docs" / "examples" / "bccd-names.json"


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
