"""Engines on disk: made once, bounded, and nothing but what this machine wrote for
itself is ever deserialised.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from runtime import Session, load
from runtime.contract.bundle import MANIFEST, cache_folder
from runtime.contract.errors import UsageError
from runtime.contract.files import locked
from runtime.engines import disk_cache as shelf
from tests.runtime.conftest import Install

INPUTS = np.random.default_rng(2).normal(size=(1, 12, 64)).astype(np.float32)
PARTS = ["vision-fused.onnx", "decoder-fused.onnx"]


@pytest.fixture
def bundle(built_tensorrt: Callable[[str], Path]) -> Path:
    return built_tensorrt("fp16")


def folders() -> list[Path]:
    root = cache_folder() / "engines-tensorrt"
    return (
        sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        if root.exists()
        else []
    )


def logits(session: Session) -> bytes:
    return session.engine.forward(INPUTS, 0).tobytes()


def test_engines_are_made_once(bundle: Path, gpu: Install) -> None:
    simulation = gpu()
    first = logits(load(bundle))
    assert simulation.built == PARTS and simulation.timings == [b"", b"timings"], (
        "the second build knew what the first measured"
    )
    again = gpu()
    assert logits(load(bundle)) == first
    assert again.built == [] and len(again.read) == 2 and again.cuda.launched == 0, (
        "neither built nor tried again"
    )
    assert len(folders()) == 2


@pytest.mark.parametrize("change", ["version", "name", "driver"])
def test_another_machine_makes_its_own(bundle: Path, gpu: Install, change: str) -> None:
    gpu()
    load(bundle)
    other = gpu(version="10.4.0") if change == "version" else gpu()
    if change == "name":
        other.cuda.name = b"Another GPU"
    elif change == "driver":
        other.cuda.driver = 12080
    load(bundle)
    assert other.built == PARTS and len(folders()) == 4
    assert len(other.read) == 2, "nothing of the other machine's was even looked at"


def _swap(path: Path) -> None:
    """Another file of the same size under the same name."""
    foreign = path.with_name("foreign")
    foreign.write_bytes(b"X" * path.stat().st_size)
    os.replace(foreign, path)


def _flip(path: Path) -> None:
    """One bit, with the file's time put back."""
    info, content = path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (info.st_ino, info.st_mtime_ns)


def _truncate(path: Path) -> None:
    os.truncate(path, 9)


def _link(path: Path) -> None:
    shutil.move(path, path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")
    (path.parent / "engine.json").write_text("[" * 5000)


@pytest.mark.parametrize(
    "damage", [_swap, _flip, _truncate, _link], ids=lambda damage: damage.__name__
)
def test_a_file_that_is_not_what_was_written_is_built_again(
    bundle: Path, gpu: Install, damage: Callable[[Path], None]
) -> None:
    gpu()
    first = logits(load(bundle))
    for folder in folders():
        damage(folder / "engine.trt")
    damaged = {(folder / "engine.trt").read_bytes() for folder in folders()}
    again = gpu()
    assert logits(load(bundle)) == first
    assert again.built == PARTS and len(again.read) == 2 and len(folders()) == 2
    assert damage is _link or not damaged & set(again.read), (
        "what was damaged got as far as being deserialised"
    )


def test_an_engine_that_cannot_be_read_any_more_is_made_again(
    bundle: Path, gpu: Install, capfd: pytest.CaptureFixture[str]
) -> None:
    gpu()
    load(bundle)
    again = gpu()
    again.unreadable = 1
    load(bundle)
    assert (
        again.built == ["vision-fused.onnx"]
        and "cannot be loaded (The engine plan file is not compatible" in capfd.readouterr().err
    )
    load(bundle)
    assert again.built == ["vision-fused.onnx"]


def test_a_build_that_was_killed_is_told_of(
    bundle: Path, gpu: Install, capfd: pytest.CaptureFixture[str]
) -> None:
    simulation = gpu()
    load(bundle)
    ready = folders()[0]
    shutil.rmtree(ready)
    (shelf.staging_of(ready)).mkdir()
    load(bundle)
    assert "this engine was killed" in capfd.readouterr().err and len(simulation.built) == 3
    assert not list(ready.parent.glob(".*making")) and len(folders()) == 2


def test_an_interrupt_leaves_nothing_behind(
    bundle: Path, gpu: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = gpu()

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("runtime.output.console.StepBar.detail", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(bundle)
    assert not folders() and not list((cache_folder() / "engines-tensorrt").glob(".*"))
    load(bundle)
    assert simulation.built == PARTS


def test_who_comes_second_waits_and_takes_what_was_made(
    bundle: Path, gpu: Install, capfd: pytest.CaptureFixture[str]
) -> None:
    gpu()
    load(bundle)
    engines = folders()
    ready, kept = engines[0], engines[0].with_name("kept")
    os.rename(ready, kept)
    again = gpu()
    began = threading.Event()

    def build() -> None:
        with locked(ready):
            began.set()
            threading.Event().wait(0.7)
            os.rename(kept, ready)

    other = threading.Thread(target=build)
    other.start()
    began.wait()
    load(bundle)
    other.join()
    assert (
        again.built == []
        and capfd.readouterr().err.count("another process is building this engine") == 1
    )


@pytest.mark.parametrize("way", ["option", "bound", "read-only", "full"])
def test_without_a_store_every_start_builds_and_tries(
    bundle: Path,
    gpu: Install,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    way: str,
) -> None:
    simulation = gpu()
    if way == "bound":
        monkeypatch.setenv("INFMLLM_ENGINE_CACHE_GB", "0")
    elif way == "read-only":
        monkeypatch.setattr(
            "runtime.engines.tensorrt.engine_cache.os.access", lambda path, mode: False
        )
    elif way == "full":
        monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0})())
    found = [logits(load(bundle, engine_cache=way != "option")) for _ in range(2)]
    assert found[0] == found[1] and simulation.built == PARTS * 2
    assert not any((folder / "engine.trt").exists() for folder in folders())
    notes = {
        "read-only": "cannot be written; set INFMLLM_CACHE",
        "full": "the engine could not be saved",
    }
    assert notes.get(way, "") in capfd.readouterr().err


