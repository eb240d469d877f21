"""`infmllm-eval`: tables, JSON, the control, and a page that shows every answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from runtime.data.sample import Example, Sample
from runtime.evaluation.cli import main
from runtime.evaluation.evaluate import AnswerRow, evaluate
from runtime.evaluation.html_report import report_page
from runtime.evaluation.metrics import score


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["infmllm-eval", *map(str, arguments)])
    main()


def test_figures_rows_and_page(
    built: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page, rows = tmp_path / "r.html", tmp_path / "r.jsonl"
    run(
        monkeypatch,
        built("fp32"),
        "synthetic:3",
        "--control",
        "--json",
        "--html",
        page,
        "--out",
        rows,
    )
    result = json.loads(capsys.readouterr().out)
    assert set(result["tasks"]) == set(result["control"]) == {"caption", "vqa", "ground"}
    assert result["tasks"]["ground"].keys() >= {
        "count",
        "accuracy",
        "low",
        "high",
        "mean_iou",
        "iou_low",
        "iou_high",
    }
    assert "cider" in result["tasks"]["caption"]
    assert len(rows.read_text().splitlines()) == 9 == page.read_text().count("<figure ")
    run(monkeypatch, built("fp32"), "synthetic:3", "--control")
    text = capsys.readouterr().out
    assert "without images" in text and "CIDEr-D" in text and "[" in text


class Answers:
    """Says what it was shown: the mean colour of the image's first pixel, or a fixed
    box.
    """

    def answer(self, image: Image.Image, sample: Sample, visual_tokens: int | None) -> str:
        if sample.task == "ground":
            return "0.00,0.00 0.50,0.50"
        return "red" if image.getpixel((0, 0)) == (255, 0, 0) else "<b>grey</b>"


class Tags(HTMLParser):
    """Collects elements and checks that none is left open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def examples() -> list[Example]:
    image = Image.new("RGB", (300, 200), (255, 0, 0))
    return [
        Example(
            image,
            (
                Sample("vqa", "what colour?", "red", kind="colour"),
                Sample("ground", "good", "", box=(0, 0, 0.5, 0.5), kind="thing"),
                Sample("ground", "bad <phrase>", "", box=(0.5, 0.5, 1, 1), kind="thing"),
            ),
            name="one",
        )
    ]


def test_the_control_hides_the_picture() -> None:
    seen, blind = (
        evaluate(Answers(), examples())[0].figures(),
        evaluate(Answers(), examples(), blank=True)[0].figures(),
    )
    assert seen["vqa"]["accuracy"] == 100 and blind["vqa"]["accuracy"] == 0
    assert seen["ground"]["accuracy"] == 50 and seen["ground"]["mean_iou"] == 0.5


def test_the_page_is_well_formed_escaped_and_worst_first() -> None:
    tasks, kinds, rows = evaluate(Answers(), examples(), thumbnails=True)
    page = report_page(
        {
            "model": "m<",
            "data": "d",
            "visual_tokens": 16,
            "tasks": tasks.figures(),
            "kinds": kinds.figures(),
        },
        rows,
    )
    tags = Tags()
    tags.feed(page)
    assert (
        not tags.open
        and "<phrase>" not in page
        and "bad <phrase>" in tags.text
        and "m<" in tags.text
    )
    assert (
        page.index("bad &lt;phrase&gt;") < page.index(">good<")
        and page.count("data:image/jpeg;base64,/9j/") == 3
    )
    import io

    shown = Image.open(io.BytesIO(rows[2].thumbnail))
    assert shown.size == (256, 171)
    green, red = shown.getpixel((255 - 1, 170 - 1)), shown.getpixel((1, 1))
    assert isinstance(green, tuple) and isinstance(red, tuple)
    assert green[1] > 150 > green[0] and red[0] > 200 > red[1]


def test_long_lists_are_cut_to_the_worst() -> None:
    sample = Sample("vqa", "x?", "yes")
    rows = [
        AnswerRow("n", sample, text, score(sample, text)) for text in ["yes"] * 500 + ["no"] * 10
    ]
    page = report_page({"model": "m", "data": "d", "tasks": {}, "kinds": {}}, rows)
    assert (
        page.count("<figure ") == 400 and page.count('class="wrong"') == 10 and "400 of 510" in page
    )


def test_bad_pictures_are_errors_or_left_out(
    built: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    rows = [
        {"image": f"{name}.png", "task": "vqa", "question": "what?", "answer": "x"}
        for name in ("good", "bad")
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit):
        run(monkeypatch, built("fp32"), tmp_path / "d.jsonl")
    assert "--skip-bad" in capsys.readouterr().err
    run(monkeypatch, built("fp32"), tmp_path / "d.jsonl", "--skip-bad", "--json")
    shown = capsys.readouterr()
    assert (
        json.loads(shown.out)["tasks"]["vqa"]["count"] == 1 and "left out 1 bad rows" in shown.err
    )
