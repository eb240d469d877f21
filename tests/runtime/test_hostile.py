"""Bundles whose parts do not fit each other: one typed error, whatever is changed, with
hashes made good.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime.contract.bundle import GOLDENS, MANIFEST
from runtime.contract.errors import BundleError, ContextError, InfMLLMError
from runtime.contract.files import sha256_file
from runtime.contract.onnx_guard import external_locations
from runtime.parity import relative_error
from runtime.session import load
from tests.contract.test_bundle import edit

TOLERANCE = {"vision": 1.0, "prefill": 1.0, "decode": 1.0}


def rehash(bundle: Path) -> None:
    def change(data: dict[str, Any]) -> None:
        for name in data["files"]:
            data["files"][name] = {
                "bytes": (bundle / name).stat().st_size,
                "sha256": sha256_file(bundle / name),
            }

    edit(bundle, change)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("decoder", "layers", 3),
        ("decoder", "layers", 1),
        ("decoder", "kv_heads", 4),
        ("vision", "image_size", 64),
        ("decoder", "vocab_size", 2000),
    ],
)
def test_a_spec_that_does_not_fit_the_graphs(
    copied: Path, part: str, field: str, value: int
) -> None:
    edit(copied, lambda d: d["spec"][part].update({field: value}))
    with pytest.raises(BundleError, match=r"graph|spec"):
        load(copied)


def test_swapped_graphs(copied: Path) -> None:
    (copied / "vision.onnx").write_bytes((copied / "decoder.onnx").read_bytes())
    rehash(copied)
    with pytest.raises(BundleError, match="belong together"):
        load(copied)


def with_goldens(bundle: Path, change: Callable[[dict[str, np.ndarray]], object]) -> Path:
    arrays = dict(np.load(bundle / GOLDENS))
    change(arrays)
    np.savez(bundle / GOLDENS, **arrays)
    rehash(bundle)
    return bundle


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.clear(),
        lambda a: a.update({"0.pixels": np.zeros((1, 3, 4, 4), np.float32)}),
        lambda a: a.update({"0.before": np.array([99999])}),
        lambda a: a.update({"0.pool_size": np.array(3)}),
        lambda a: a.update(
            {"0.tokens": np.zeros(0, np.int64), "0.steps": np.zeros((0, 960), np.float32)}
        ),
        lambda a: a.pop("0.prefill"),
    ],
)
def test_goldens_that_compare_nothing_or_do_not_fit(
    copied: Path, change: Callable[[dict[str, np.ndarray]], object]
) -> None:
    with pytest.raises(BundleError, match=r"golden|damaged"):
        load(with_goldens(copied, change)).replay(tolerance=TOLERANCE)


def test_nan_references_never_pass(copied: Path) -> None:
    session = load(
        with_goldens(copied, lambda a: a.update({"0.prefill": np.full(960, np.nan, np.float32)}))
    )
    prefill = next(
        stage for stage in session.replay(tolerance=TOLERANCE) if stage.stage == "prefill"
    )
    assert not prefill.passed and relative_error(
        np.zeros(3, np.float32), np.zeros(4, np.float32)
    ) == float("inf")


@pytest.mark.parametrize("data", [b"PK\x03\x04broken", b"", b"\x93NUMPY"])
def test_goldens_that_are_no_archive(copied: Path, data: bytes) -> None:
    (copied / GOLDENS).write_bytes(data)
    rehash(copied)
    with pytest.raises(BundleError):
        load(copied).replay(tolerance=TOLERANCE)


def test_a_self_test_needs_room_in_the_cache(copied: Path) -> None:
    with pytest.raises(ContextError):
        load(copied, context=16).replay(tolerance=TOLERANCE)


@pytest.mark.parametrize("how", ["sparse id", "plain control token", "not JSON"])
def test_tokenizers_that_do_not_fit(copied: Path, how: str) -> None:
    path = copied / "tokenizer.json"
    data = json.loads(path.read_text())
    if how == "sparse id":
        data["model"]["vocab"]["describe"] = 999999
    elif how == "plain control token":
        data["added_tokens"][2]["special"] = False
    path.write_text(json.dumps(data) if how != "not JSON" else "{")
    rehash(copied)
    with pytest.raises(BundleError):
        load(copied)


def test_tags_that_parsers_read_differently_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\xba\x80\x80\x80\x10\x00")  # field 7 with a bit beyond 32
    with pytest.raises(BundleError, match="malformed tag"):
        external_locations(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["spec"]["decoder"].update(rms_norm_eps=10**400),
        lambda d: d["spec"]["decoder"].update(rope_theta=float("nan")),
        lambda d: d["spec"]["decoder"].update(rope_theta=-1.0),
        lambda d: d["parity"].update(tolerance={"vision": "x"}),
        lambda d: d["parity"].update(tolerance=3),
    ],
)
def test_hostile_numbers(copied: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit(copied, change)
    with pytest.raises(InfMLLMError):
        load(copied)


def test_paths_the_system_refuses(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle at"):
        load("x" * 5000)
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(BundleError):
        load(tmp_path)
