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

from export.schemes import TARGET_SCHEMES
from export.targets import LOWERING
from runtime.engines import TARGETS
from tools.architecture_tree import PAGE, tree
from tools.cli_reference import PAGE as CLI_PAGE
from tools.cli_reference import reference

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


def test_the_documented_tree_is_true() -> None:
    block = re.search(r"```text tree\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert block and block[1] == tree(), "run: python tools/architecture_tree.py --write"


def test_the_command_reference_is_current() -> None:
    assert reference() == CLI_PAGE.read_text(), "run: python tools/cli_reference.py --write"


def test_the_readme_is_short() -> None:
    assert (ROOT / "README.md").read_text().count("\n") <= 150


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


# Layers of the runtime, lowest first: a file imports from its own layer and the lower ones.
LAYERS = (
    ("runtime.contract",),
    ("runtime.output", "runtime.data", "runtime.hardware"),
    ("runtime.evaluation",),
    ("runtime.questions", "runtime.engines"),
    ("runtime.generation",),
    ("runtime.parity", "runtime.chat"),
    ("runtime.session",),
    ("runtime.bench", "runtime.doctor", "runtime.cli", "runtime.evaluation.cli"),
)
# Commands answer --help and wrong options before they import what is slow.
COMMANDS = {"run", "cli", "decoding_options"}
# Third-party packages that a function may import: optional ones, and those that are slow to
# import and often not needed.
OPTIONAL_OR_SLOW = {
    *("llguidance", "tensorrt", "cuda", "resource"),  # resource: not on Windows
    *("typer", "rich", "accelerate", "torch", "zipfile"),
}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {module_name(path): path for path in MODULES}


def import_nodes(path: Path) -> list[tuple[ast.Import | ast.ImportFrom, bool, bool]]:
    """(node, inside a function, for type checkers only) of every import."""
    module = ast.parse(path.read_text())
    checking = {
        id(inner)
        for node in ast.walk(module)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    inside = {
        id(inner)
        for node in ast.walk(module)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
    }
    return [
        (node, id(node) in inside, id(node) in checking)
        for node in ast.walk(module)
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]


def targets_of(node: ast.Import | ast.ImportFrom) -> set[str]:
    """The project's own modules that an import names."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & NAMES.keys()
    inner = {f"{node.module}.{alias.name}" for alias in node.names} & NAMES.keys()
    return inner or {node.module or ""} & NAMES.keys()


def edges() -> dict[str, set[str]]:
    return {
        name: {other for node, _, _ in import_nodes(path) for other in targets_of(node)} - {name}
        for name, path in NAMES.items()
        if name != "runtime"  # names its public parts and imports none of them
    }


def circles(graph: dict[str, set[str]]) -> set[str]:
    """The modules that lie on a circle: each can be reached from itself."""
    found = set()
    for start in graph:
        seen, waiting = set(), list(graph[start])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += graph.get(name, ())
        if start in seen:
            found.add(start)
    return found


def test_no_circle() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == {"a", "b", "c"}
    assert not circles(edges())


def layer(name: str) -> int:
    """The layer of a runtime module: that of the longest matching prefix."""
    found = [
        (len(prefix), index)
        for index, prefixes in enumerate(LAYERS)
        for prefix in prefixes
        if name == prefix or name.startswith(f"{prefix}.")
    ]
    assert found, f"{name} has a place in LAYERS"
    return max(found)[1]


def test_nothing_in_the_runtime_imports_upward() -> None:
    assert layer("runtime.evaluation.cli") > layer("runtime.evaluation.metrics")
    upward = [
        (name, other)
        for name, others in edges().items()
        for other in others
        if name.startswith("runtime.") and other != "runtime" and layer(other) > layer(name)
    ]
    assert not upward


def test_functions_import_only_what_is_optional_or_slow() -> None:
    hidden = []
    for name, path in NAMES.items():
        for node, inside, checking in import_nodes(path):
            if not inside or checking:
                continue
            own = targets_of(node)
            first = (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name) or ""
            if own and path.stem not in COMMANDS:
                hidden.append((name, *own))
            elif not own and first.split(".")[0] not in OPTIONAL_OR_SLOW:
                hidden.append((name, first))
    assert not hidden


def test_the_tables_of_targets_agree() -> None:
    assert set(TARGETS) == set(LOWERING) == set(TARGET_SCHEMES)


def test_no_code_compares_the_name_of_a_target() -> None:
    found = []
    for name, path in NAMES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                values = {side.value for side in sides if isinstance(side, ast.Constant)}
                if values & set(TARGETS) and "target" in ast.unparse(node):
                    found.append((name, node.lineno, ast.unparse(node)))
    assert not found


def test_functions_stay_short_and_lines_narrow() -> None:
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    for path in (ROOT / name for name in listed.stdout.split()):
        text = path.read_text()
        assert text.count("\n") <= 400 or path.name in LONG_TESTS, f"{path} is longer than 400"
        assert all(len(line) <= 100 for line in text.split("\n")), f"{path} is wider than 100"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name not in COMMAND_FUNCTIONS:
                size = (node.end_lineno or node.lineno) - node.lineno + 1
                assert size <= 80, f"{path}:{node.lineno} {node.name} has {size} lines"


# Functions whose parameters are a command's options, one and its help each.
COMMAND_FUNCTIONS = {"build", "run", "main"}
LONG_TESTS: set[str] = set()


def trainings(path: Path) -> list[ast.Call]:
    return [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("TrainOptions")
    ]


def test_tests_that_train_state_their_precision() -> None:
    """`auto` computes in bf16 where the CPU has it, so that a test of numbers would depend
    on the machine.
    """
    calls = [(path, call) for path in ROOT.glob("tests/**/*.py") for call in trainings(path)]
    assert len(calls) > 20
    for path, call in calls:
        assert "precision" in {keyword.arg for keyword in call.keywords}, f"{path}:{call.lineno}"
