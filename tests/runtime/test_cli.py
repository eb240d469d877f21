"""The commands as a user types them: answers on standard output, one line for every
fault, exit codes.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from runtime.contract.files import sha256_file
from tests.contract.test_image import png_header

ROOT = Path(__file__).parents[2]


def command(
    module: str, *arguments: object, stdin: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    code = f"from {module} import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        cwd=ROOT,
    )


def run(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return command("runtime.cli.run", *arguments, stdin=stdin)


@pytest.fixture(scope="module")
def bundle(built: Callable[[str], Path]) -> Path:
    return built("int8")


def test_text_and_json(bundle: Path, scene_png: Path) -> None:
    text = run(scene_png, "describe", "--bundle", bundle)
    assert text.returncode == 0 and text.stdout.strip() and b"finish:" in text.stderr
    result = run(scene_png, "describe", "--bundle", bundle, "--json", "--visual-tokens", 4)
    data = json.loads(result.stdout)
    assert {"text", "boxes", "finish_reason", "timings", "verdict"} <= set(data) and data[
        "visual_tokens"
    ] == 4
    assert data["task"] == "caption" and data["verdict"] == "VERIFIED"


def test_standard_input(bundle: Path, scene_png: Path) -> None:
    piped = run("-", "describe", "--bundle", bundle, stdin=scene_png.read_bytes())
    assert (
        piped.returncode == 0
        and piped.stdout == run(scene_png, "describe", "--bundle", bundle).stdout
    )
    empty = run("-", "describe", "--bundle", bundle)
    assert empty.returncode == 1 and b"image is empty (0 bytes)" in empty.stderr


def test_control_strings_are_plain_text(bundle: Path, scene_png: Path) -> None:
    assert run(scene_png, "<image> </s> what is this?", "--bundle", bundle).returncode == 0


def test_self_test(bundle: Path) -> None:
    result = run("--self-test", "--bundle", bundle)
    assert result.returncode == 0 and result.stdout.count(b" ok") == 3
    assert all(
        stage["passed"]
        for stage in json.loads(run("--self-test", "--bundle", bundle, "--json").stdout)["stages"]
    )


def test_drawing(bundle: Path, scene_png: Path, tmp_path: Path) -> None:
    assert (
        run(
            scene_png, "where is the circle?", "--bundle", bundle, "--draw", tmp_path / "out.png"
        ).returncode
        == 0
    )
    assert Image.open(tmp_path / "out.png").size == Image.open(scene_png).size
    check_fault(
        run(scene_png, "describe", "--bundle", bundle, "--draw", tmp_path / "no" / "out.png"),
        "writable folder",
    )


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 60).convert("RGB").save(buffer, format="JPEG")
    return buffer.getvalue()


BAD_IMAGES = {
    "truncated.jpg": (jpeg()[:3000], "truncated or damaged"),
    "bomb.png": (png_header(30000, 30000), "pixels"),
    "text.jpg": (b"these are words", "not a JPEG"),
    "empty.png": (b"", "empty"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_give_one_line(name: str, bundle: Path, tmp_path: Path) -> None:
    data, words = BAD_IMAGES[name]
    (tmp_path / name).write_bytes(data)
    check_fault(run(tmp_path / name, "describe", "--bundle", bundle), words)


def check_fault(result: subprocess.CompletedProcess[bytes], words: str) -> None:
    lines = result.stderr.decode().strip().splitlines()
    assert result.returncode != 0 and result.stdout == b""
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], lines


def test_bad_requests_give_one_line(bundle: Path, scene_png: Path, tmp_path: Path) -> None:
    check_fault(run(scene_png, "describe", "--bundle", tmp_path / "none"), "no bundle at")
    check_fault(run(scene_png, "", "--bundle", bundle), "prompt is empty")
    check_fault(
        run(scene_png, "word " * 400, "--bundle", bundle, "--task", "caption"), "does not fit"
    )
    check_fault(run(scene_png, "describe", "--bundle", bundle, "--visual-tokens", 9), "16, 4")
    check_fault(run(scene_png, "describe", "--bundle", bundle, "--task", "sing"), "caption")
    check_fault(run("--bundle", bundle), "give an image and a prompt")
    check_fault(
        run(scene_png, "describe", "--threads", "0"), "expected a whole number of 1 or more"
    )
    check_fault(run(scene_png, "describe", "--colour", "red"), "infmllm-run --help")


def test_damaged_bundles_give_one_line(bundle: Path, scene_png: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    data = bytearray((copy / "decoder.weights").read_bytes())
    data[5000] ^= 4
    (copy / "decoder.weights").write_bytes(bytes(data))
    check_fault(run(scene_png, "describe", "--bundle", copy), "sha256")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["../decoder.weights"] = manifest["files"].pop("decoder.weights")
    (copy / "manifest.json").write_text(json.dumps(manifest))
    check_fault(run(scene_png, "describe", "--bundle", copy), "plain file name")


def test_an_unverified_bundle_warns(bundle: Path, scene_png: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["parity"]["verdict"] = "UNVERIFIED"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    result = run(scene_png, "describe", "--bundle", copy, "--json")
    assert (
        result.returncode == 0
        and b"UNVERIFIED" in result.stderr
        and json.loads(result.stdout)["verdict"] == "UNVERIFIED"
    )


def test_eval(bundle: Path, tiny_checkpoint: Path, scene_png: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(scene_png.read_bytes())
    (tmp_path / "d.jsonl").write_text(
        '{"image": "a.png", "task": "vqa", "question": "what?", "answer": "this"}\n'
    )
    for model in (bundle, tiny_checkpoint):
        figures = json.loads(
            command("runtime.evaluation.cli", model, tmp_path / "d.jsonl", "--json").stdout
        )
        assert figures["tasks"]["vqa"]["count"] == 1
    text = command(
        "runtime.evaluation.cli", bundle, "synthetic:3", "--out", tmp_path / "rows.jsonl"
    ).stdout.decode()
    assert "boxes with IoU" in text and len((tmp_path / "rows.jsonl").read_text().splitlines()) == 9
    check_fault(command("runtime.evaluation.cli", tmp_path, "synthetic:3"), "neither a bundle")
    check_fault(command("runtime.evaluation.cli", bundle, "synthetic:x"), "positive number")
    check_fault(
        command("runtime.evaluation.cli", bundle, "synthetic:1", "--out", tmp_path / "no" / "x"),
        "writable folder",
    )
    check_fault(command("runtime.evaluation.cli"), "--help")


def test_export_commands(bundle: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    description = json.loads(command("export.cli", "inspect", bundle, "--json", "--verify").stdout)
    assert description["verdict"] == "VERIFIED"
    parity = command("export.cli", "parity", bundle, tiny_checkpoint, "--cases", 2, "--json")
    assert parity.returncode == 0 and all(
        finding["passed"] for finding in json.loads(parity.stdout)["proof"]
    )
    missing = command("export.cli", "build", tmp_path / "none", "-o", tmp_path / "b")
    assert (
        missing.returncode == 1
        and b"error: no checkpoint at" in missing.stderr
        and not (tmp_path / "b").exists()
    )


@pytest.mark.parametrize(
    "module",
    ["runtime.cli.run", "runtime.evaluation.cli", "runtime.bench.cli", "export.cli", "trainer.cli"],
)
def test_help_has_an_example(module: str) -> None:
    result = command(module, "--help")
    if module == "export.cli":
        result = command(module, "build", "--help")
    assert result.returncode == 0 and b"infmllm-" in result.stdout and b"xample" in result.stdout


def test_training_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "ck"
    arguments = ("--steps", 2, "--batch", 2, "--val", "synthetic:2", "--threads", 2, "--out", out)
    assert command("trainer.cli", *arguments).returncode == 0
    card = json.loads((out / "card.json").read_text())
    assert card["weights_sha256"] == sha256_file(out / "model.safetensors")
    assert set(card["metrics"]) == {"64", "16"} and [run["stage"] for run in card["recipe"]] == [
        "dense",
        "scratch",
        "joint",
        "joint",
    ]
    again = command(
        "trainer.cli",
        *arguments,
        "--stage",
        "alignment",
        "--start-from",
        out,
        "--out",
        tmp_path / "next",
    )
    start = json.loads((tmp_path / "next" / "card.json").read_text())["start_from"]
    assert again.returncode == 0 and start["weights_sha256"] == card["weights_sha256"]
    check_fault(command("trainer.cli", "--stage", "magic"), "unknown stage")
    check_fault(command("trainer.cli", "--decay", "square"), "choose one of: cosine, linear")
    check_fault(command("trainer.cli", "--image-size", "64"), "--start-from")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "letter.txt").write_text("dear")
    check_fault(command("trainer.cli", "--out", tmp_path / "foreign"), "holds other files")
