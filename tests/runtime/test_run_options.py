"""`infmllm-run`'s ways of asking: decoding options, conversations, files of questions;
and its one line for what does not go together.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from runtime.contract.boxes import parse_box
from tests.runtime.test_cli import ROOT, command, run


@pytest.fixture(scope="module")
def bundle(built: Callable[[str], Path]) -> Path:
    return built("fp32")


def answer(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_decoding_options_reach_the_decoder(bundle: Path, scene_png: Path, tmp_path: Path) -> None:
    ask = (scene_png, "describe", "--bundle", bundle, "--max-new-tokens", 12)
    greedy = answer(*ask)
    sampled = [
        answer(
            *ask,
            "--temperature",
            1.2,
            "--top-k",
            50,
            "--top-p",
            0.95,
            "--min-p",
            0.001,
            "--seed",
            seed,
        )
        for seed in (1, 1, 2)
    ]
    assert sampled[0]["tokens"] == sampled[1]["tokens"] != sampled[2]["tokens"] != greedy["tokens"]
    published = answer(*ask, "--beams", "published")
    assert (
        published["tokens"]
        == answer(*ask, "--beams", 5, "--min-new-tokens", 8, "--length-penalty", 1)["tokens"]
    )
    assert answer(*ask, "--repetition-penalty", 2)["tokens"] != greedy["tokens"]
    assert (
        answer(*ask, "--lookup", 0)["tokens"]
        == answer(*ask, "--lookup", 4)["tokens"]
        == greedy["tokens"]
    )
    stop = str(greedy["text"])[6:8]
    assert stop not in str(answer(*ask, "--stop", stop, "--stop", "never")["text"])
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": ["red", "blue"]}')
    assert json.loads(str(answer(*ask, "--json-schema", schema)["text"])) in ("red", "blue")


def test_grounding_is_held_to_a_box_unless_asked_otherwise(bundle: Path, scene_png: Path) -> None:
    ask = (scene_png, "where is the circle?", "--bundle", bundle)
    assert parse_box(str(answer(*ask)["text"])) and not parse_box(
        str(answer(*ask, "--free")["text"])
    )


def test_a_second_command_finds_the_picture(
    bundle: Path, scene_png: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFMLLM_CACHE", str(tmp_path))
    first, second, third = (
        answer(scene_png, "describe", "--bundle", bundle, *extra)
        for extra in ((), (), ("--no-cache",))
    )
    assert first["tokens"] == second["tokens"] == third["tokens"]
    visions = [times["timings"]["vision"] for times in (first, second, third)]
    assert visions[0] > 0 and visions[1] == 0 and visions[2] > 0


def test_a_conversation_from_standard_input(bundle: Path, scene_png: Path) -> None:
    asked = (
        scene_png,
        "Hello.",
        "--chat",
        "--bundle",
        bundle,
        "--max-new-tokens",
        4,
        "--visual-tokens",
        4,
    )
    result = run(*asked, "--json", stdin=b"And then?\n\nReally?\n")
    turns = [json.loads(line) for line in result.stdout.splitlines()]
    assert (
        result.returncode == 0 and len(turns) == 3 and all(turn["task"] == "chat" for turn in turns)
    )
    assert (
        turns[0]["cached_tokens"] == 0
        and turns[1]["cached_tokens"] == turns[0]["prompt_tokens"] + 3
    )
    assert turns[2]["timings"]["vision"] == 0
    plain = run(*asked, stdin=b"And then?\n")
    assert plain.returncode == 0 and plain.stdout.decode().count(str(turns[1]["text"])) >= 1


def test_a_file_of_questions(bundle: Path, scene_png: Path, tmp_path: Path) -> None:
    (tmp_path / "scene.png").write_bytes(scene_png.read_bytes())
    questions = [
        {"image": "scene.png", "prompt": "describe"},
        {"image": "scene.png", "prompt": "circle", "task": "ground", "visual_tokens": 4},
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, questions)) + "\n\n")
    result = run("--batch", file, "--bundle", bundle)
    first, second = map(json.loads, result.stdout.splitlines())
    assert (
        result.returncode == 0
        and first["tokens"] == answer(scene_png, "describe", "--bundle", bundle)["tokens"]
    )
    assert second["visual_tokens"] == 4 and second["boxes"][0]["phrase"] == "circle"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "questions.jsonl:1 is not valid JSON"),
        ("[]", "expected an object with image and prompt"),
        ('{"image": "a.png"}', "expected an object with image and prompt"),
        (
            '{"image": "a.png", "prompt": "x", "beams": 2}',
            "expected an object with image and prompt",
        ),
        ('{"image": "a.png", "prompt": 3}', "prompt is 3, expected text"),
        ('{"image": "a.png", "prompt": "x", "visual_tokens": true}', "expected a whole number"),
        ('{"image": "absent.png", "prompt": "describe"}', "absent.png does not exist"),
        ("", "holds no questions"),
    ],
)
def test_bad_files_of_questions_give_one_line(
    bundle: Path, tmp_path: Path, line: str, message: str
) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text(line)
    result = run("--batch", file, "--bundle", bundle)
    assert (
        result.returncode == 1
        and result.stderr.count(b"\n") == 1
        and message in result.stderr.decode()
        and not result.stdout
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("IMAGE", "describe", "--beams", "many"), "expected a number or `published`"),
        (("IMAGE", "describe", "--beams", "99"), "expected 1 to 16"),
        (("IMAGE", "describe", "--top-p", "0.5"), "give a temperature above 0"),
        (("IMAGE", "describe", "--beams", "2", "--temperature", "1"), "exclude each other"),
        (("IMAGE", "describe", "--json-schema", "absent.json"), "cannot be read"),
        (("IMAGE", "--chat", "--batch", "x"), "exclude each other"),
        (("IMAGE", "--chat", "--draw", "x.png"), "leave it out with --chat"),
        (("IMAGE", "--chat", "--task", "vqa"), "exclude each other"),
        (("--chat",), "--chat needs an image"),
        (("IMAGE", "--batch", "x.jsonl"), "leave them out of the command line"),
        (("--batch", "x.jsonl", "--beams", "published"), "a number of beams with --batch"),
        (("IMAGE", "--self-test"), "leave the image out"),
        (("IMAGE", "describe", "--temperature", "1e-320"), "0.001 to 100"),
        (("IMAGE", "describe", "--temperature", "nan"), "0.001 to 100"),
    ],
)
def test_what_does_not_go_together_gives_one_line(
    bundle: Path, scene_png: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "x.jsonl").write_text('{"image": "a.png", "prompt": "x"}')
    given = [
        scene_png if a == "IMAGE" else tmp_path / a if a == "x.jsonl" else a for a in arguments
    ]
    result = run(*given, "--bundle", bundle)
    assert (
        result.returncode == 2
        and message in result.stderr.decode()
        and result.stderr.count(b"\n") == 1
    )


def test_a_missing_picture_is_found_before_any_is_answered(
    bundle: Path, scene_png: Path, tmp_path: Path
) -> None:
    file = tmp_path / "questions.jsonl"
    rows = [{"image": str(scene_png), "prompt": "describe"}] * 9 + [
        {"image": "absent.png", "prompt": "a\u2028b"}
    ]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    result = run("--batch", file, "--bundle", bundle)
    assert (
        result.returncode == 1
        and not result.stdout
        and "absent.png does not exist" in result.stderr.decode()
    )


def test_a_question_that_is_too_long_is_refused_everywhere(
    bundle: Path, scene_png: Path, tmp_path: Path
) -> None:
    long, said = "is it " + "very " * 60 + "red?", "has 63 words, expected at most 50"
    asked = [{"image": str(scene_png), "prompt": text} for text in ("is it red?", long)]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    for arguments in ((scene_png, long), ("--batch", tmp_path / "asked.jsonl")):
        result = run(*arguments, "--bundle", bundle)
        assert result.returncode == 1 and not result.stdout
        assert said in result.stderr.decode() and result.stderr.count(b"\n") == 1
    rows = [
        {"image": str(scene_png), "task": "vqa", "question": text, "answer": "yes"}
        for text in ("is it red?", long)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evaluate = ("runtime.evaluation.cli", bundle, tmp_path / "data.jsonl")
    strict, lenient = command(*evaluate), command(*evaluate, "--skip-bad", "--json")
    assert strict.returncode == 1 and f"data.jsonl:2: the question {long[:39]!r:.40}" in (
        strict.stderr.decode()
    )
    assert json.loads(lenient.stdout)["tasks"]["vqa"]["count"] == 1
    assert "left out 1 bad rows" in lenient.stderr.decode() and said in lenient.stderr.decode()


def test_a_turn_that_is_no_text_gives_one_line(bundle: Path, scene_png: Path) -> None:
    result = run(scene_png, "--chat", "--bundle", bundle, stdin=b"\xff\xfe\n")
    assert (
        result.returncode == 1
        and "not valid UTF-8" in result.stderr.decode()
        and result.stderr.count(b"\n") == 1
    )


def test_an_interrupt_ends_a_conversation_with_130(bundle: Path, scene_png: Path) -> None:
    code = "from runtime.cli.run import main; main()"
    command = [
        sys.executable,
        "-c",
        code,
        str(scene_png),
        "--chat",
        "--bundle",
        str(bundle),
        "--max-new-tokens",
        "3",
    ]
    heard = partial(
        signal.signal, signal.SIGINT, signal.default_int_handler
    )  # shells start background jobs deaf to it
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        preexec_fn=heard,
    )
    assert process.stdin and process.stdout
    process.stdin.write(b"Hello.\n")
    process.stdin.flush()
    process.stdout.readline()
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.strip().endswith(b"interrupted")
