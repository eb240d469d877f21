"""The rules of the house: who may import whom, a light runtime, a true file tree,
honest `__all__`s.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("runtime", "trainer", "calibration", "export")
MODULES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
SHARED = ("runtime.contract", "runtime.data", "runtime.evaluation", "runtime.output")
HEAVY = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "safetensors")


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the room they lead to"
            found.add(node.module or "")
    return found


def breaches(room: str, modules: set[str]) -> list[str]:
    wrong = [m for m in modules if m.split(".")[0] in ROOMS[ROOMS.index(room) + 1 :]]
    if room == "trainer":
        wrong += [m for m in modules if m.startswith("runtime") and not m.startswith(SHARED)]
    if room == "runtime":
        wrong += [m for m in modules if m.split(".")[0] in HEAVY]
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_only_from_their_left(path: Path) -> None:
    assert not breaches(path.relative_to(ROOT).parts[0], imported(path))


def test_the_rule_sees_a_breach() -> None:
    assert (
        breaches("runtime", {"torch.nn"})
        and breaches("trainer", {"runtime.session"})
        and breaches("trainer", {"export.cli"})
    )


def test_runtime_imports_and_answers_help_with_heavy_packages_blocked() -> None:
    code = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {HEAVY!r}:
            raise ImportError('blocked ' + name)
sys.meta_path.insert(0, Block())
import runtime, runtime.session, runtime.cli.run, runtime.bench.cli, runtime.bench.measure
import runtime.evaluation.cli, runtime.parity, runtime.engines.onnxruntime.cpu
import runtime.doctor.checks, runtime.doctor.report
from runtime import load
assert not set({HEAVY!r}) & set(sys.modules)
from runtime.evaluation.evaluate import open_examples
assert len(open_examples('synthetic:3')) >= 3
print('light')
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "light", result.stderr


def test_readme_tree_names_what_there_is() -> None:
    block = re.search(r"```text tree\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block, "README.md has a ```text tree block"
    listed: set[str] = set()
    folders: list[str] = []
    for line in block[1].splitlines():
        name = line.split("#")[0].rstrip()
        if not name:
            continue
        depth = (len(name) - len(name.lstrip())) // 2
        folders[depth:] = [name.strip()]
        listed.add("".join(folders))
    tracked = subprocess.run(
        ["git", "ls-files", *ROOMS, "tests", "benchmarks", "docs"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout.split()
    wanted = {path for path in tracked if not path.endswith("__init__.py")}
    wanted |= {
        f"{folder}/" for path in tracked for folder in map(str, Path(path).parents) if folder != "."
    }
    shown = {
        path for path in listed if path.split("/")[0] in (*ROOMS, "tests", "benchmarks", "docs")
    }
    assert shown == wanted


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_all_names_exist(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    for public in getattr(module, "__all__", ()):
        assert hasattr(module, public), f"{name}.__all__ promises {public}"
    if path.name != "__init__.py":
        assert getattr(module, "__all__", None), f"{name} names its public parts"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_open_with_a_purpose_and_stay_short(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    assert not text or ast.get_docstring(ast.parse(text)), f"{path} opens with what it is for"


def test_base_dependencies_are_the_runtimes() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base = {re.split(r"[\s<>=\[]", requirement)[0] for requirement in project["dependencies"]}
    assert base == {"numpy", "onnxruntime", "pillow", "rich", "tokenizers", "typer"}
