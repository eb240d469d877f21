"""Prints the file tree of docs/architecture.md, with the first sentence of each module.

usage: python tools/architecture_tree.py [--write]
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

__all__ = ["PAGE", "ROOT", "tree"]

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
FOLDERS = ("runtime", "trainer", "calibration", "export", "tests", "benchmarks", "tools", "docs")
_BLOCK = re.compile(r"(?<=```text tree\n).*?(?=```)", re.DOTALL)


def tree() -> str:
    """Returns the tree as text, one file or folder a line."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *FOLDERS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = sorted(path for path in map(Path, listed.stdout.split()) if (ROOT / path).exists())
    paths.sort(key=lambda path: FOLDERS.index(path.parts[0]))
    return "".join(f"{line.rstrip()}\n" for line in _lines(paths))


def _lines(paths: list[Path]) -> Iterator[str]:
    seen: set[Path] = set()
    for path in paths:
        for folder in reversed(path.parents[:-1]):
            if folder not in seen:
                seen.add(folder)
                yield _line(folder, f"{folder.name}/", _sentence(folder / "__init__.py"))
        if path.name not in ("__init__.py", "py.typed"):
            yield _line(path, path.name, _sentence(path))


def _line(path: Path, name: str, sentence: str) -> str:
    indented = "  " * (len(path.parts) - 1) + name
    return f"{indented:34}{f'# {sentence}' if sentence else ''}"


def _sentence(path: Path) -> str:
    """Returns the first sentence of a module's docstring, "" for other files."""
    if path.suffix != ".py" or not (ROOT / path).exists():
        return ""
    text = " ".join((ast.get_docstring(ast.parse((ROOT / path).read_text())) or "").split())
    return re.split(r"(?<=[.!?:])\s", text, maxsplit=1)[0].rstrip(".:")


def main() -> None:
    """Prints the tree, or writes it into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="replace the tree in the page")
    if parser.parse_args().write:
        PAGE.write_text(_BLOCK.sub(lambda _: tree(), PAGE.read_text()))
    else:
        print(tree(), end="")


if __name__ == "__main__":
    main()