def test_one_bound_holds_for_engines_of_all_kinds(tmp_path: Path) -> None:
    for age, (root, name) in enumerate(
        [("engines-tensorrt", "a"), ("engines", "b"), ("engines", "c"), ("engines-tensorrt", "d")]
    ):
        folder = tmp_path / root / name
        folder.mkdir(parents=True)
        (folder / "content").write_bytes(b"x" * 1000)
        (folder / shelf.METADATA).write_text("{}")
        os.utime(folder / shelf.METADATA, (age, age))
    shelf.make_room(tmp_path / "engines-tensorrt", 3500, 1000)
    left = sorted(path.name for root in shelf.ROOTS for path in (tmp_path / root).iterdir())
    assert left == ["c", "d"]


def test_timing_files_do_not_pile_up(bundle: Path, gpu: Install) -> None:
    for driver in range(12000, 12007):
        simulation = gpu()
        simulation.cuda.driver = driver
        load(bundle)
    assert len(list((cache_folder() / "engines-tensorrt").glob("timing-*"))) <= 5


def test_a_timing_file_that_is_no_use_is_left_aside(bundle: Path, gpu: Install) -> None:
    gpu()
    load(bundle)
    for path in (cache_folder() / "engines-tensorrt").glob("timing-*"):
        path.write_bytes(b"rubbish")
    for folder in folders():
        shutil.rmtree(folder)
    again = gpu()
    load(bundle)
    assert again.built == PARTS and again.timings == [b"", b"timings"]


def test_the_compilers_memory_can_be_chosen(
    bundle: Path, gpu: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = gpu()
    load(bundle, engine_cache=False)
    assert simulation.workspaces[0] == simulation.cuda.total // 2
    monkeypatch.setenv("INFMLLM_WORKSPACE_MB", "3")
    load(bundle, engine_cache=False)
    assert simulation.workspaces[2:] == [3 << 20] * 2
    for text in ("0", "-1", "2.5", "much", "1" * 30):
        monkeypatch.setenv("INFMLLM_WORKSPACE_MB", text)
        with pytest.raises(UsageError, match="whole number of megabytes"):
            load(bundle, engine_cache=False)


def test_what_cannot_be_tried_is_said(
    bundle: Path, gpu: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bundle that is known to drift, and a cache too short for the goldens, are used
    with a notice; the next load tries again.
    """
    gpu()
    session = load(bundle, context=24)
    assert session.engine.capacity == 24 and "answer without validation" in capsys.readouterr().err
    marked = tmp_path / "marked"
    shutil.copytree(bundle, marked)
    manifest = json.loads((marked / MANIFEST).read_text())
    manifest["parity"]["verdict"] = "UNVERIFIED"
    (marked / MANIFEST).write_text(json.dumps(manifest))
    load(marked)
    assert "is UNVERIFIED: its engines answer without validation" in capsys.readouterr().err
