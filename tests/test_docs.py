"""The documentation's examples run as they stand: shell lines and Python blocks, in a
folder with a bundle and an image.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def workplace(
    built: Callable[[str], Path], scene_png: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    shutil.copytree(built("fp32"), tmp_path / "infmllm-bundle")
    shutil.copyfile(scene_png, tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(page: str, language: str) -> list[str]:
    found = re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / "docs" / page).read_text(), re.DOTALL | re.MULTILINE
    )
    assert found, f"{page} has {language} examples"
    return found


def test_python_examples(workplace: Path) -> None:
    namespace: dict[str, object] = {}
    for block in blocks("api.md", "python"):
        exec(compile(block, "docs/api.md", "exec"), namespace)
    assert len(namespace["answers"]) == 2 and len(namespace["chat"].messages) == 4


def test_shell_examples(workplace: Path) -> None:
    commands = workplace / "bin"
    commands.mkdir()
    (commands / "infmllm-run").write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "from runtime.cli.run import main; main()" "$@"\n'
    )
    (commands / "infmllm-run").chmod(0o755)
    environment = os.environ | {"PATH": f"{commands}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    script = "set -e\n" + "\n".join(blocks("asking.md", "sh"))
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert (workplace / "found.png").exists() and len(
        (workplace / "answers.jsonl").read_text().splitlines()
    ) == 2


def test_quoted_plans_are_what_the_command_prints() -> None:
    from typer.testing import CliRunner

    from export.cli import app

    quoted = re.split(r"^\$ infmllm-export ", blocks("jetson.md", "text")[0], flags=re.MULTILINE)[
        1:
    ]
    assert len(quoted) == 4
    for command, _, output in (part.partition("\n") for part in quoted):
        printed = CliRunner().invoke(app, command.split()).stdout
        assert [
            line.rstrip() for line in printed.rstrip().splitlines()
        ] == output.rstrip().splitlines(), command
