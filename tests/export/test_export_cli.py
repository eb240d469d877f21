"""`infmllm-export`: what a person types, what comes back, and one clear line for what
cannot be.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from export.cli import app
from runtime.contract.bundle import read_bundle
from runtime.contract.errors import InfMLLMError, ParityError, UsageError
from tests.mutants.edit import Edit, refresh
from trainer.checkpoint import open_checkpoint

RUNNER = CliRunner()


def run(*arguments: object) -> str:
    result = RUNNER.invoke(app, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_build_reports_in_json_and_repeats_at_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    arguments = (
        "build",
        tiny_checkpoint,
        "--precision",
        "int4",
        "--block",
        16,
        "--rounding",
        "mse",
        "--kv",
        "int8",
        "--questions",
        4,
    )
    first = json.loads(run(*arguments, "-o", tmp_path / "b", "--json"))
    assert (
        first["verdict"] == "VERIFIED"
        and not first["reused"]
        and set(first["metrics"]["tasks"]) == {"caption", "ground", "vqa"}
    )
    assert json.loads(run(*arguments, "-o", tmp_path / "b", "--json"))["reused"]
    bundle = read_bundle(tmp_path / "b")
    assert bundle.schemes["cache"] == "int8" and bundle.provenance["calibration"]["count"] == 32
    assert bundle.parity["metrics"]["count"] > 0 and len(bundle.provenance["build_key"]) == 64


def test_parity_compares_fresh_cases(tiny_checkpoint: Path, built: Callable[[str], Path]) -> None:
    found = json.loads(run("parity", built("int8"), tiny_checkpoint, "--cases", 2, "--json"))
    assert [stage["stage"] for stage in found["stages"]] == ["vision", "prefill", "decode"]
    checks = {finding["check"] for finding in found["proof"]}
    assert checks >= {"constants", "goldens", "tensors", "structure", "kernels", "calls"}
    assert all(finding["passed"] for finding in found["proof"])


def test_parity_names_the_place_of_a_fault_in_a_finished_bundle(
    tiny_checkpoint: Path, built: Callable[[str], Path], tmp_path: Path
) -> None:
    bundle = shutil.copytree(built("int8"), tmp_path / "b")
    spec = open_checkpoint(tiny_checkpoint).spec
    Edit(bundle, spec).weight(
        "decoder.layers.1.mlp.down_proj.weight", lambda levels, scale: (levels, scale * 0.8)
    )
    refresh(bundle)
    with pytest.raises(ParityError, match=r"tensors: decoder.layers.1.mlp.down_proj.weight has"):
        run("parity", bundle, tiny_checkpoint, "--cases", 1)


def test_inspect_shows_blocks_as_text_json_and_picture(
    built: Callable[[str], Path], tmp_path: Path
) -> None:
    text = run("inspect", built("int4"), "--html", tmp_path / "b.html")
    assert (
        "decoder.layers.1" in text
        and "7 int4/32" in text
        and "calibrated with 32 images of synthetic" in text
    )
    assert (
        "answers not asked (PyTorch itself answers none right)" in text
        and "proof: constants ok, calibration ok, tensors ok, structure ok" in text
        and (tmp_path / "b.html").read_text().count("decoder.layers") >= 2
    )
    blocks = json.loads(run("inspect", built("int4"), "--json"))["graphs"]["decoder.onnx"]["blocks"]
    assert set(blocks["decoder.lm_head"]["layers"].values()) == {"int8 x int8"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("--precision", "int3"), UsageError, "int4-hybrid"),
        (("--precision", "int8", "--block", "32"), UsageError, "no 4-bit weights"),
        (("--target", "abacus"), UsageError, "cpu"),
        (("--precision", "int8-static", "--ranges", "wide"), UsageError, "min-max"),
        (("--precision", "auto", "--metric", "bleu"), UsageError, "vqa"),
        (("--calib", "nowhere.jsonl"), InfMLLMError, "nowhere.jsonl"),
        (("--keep", "decoder.layers.7=fp16"), UsageError, "decoder.layers.7"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(
    arguments: tuple[str, ...],
    error: type[Exception],
    message: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        run("build", tiny_checkpoint, *arguments, "-o", tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_a_bundle_that_drifts_is_refused_unless_asked_for(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export import schemes

    strict = schemes.replace(
        schemes.SCHEMES["int4-all"], tolerance={"vision": 1e-3, "prefill": 1e-3, "decode": 1e-3}
    )
    monkeypatch.setitem(schemes.SCHEMES, "int4-all", strict)
    arguments = (
        "build",
        tiny_checkpoint,
        "--precision",
        "int4-all",
        "--questions",
        0,
        "-o",
        tmp_path / "b",
    )
    with pytest.raises(
        ParityError,
        match=r"\w+ differs from PyTorch by .* between vision_tower.blocks.0.norm1 .* and "
        r"vision_tower.blocks.0.norm2",
    ):
        run(*arguments)
    assert not (tmp_path / "b").exists()
    assert "UNVERIFIED" in run(*arguments, "--allow-unverified") and "UNVERIFIED" in run(
        "inspect", tmp_path / "b"
    )
