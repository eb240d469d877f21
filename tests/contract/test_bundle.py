"""Bundles: every damaged, foreign or hostile one is refused with one line before
anything is allocated.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from runtime.contract.bundle import MANIFEST, ROW_INDEPENDENT, SATURATION_SAFE, read_bundle
from runtime.contract.errors import BundleError
from runtime.contract.files import sha256_file
from runtime.contract.onnx_guard import external_locations
from runtime.engines import load_engine
from runtime.session import load


def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads((bundle / MANIFEST).read_text())
    change(data)
    (bundle / MANIFEST).write_text(json.dumps(data))


def rename_entry(name: str) -> Callable[[dict[str, Any]], None]:
    def change(data: dict[str, Any]) -> None:
        data["files"][name] = data["files"].pop("decoder.weights")

    return change


def test_a_good_bundle_reads(copied: Path) -> None:
    bundle = read_bundle(copied)
    bundle.verify()
    assert bundle.verdict == "VERIFIED" and set(bundle.schemes) == {
        "vision",
        "decoder",
        "embeddings",
        "cache",
        ROW_INDEPENDENT,
        SATURATION_SAFE,
    }


def test_missing_bundle_says_how_to_build_one(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="infmllm-export build"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize(
    "name",
    [
        "vision.weights",
        "decoder.weights",
        "decoder.onnx",
        "embeddings.npy",
        "tokenizer.json",
        "goldens.npz",
    ],
)
def test_a_flipped_byte_in_any_file_is_found(copied: Path, name: str) -> None:
    data = bytearray((copied / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copied / name).write_bytes(bytes(data))
    with pytest.raises(BundleError, match=r"sha256|ONNX file|outside"):
        load(copied)


def test_a_flipped_byte_is_found_after_a_good_load_too(copied: Path) -> None:
    load(copied)
    path = copied / "decoder.weights"
    data = bytearray(path.read_bytes())
    data[100] ^= 128
    path.write_bytes(bytes(data))
    with pytest.raises(BundleError, match=r"decoder\.weights has sha256"):
        load(copied)


@pytest.mark.parametrize("name", ["vision.weights", "decoder.onnx", "embeddings.npy"])
def test_truncated_and_missing_files(copied: Path, name: str) -> None:
    data = (copied / name).read_bytes()
    (copied / name).write_bytes(data[:-1])
    with pytest.raises(BundleError, match="bytes, manifest says"):
        read_bundle(copied)
    (copied / name).unlink()
    with pytest.raises(BundleError, match="missing"):
        read_bundle(copied)


@pytest.mark.parametrize(
    "name",
    [
        "../decoder.weights",
        "/etc/passwd",
        "a/b",
        "..",
        ".hidden",
        "x\0y",
        "",
        "a" * 200,
        "manifest.json",
    ],
)
def test_only_plain_names(copied: Path, name: str) -> None:
    edit(copied, rename_entry(name))
    with pytest.raises(BundleError, match="plain file name"):
        read_bundle(copied)


def test_links_are_refused(copied: Path, tmp_path: Path) -> None:
    original = tmp_path / "weights"
    os.rename(copied / "decoder.weights", original)
    os.symlink(original, copied / "decoder.weights")
    with pytest.raises(BundleError, match="link"):
        read_bundle(copied)
    (copied / "decoder.weights").unlink()
    os.link(original, copied / "decoder.weights")
    with pytest.raises(BundleError, match="link"):
        read_bundle(copied)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(format="other"),
        lambda d: d.update(version=2),
        lambda d: d.update(version=True),
        lambda d: d.update(extra=1),
        lambda d: d.pop("spec"),
        lambda d: d.update(spec=[]),
        lambda d: d["spec"]["decoder"].update(layers=0),
        lambda d: d["spec"]["decoder"].update(layers=10**9),
        lambda d: d["spec"]["decoder"].update(hidden="64"),
        lambda d: d["spec"]["vision"].update(image_size=2**40),
        lambda d: d["spec"].update(pool_sizes=[3]),
        lambda d: d["spec"].update(pool_sizes=[]),
        lambda d: d["spec"].update(remote_code="x"),
        lambda d: d.update(files=[]),
        lambda d: d["files"].pop("goldens.npz"),
        lambda d: d["files"]["goldens.npz"].update(bytes=-1),
        lambda d: d["files"]["goldens.npz"].update(bytes=True),
        lambda d: d["files"]["goldens.npz"].update(sha256="../../x"),
        lambda d: d["files"].update(x=None),
        lambda d: d.update(schemes={"vision": 3}),
    ],
)
def test_hostile_manifests(copied: Path, change: Callable[[dict[str, Any]], None]) -> None:
    edit(copied, change)
    with pytest.raises(BundleError) as caught:
        read_bundle(copied)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", "[" * 100000, '{"format": "infmllm-bundle"', "\udcff"]
)
def test_broken_json(copied: Path, text: str) -> None:
    (copied / MANIFEST).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BundleError):
        read_bundle(copied)


def test_an_unknown_target_is_an_engine_error(copied: Path) -> None:
    from runtime.contract.errors import EngineError

    edit(copied, lambda d: d.update(target="abacus"))
    with pytest.raises(EngineError, match="abacus"):
        load(copied)


def external(name: str, location: str) -> onnx.TensorProto:
    tensor = TensorProto(
        name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL
    )
    tensor.external_data.add(key="location", value=location)
    return tensor


def test_references_are_found_wherever_they_nest(tmp_path: Path) -> None:
    inner = helper.make_graph([], "inner", [], [], initializer=[external("c", "in_subgraph")])
    nodes = [
        helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner),
        helper.make_node("Constant", [], ["z"], value=external("d", "in_attribute")),
    ]
    graph = helper.make_graph(nodes, "g", [], [], initializer=[external("a", "../outside")])
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    assert external_locations(path) == {"../outside", "in_subgraph", "in_attribute"}


def test_a_graph_that_points_outside_is_refused(copied: Path) -> None:
    model = onnx.load(copied / "decoder.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../etc/passwd"
    (copied / "decoder.onnx").write_bytes(model.SerializeToString())
    changed = {
        "bytes": (copied / "decoder.onnx").stat().st_size,
        "sha256": sha256_file(copied / "decoder.onnx"),
    }
    edit(copied, lambda d: d["files"]["decoder.onnx"].update(changed))
    with pytest.raises(BundleError, match="outside the bundle"):
        load(copied)


def test_the_guard_survives_every_truncation(built: Callable[[str], Path], tmp_path: Path) -> None:
    data = (built("fp32") / "decoder.onnx").read_bytes()
    path = tmp_path / "cut.onnx"
    cuts = range(0, len(data), max(1, len(data) // 150))
    refused = 0
    for end in cuts:
        path.write_bytes(data[:end])
        try:
            external_locations(path)
        except BundleError:
            refused += 1
    assert refused > 0.9 * len(cuts)  # a cut between two fields leaves a well-formed file


OLD_BUNDLE = Path(__file__).parents[1] / "data" / "bundle-0.1"
"""The tiny model's int8-weights bundle as version 0.1.0 wrote it, before the manifest had
`row_independent` and `saturation_safe`.
"""


def test_a_bundle_of_0_1_opens_and_reproduces_its_goldens(tmp_path: Path) -> None:
    session = load(shutil.copytree(OLD_BUNDLE, tmp_path / "bundle"))
    assert session.bundle.row_independent and session.bundle.saturation_safe
    assert all(stage.passed for stage in session.replay())


def test_a_spec_field_with_a_default_may_be_missing(copied: Path) -> None:
    def drop(data: dict[str, Any]) -> None:
        del data["spec"]["vision"]["final_norm_eps"], data["spec"]["pad_id"]

    before = read_bundle(copied).spec
    edit(copied, drop)
    assert read_bundle(copied).spec == before

    def drop_required(data: dict[str, Any]) -> None:
        del data["spec"]["decoder"]["heads"]

    edit(copied, drop_required)
    with pytest.raises(BundleError, match="missing fields heads"):
        read_bundle(copied)


def test_a_folder_that_is_swapped_while_it_is_opened_is_noticed(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old tower must not run with the new decoder."""
    other = shutil.copytree(copied, tmp_path / "other")
    edit(other, lambda data: data["provenance"].update(note="another build"))
    opened = load_engine

    def swap(*arguments: Any) -> Any:
        copied.rename(tmp_path / "old")
        other.rename(copied)
        return opened(*arguments)

    monkeypatch.setattr("runtime.session.load_engine", swap)
    with pytest.raises(BundleError, match="changed while it was opened; open it again"):
        load(copied)
    monkeypatch.undo()
    assert load(copied).bundle.identity == sha256_file(copied / MANIFEST)
