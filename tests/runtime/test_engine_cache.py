"""The engine cache: packed weights are mapped, give the same bits, are bounded, and are
never trusted beyond what their maker wrote.
"""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from runtime.contract.bundle import Bundle, cache_folder, read_bundle
from runtime.contract.errors import UsageError
from runtime.engines import EngineOptions, load_engine
from runtime.engines.onnxruntime import prepacked_weights as ort_store

INPUTS = np.random.default_rng(0).normal(size=(1, 9, 64)).astype(np.float32)


@pytest.fixture(autouse=True)
def small_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tiny graphs count as large, in a cache of their own."""
    monkeypatch.setattr(ort_store, "WORTH", 1)
    monkeypatch.setenv("INFMLLM_CACHE", str(tmp_path / "cache"))


def logits(bundle: Bundle, cached: bool = True) -> list[np.ndarray]:
    engine = load_engine(bundle, EngineOptions(threads=1, engine_cache=cached))
    found = [engine.forward(INPUTS, 0).copy(), engine.forward(INPUTS[:, :1], 9).copy()]
    pixels = np.random.default_rng(1).normal(size=(1, 3, 32, 32)).astype(np.float32)
    return [*found, engine.embed_image(pixels, np.full((4, 16), 1 / 16, np.float32))]


def folders() -> list[Path]:
    return sorted(
        path for path in (cache_folder() / "engines").iterdir() if not path.name.startswith(".")
    )


@pytest.mark.parametrize(
    "precision", ["fp32", "fp16", "int8", "int4", "int4-hybrid", "int8-weights"]
)
def test_the_same_bits_as_without(built: Callable[[str], Path], precision: str) -> None:
    bundle = read_bundle(built(precision))
    plain = logits(bundle, cached=False)
    assert not (cache_folder() / "engines").exists()
    made, found = logits(bundle), logits(bundle)
    assert len(folders()) == len(bundle.graphs)
    for results in (made, found):
        assert all(np.array_equal(a, b) for a, b in zip(plain, results, strict=True))


def test_it_is_used_and_what_was_touched_is_not(
    built: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = read_bundle(built("int8"))
    expected = logits(bundle)
    assert capfd.readouterr().err.count("packing the weights") == 2
    logits(bundle)
    assert "packing" not in capfd.readouterr().err
    for damage in (b"", b"longer"):
        victim = folders()[0] / "model.bin"
        victim.write_bytes(victim.read_bytes()[:-1] + damage)
        again = logits(bundle)
        assert capfd.readouterr().err.count("packing the weights") == 1
        assert all(np.array_equal(a, b) for a, b in zip(expected, again, strict=True))
    (folders()[0] / "engine.json").write_text("[]")
    logits(bundle)
    assert capfd.readouterr().err.count("packing the weights") == 1


@pytest.mark.parametrize("what", ["cpu", "version"])
def test_another_machine_makes_its_own(
    built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    bundle = read_bundle(built("fp32"))
    logits(bundle)
    if what == "cpu":
        monkeypatch.setattr(ort_store, "_cpu", lambda: "another")
    else:
        monkeypatch.setattr(ort, "__version__", "99")
    logits(bundle)
    assert len(folders()) == 4


def test_it_stays_within_its_bound(
    built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = read_bundle(built("fp32"))
    logits(bundle)
    one = max(sum(file.stat().st_size for file in folder.iterdir()) for folder in folders())
    monkeypatch.setenv("INFMLLM_ENGINE_CACHE_GB", str(3.2 * one / 1e9))
    for version in ("98", "99"):
        monkeypatch.setattr(ort, "__version__", version)
        logits(bundle)
    assert sum(file.stat().st_size for folder in folders() for file in folder.iterdir()) < 3.2 * one
    monkeypatch.setenv("INFMLLM_ENGINE_CACHE_GB", "0")
    monkeypatch.setattr(ort, "__version__", "100")
    before = folders()
    logits(bundle)
    assert folders() == before


def test_processes_that_make_it_at_once_all_answer(
    built: Callable[[str], Path], tmp_path: Path
) -> None:
    code = f"""
import os
os.environ["INFMLLM_CACHE"] = {str(tmp_path / "cache")!r}
from runtime.engines.onnxruntime import prepacked_weights as ort_store
ort_store.WORTH = 1
from runtime import load
import numpy as np
session = load({str(built("int8"))!r}, threads=1)
print(session.engine.forward(np.ones((1, 5, 64), np.float32), 0).tobytes().hex()[:64])
"""
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(4)
    ]
    outputs = {process.communicate(timeout=120)[0] for process in running}
    assert all(process.returncode == 0 for process in running) and len(outputs) == 1
    assert len(folders()) == 2 and not list((cache_folder() / "engines").glob(".*making"))


def test_a_write_that_fails_half_way_costs_time_only(
    built: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = read_bundle(built("fp32"))
    expected = logits(bundle, cached=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        found = logits(bundle)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True)) and not folders()
    assert "could not be saved" in capfd.readouterr().err


def test_what_a_killed_process_left_is_removed(built: Callable[[str], Path]) -> None:
    left = cache_folder() / "engines" / f".{'0' * 64}.making"
    left.mkdir(parents=True)
    (left / "model.bin").write_bytes(b"half")
    logits(read_bundle(built("fp32")))
    assert not left.exists() and len(folders()) == 2


@pytest.mark.parametrize("value", ["inf", "-3", "1e400"])
def test_odd_bounds_are_bounds(
    built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("INFMLLM_ENGINE_CACHE_GB", value)
    logits(read_bundle(built("fp32")))
    monkeypatch.setenv("INFMLLM_ENGINE_CACHE_GB", "much")
    with pytest.raises(UsageError, match="expected a number of gigabytes"):
        logits(read_bundle(built("fp32")))


def test_a_full_disk_costs_time_only(
    built: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = read_bundle(built("fp32"))
    expected = logits(bundle, cached=False)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0})())
    assert all(np.array_equal(a, b) for a, b in zip(expected, logits(bundle), strict=True))
    assert "could not be saved" in capfd.readouterr().err and not folders()
