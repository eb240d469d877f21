"""The documentation's examples run as they stand: shell lines and Python blocks, in a
folder with a checkpoint, a bundle, an image and a data set.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.trainer.data_files import VOC_OBJECT
from trainer.datasets.scenes import draw_scene

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUNNABLE = ("sh", "bash", "python", "yaml")
COMMANDS = {
    "infmllm-run": "runtime.cli.run",
    "infmllm-eval": "runtime.evaluation.cli",
    "infmllm-bench": "runtime.bench.cli",
    "infmllm-export": "export.cli",
    "infmllm-train": "trainer.cli",
}


@dataclass(frozen=True)
class Block:
    """A fenced block. `not_run` is the reason in the comment above it; empty if none."""

    language: str
    text: str
    not_run: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(
        r"(?:^<!-- not run: ([^\n]+) -->\n)?^```(\w*)[^\n]*\n(.*?)^```$",
        page.read_text(),
        re.DOTALL | re.MULTILINE,
    )
    return [Block(language, text, reason) for reason, language, text in found]


def examples(page: str, language: str) -> list[str]:
    chosen = [
        block.text
        for block in blocks(ROOT / page)
        if block.language == language and not block.not_run
    ]
    assert chosen, f"{page} has {language} examples"
    return chosen


@dataclass(frozen=True)
class Shown:
    """How a page's shell blocks run: texts replaced to keep the test short, lines added
    before the blocks, and the files that must exist afterwards.
    """

    shorter: Mapping[str, str] = field(default_factory=dict)
    before: str = ""
    files: tuple[str, ...] = ()


SHELL = {
    "README.md": Shown(
        {
            "infmllm-export build --precision": "infmllm-export build tiny --precision",
            "--demo": "photo.png describe",
            "runtime/demo/sample.png": "photo.png",
            "--stage joint": "--stage joint --steps 2 --batch 2",
        },
        files=("found.png", "mine/config.json", "mine.bundle/manifest.json"),
    ),
    "docs/asking.md": Shown(files=("found.png", "answers.jsonl")),
    "docs/latency.md": Shown(
        {"--json report.json": "--repetitions 2 --json report.json"},
        before="infmllm-bench infmllm-bundle --repetitions 2 --json before.json\n"
        "cp before.json after.json",
        files=("report.html",),
    ),
    "docs/quantisation.md": Shown(
        {"infmllm-export build": "infmllm-export build tiny"}, files=("bundle.html",)
    ),
    "docs/tensorrt.md": Shown(
        {"infmllm-export build": "infmllm-export build tiny"},
        files=("pictures.bundle/manifest.json",),
    ),
    "docs/train-your-own.md": Shown(
        {
            "--image-size 192": "--image-size 64",
            "--stage adapt": "--stage joint --steps 2 --batch 2",
        },
        files=("report.html", "bccd.bundle/manifest.json", "found.png"),
    ),
}
"""A row for each page with shell blocks that run."""


@pytest.fixture
def workplace(
    built: Callable[[str], Path],
    tiny_checkpoint: Path,
    scene_png: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    shutil.copytree(built("fp32"), tmp_path / "infmllm-bundle")
    shutil.copyfile(scene_png, tmp_path / "photo.png")
    shutil.copytree(tiny_checkpoint, tmp_path / "tiny")
    shutil.copytree(tiny_checkpoint, tmp_path / "trainer" / "demo")
    shutil.copytree(ROOT / "docs" / "examples", tmp_path / "docs" / "examples")
    question = '{"image": "photo.png", "task": "vqa", "question": "what is it?", "answer": "red"}\n'
    for name in ("train.jsonl", "val.jsonl"):
        (tmp_path / name).write_text(question * 8)
    blood_cells(tmp_path / "bccd")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blood_cells(folder: Path) -> None:
    """Writes a data set in the layout of BCCD: eight pictures and three splits."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    names = [f"BloodImage_{number:05d}" for number in range(8)]
    for number, name in enumerate(names):
        picture = draw_scene(np.random.default_rng(number)).image.resize((128, 128))
        picture.save(folder / f"JPEGImages/{name}.jpg")
        size = "<size><width>128</width><height>128</height><depth>3</depth></size>"
        objects = VOC_OBJECT.format("WBC", 10, 20, 60, 70) + VOC_OBJECT.format("RBC", 60, 9, 90, 40)
        (folder / f"Annotations/{name}.xml").write_text(
            f"<annotation><filename>{name}.jpg</filename>{size}{objects}</annotation>"
        )
    for split, rows in {"trainval": names[:4], "val": names[4:], "test": names[6:]}.items():
        (folder / f"ImageSets/Main/{split}.txt").write_text("\n".join(rows) + "\n")


def run_shell(script: str, folder: Path) -> str:
    commands = folder / "bin"
    commands.mkdir()
    for name, module in COMMANDS.items():
        (commands / name).write_text(
            f'#!/bin/sh\nexec {sys.executable} -c "from {module} import main; main()" "$@"\n'
        )
        (commands / name).chmod(0o755)
    (commands / "torchrun").write_text(
        f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    )
    (commands / "torchrun").chmod(0o755)
    environment = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        ["bash", "-c", f"set -e\n{script}"], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_every_block_runs_or_says_why_not() -> None:
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        for block in blocks(page):
            if block.language in RUNNABLE and not block.not_run:
                tested = {"sh": name in SHELL, "python": name in PYTHON}
                assert tested.get(block.language), f"{name} has a block that nothing runs: {block}"
        # Commands that are merely indented would escape the test.
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        loose = re.search(r"^    (pip|infmllm-\w+|python3?|make) .*", prose, re.MULTILINE)
        assert not loose, f"{name}: {loose}"


PYTHON = ("README.md", "docs/api.md")


@pytest.mark.parametrize("page", PYTHON)
def test_python_examples(page: str, workplace: Path) -> None:
    (workplace / "runtime" / "demo").mkdir(parents=True)
    shutil.copyfile("photo.png", "runtime/demo/sample.png")
    namespace: dict[str, Any] = {}
    for block in examples(page, "python"):
        exec(compile(block, page, "exec"), namespace)
    if page == "docs/api.md":
        assert len(namespace["answers"]) == 2 and len(namespace["chat"].messages) == 4


@pytest.mark.slow
@pytest.mark.parametrize("page", SHELL)
def test_shell_examples(page: str, workplace: Path) -> None:
    shown = SHELL[page]
    script = "\n".join(examples(page, "sh"))
    for words, shorter in shown.shorter.items():
        assert words in script, f"{page} no longer has {words!r}"
        script = script.replace(words, shorter)
    run_shell(f"{shown.before}\n{script}", workplace)
    for name in shown.files:
        assert (workplace / name).exists(), name


def test_quoted_plans_are_what_the_command_prints() -> None:
    from typer.testing import CliRunner

    from export.cli import app

    page = next(block.text for block in blocks(ROOT / "docs/jetson.md") if block.language == "text")
    quoted = re.split(r"^\$ infmllm-export ", page, flags=re.MULTILINE)[1:]
    assert len(quoted) == 4
    for command, _, output in (part.partition("\n") for part in quoted):
        printed = CliRunner().invoke(app, command.split()).stdout
        assert [
            line.rstrip() for line in printed.rstrip().splitlines()
        ] == output.rstrip().splitlines(), command
