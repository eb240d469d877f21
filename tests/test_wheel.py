"""What pip users get: the built wheel alone, in an empty folder, does the main job."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
def test_the_wheel_alone_builds_and_answers(tmp_path: Path) -> None:
    site, work = tmp_path / "site", tmp_path / "empty"
    work.mkdir()
    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    source = tmp_path / "source"
    copy_sources(source)
    run(*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, source, folder=tmp_path)
    (wheel,) = tmp_path.glob("infmllm_edge-*.whl")
    run(*pip, "install", "--no-deps", "--target", site, wheel, folder=tmp_path)

    def installed(module: str, *arguments: str) -> str:
        code = f"from {module} import main; main()"
        return run("-c", code, *arguments, folder=work, PYTHONPATH=str(site))

    where = "import export, runtime, trainer; print(export.__file__, trainer.__file__)"
    assert run("-c", where, folder=work, PYTHONPATH=str(site)).count(str(site)) == 2
    first = installed("runtime.cli.run", "--help")
    assert "infmllm-export build --precision int8" in first and "infmllm-run --demo" in first
    assert "VERIFIED" in installed("export.cli", "build", "--precision", "int8")
    caption = installed("runtime.cli.run", "--demo").strip()
    sample = str(site / "runtime/demo/sample.png")
    box = installed("runtime.cli.run", sample, "where is the orange circle?").strip()
    quoted = re.search(
        r"^```text\n(VERIFIED.*?)```$", (ROOT / "README.md").read_text(), re.S | re.M
    )
    assert quoted and quoted[1].splitlines()[1:] == [caption, box]
    assert {path.name for path in work.iterdir()} == {"infmllm-bundle"}


def copy_sources(target: Path) -> None:
    """Copies the packages and what the build reads, without anything that lies around."""
    target.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, target / name)
    for package in ("runtime", "trainer", "calibration", "export"):
        shutil.copytree(
            ROOT / package, target / package, ignore=shutil.ignore_patterns("__pycache__")
        )
