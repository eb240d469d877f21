"""Data lines, specs and scores."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.contract.errors import DataError, SpecError
from runtime.contract.pooling import pool_matrix
from runtime.contract.spec import ModelSpec
from runtime.data.jsonl import read_jsonl
from runtime.output.console import command_app, run_command
from tests.conftest import TINY


@pytest.fixture
def data(tmp_path: Path) -> Path:
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    return tmp_path / "train.jsonl"


GOOD: list[dict[str, object]] = [
    {"image": "a.png", "task": "caption", "answer": "nothing"},
    {"image": "a.png", "task": "vqa", "question": "what?", "answer": "nothing"},
    {"image": "a.png", "task": "ground", "phrase": "it", "box": [10, 5, 50, 25]},
    {
        "image": "a.png",
        "task": "chat",
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
    },
]


def test_all_four_tasks_read(data: Path) -> None:
    data.write_text("\n".join(json.dumps(row) for row in GOOD) + "\n\n")
    caption, vqa, ground, chat = [example.load()[1][0] for example in read_jsonl(data)]
    assert caption.text == "describe" and vqa.text == "what?" and chat.answer == "Ho"
    assert (
        ground.box == pytest.approx((0.1, 0.1, 0.5, 0.5)) and ground.answer == "0.10,0.10 0.50,0.50"
    )
    assert all(sample.prompt().has_image for sample in (caption, vqa, ground, chat))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "Expecting"),
        ("3", "not a JSON object"),
        ('{"image": "a.png", "task": "dance"}', "dance"),
        ('{"image": "b.png", "task": "caption", "answer": "x"}', "does not exist"),
        ('{"image": "a.png", "task": "vqa", "answer": "x"}', "question"),
        ('{"image": "a.png", "task": "vqa", "question": "x", "answer": 3}', "answer"),
        ('{"image": "a.png", "task": "ground", "phrase": "x", "box": [1, 2, 3]}', "box"),
        (
            '{"image": "a.png", "task": "chat", "messages": [{"role": "user", "content": "x"}]}',
            "alternate",
        ),
        ('{"image": "a.png", "task": []}', "task"),
        ('{"image": "' + "a" * 5000 + '", "task": "caption", "answer": "x"}', "image|long"),
        (
            '{"image": "a.png", "task": "ground", "phrase": "x", "box": [1, 2, 3, '
            + "9" * 400
            + "]}",
            "large",
        ),
        ('{"image": "a.png", "task": "vqa", "question": "!!", "answer": "x"}', "no words"),
        ('{"image": "a.png", "task": "caption", "answer": "\\ud800"}', "surrogate"),
    ],
)
def test_a_bad_line_is_named_with_its_number(data: Path, line: str, words: str) -> None:
    data.write_text(json.dumps(GOOD[0]) + "\n" + line + "\n")
    with pytest.raises(DataError, match=rf"train\.jsonl:2.*{words}"):
        read_jsonl(data)


@pytest.mark.parametrize(
    "box", [[10, 5, 101, 25], [50, 5, 10, 25], [-1, 5, 10, 25], [10, 5, 10, 25]]
)
def test_boxes_outside_the_picture(data: Path, box: list[int]) -> None:
    data.write_text(json.dumps(GOOD[2] | {"box": box}))
    with pytest.raises(DataError, match="does not lie inside the 100x50 image"):
        read_jsonl(data)[0].load()


def test_missing_empty_and_binary_files(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for name in ("absent.jsonl", "empty.jsonl", "binary.jsonl"):
        with pytest.raises(DataError, match=name):
            read_jsonl(tmp_path / name)


def test_spec_survives_json() -> None:
    assert ModelSpec.from_text(json.dumps(TINY.to_json()), "here") == TINY
    assert TINY.pool_size_for(None) == 4 and TINY.pool_size_for(4) == 2
    with pytest.raises(SpecError, match="16, 4"):
        TINY.pool_size_for(5)
    with pytest.raises(SpecError, match="not valid JSON"):
        ModelSpec.from_text("{", "here")


def test_pool_matrix_averages_windows() -> None:
    grid = np.arange(36, dtype=np.float32).reshape(6, 6)
    pooled = (pool_matrix(6, 3) @ grid.reshape(36)).reshape(3, 3)
    assert np.array_equal(pooled, grid.reshape(3, 2, 3, 2).mean(axis=(1, 3)))
    assert np.array_equal(pool_matrix(4, 4), np.eye(16))
    with pytest.raises(SpecError):
        pool_matrix(6, 4)


def test_line_separators_inside_a_text_do_not_end_the_line(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "d.jsonl").write_text(
        '\ufeff{"image": "a.png", "task": "caption", "answer": "x\u2028y"}\n', encoding="utf-8"
    )
    assert read_jsonl(tmp_path / "d.jsonl")[0].samples[0].answer == "x\u2028y"


def test_an_interrupt_of_a_command_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    app = command_app("x")

    @app.command()
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        sys.argv = ["x"]
        run_command(app)
    assert caught.value.code == 130 and "interrupted" in capsys.readouterr().err
