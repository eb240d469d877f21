"""`infmllm-run IMAGE "describe"`: asks one question about one image and streams the
answer to standard output.

This command uses argparse where the other commands use typer. Typer imports pydantic,
which costs 0.15 to 0.2 s in a command that should take half a second.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.cli.decoding_options import add_decoding, decoding_of
from runtime.contract.errors import ParityError, PromptError, UsageError
from runtime.output.console import OneLineParser, check_output, note, positive, run_command, track

if TYPE_CHECKING:
    from PIL import Image

    from runtime.generation.decoding import Decoding
    from runtime.questions import Answer, Stream
    from runtime.session import Session

__all__ = ["SAMPLE_IMAGE", "main"]

SAMPLE_IMAGE = Path(__file__).parents[1] / "demo" / "sample.png"
"""A scene of coloured shapes, which the demo checkpoint knows."""

_EXAMPLES = """first steps:
  pip install 'infmllm-edge[export]'            # brings PyTorch, which building a bundle needs
  infmllm-export build --precision int8         # the demo checkpoint, into ./infmllm-bundle
  infmllm-run --demo                            # describes the sample image

examples:
  infmllm-run photo.jpg "describe"
  infmllm-run photo.jpg "where is the red circle?" --draw found.png
  cat photo.jpg | infmllm-run - "how many circles are there?" --json
  infmllm-run photo.jpg "describe" --beams published
  infmllm-run photo.jpg "describe" --temperature 0.8 --top-p 0.9 --seed 1 --stop "."
  infmllm-run photo.jpg "describe" --json-schema scene.schema.json
  infmllm-run photo.jpg --chat
  infmllm-run --batch questions.jsonl > answers.jsonl
  infmllm-run --self-test --bundle my-bundle
"""


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="infmllm-run",
        description="Answer questions about images with a bundle.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("image", nargs="?", help="JPEG, PNG, WebP or BMP file; - reads standard input")
    add("prompt", nargs="?", help='question or instruction, for example "describe"')
    add("--demo", action="store_true", help="use the sample image that comes with this package")
    add(
        "--bundle", type=Path, help="bundle folder; default: $INFMLLM_BUNDLE, then ./infmllm-bundle"
    )
    add("--task", default="auto", help="task: auto (default), caption, vqa, ground or chat")
    add(
        "--visual-tokens",
        type=int,
        metavar="N",
        help="number of visual tokens; fewer is faster; default: the model's preferred number",
    )
    add(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="maximum length of the answer in tokens; default: depends on the task",
    )
    add_decoding(parser)
    add(
        "--chat",
        action="store_true",
        help="chat about the image: each line of standard input is one message",
    )
    add(
        "--batch",
        type=Path,
        metavar="FILE.jsonl",
        help='answer a file of questions, one {"image": …, "prompt": …} per line; prints one JSON '
        "object per line, in the same order",
    )
    add(
        "--no-cache",
        action="store_true",
        help="do not cache image embeddings on disk for later questions about the same image",
    )
    add("--threads", type=positive, metavar="N", help="CPU threads; default: all available cores")
    add(
        "--context",
        type=positive,
        metavar="N",
        help="length of the key/value cache in tokens; default: the model's context",
    )
    add("--json", action="store_true", help="print one JSON object instead of text")
    add(
        "--draw",
        type=Path,
        metavar="OUT.png",
        help="write the image with the boxes of the answer drawn on it",
    )
    add(
        "--self-test",
        action="store_true",
        help="run the bundle's golden cases on this machine and compare with PyTorch's results",
    )
    return parser


def run() -> None:
    """Loads the bundle and runs the mode that the command line selects."""
    given = _parser().parse_args()
    if given.demo:
        _use_demo(given)
    mode = _mode(given)
    check_output(given.draw)
    decoding = decoding_of(given, given.prompt or "")
    from runtime.contract.bundle import default_bundle
    from runtime.generation.image_cache import DISK_BYTES
    from runtime.session import load

    cache = 0 if given.no_cache or given.self_test else DISK_BYTES
    session = load(
        given.bundle or default_bundle(),
        threads=given.threads,
        context=given.context,
        image_cache=cache,
    )
    if session.bundle.verdict != "VERIFIED":
        note("warning: this bundle is UNVERIFIED: it did not pass the comparison with PyTorch")
    mode(session, given, decoding)


def _use_demo(given: argparse.Namespace) -> None:
    """Takes the sample image; one argument alone is then the prompt. Raises `UsageError`."""
    if given.prompt is not None:
        raise UsageError("--demo uses its own sample image; give only a prompt")
    given.image, given.prompt = str(SAMPLE_IMAGE), given.image
    if given.prompt is None and not given.chat:
        given.prompt = "describe"


def _mode(given: argparse.Namespace) -> Callable[[Session, argparse.Namespace, Decoding], None]:
    """Returns the function of the selected mode. Raises `UsageError` if options exclude
    each other or are missing.
    """
    modes = {
        "--self-test": given.self_test,
        "--chat": given.chat,
        "--batch": given.batch is not None,
    }
    chosen = [name for name, on in modes.items() if on]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} exclude each other; choose one")
    if chosen and given.draw:
        raise UsageError(f"--draw needs a single answer; leave it out with {chosen[0]}")
    if given.self_test:
        if given.image is not None:
            raise UsageError("--self-test uses the bundle's golden cases; leave the image out")
        return _self_test
    if given.batch is not None:
        if given.image is not None:
            raise UsageError(
                "--batch reads images and prompts from its file; leave them out of the command line"
            )
        return _batch
    if given.chat:
        if given.image is None or given.image == "-":
            raise UsageError(
                "--chat needs an image file, for example: infmllm-run photo.jpg --chat"
            )
        if given.task not in ("auto", "chat"):
            raise UsageError(f"--chat and --task {given.task} exclude each other; leave --task out")
        given.task = "chat"
        return _chat
    if given.image is None or given.prompt is None:
        raise UsageError(
            'give an image and a prompt, for example: infmllm-run photo.jpg "describe"'
        )
    return _one


def _one(session: Session, given: argparse.Namespace, decoding: Decoding) -> None:
    from runtime.contract.image import MAX_BYTES, open_image

    picture = sys.stdin.buffer.read(MAX_BYTES + 1) if given.image == "-" else given.image
    stream = session.stream(
        picture, given.prompt, given.task, given.visual_tokens, given.max_new_tokens, decoding
    )
    answer = _show(session, stream, given.json)
    if given.draw:
        _draw(open_image(picture), answer, given.draw)
    if not given.json:
        _summary(answer)


def _show(session: Session, stream: Stream, as_json: bool) -> Answer:
    """Prints an answer, either as it is generated or as JSON, and returns it."""
    try:
        for piece in stream:
            if not as_json:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not as_json:
            print(flush=True)  # ends the line of the partial answer
        raise
    answer = stream.finish()
    print(_as_json(session, answer) if as_json else "", flush=True)
    return answer


def _chat(session: Session, given: argparse.Namespace, decoding: Decoding) -> None:
    chat = session.chat(given.image, given.visual_tokens, decoding)
    asked = iter([given.prompt]) if given.prompt else iter(())
    while True:
        text = next(asked, None) or _next_line()
        if text is None:
            return
        if text.strip():
            answer = _show(session, chat.stream(text, given.max_new_tokens), given.json)
            if sys.stderr.isatty():
                _summary(answer)


def _next_line() -> str | None:
    """Returns the next line of standard input, or None at its end."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.buffer.readline()
    try:
        return line.decode() if line else None
    except UnicodeDecodeError as error:
        raise PromptError(
            f"the message is not valid UTF-8 at byte {error.start}; enter it as UTF-8"
        ) from None


def _batch(session: Session, given: argparse.Namespace, decoding: Decoding) -> None:
    from runtime.cli.question_file import read_questions
    from runtime.generation.batch import BATCH_SIZE

    questions = read_questions(given.batch, given.task, given.visual_tokens, given.max_new_tokens)
    for question in questions:
        session.check(question, decoding)
    waves = [
        questions[start : start + BATCH_SIZE] for start in range(0, len(questions), BATCH_SIZE)
    ]
    for wave in track(waves, len(waves), "answering"):
        for answer in session.ask_many(wave, decoding):
            print(_as_json(session, answer), flush=True)


def _as_json(session: Session, answer: Answer) -> str:
    times = {stage: round(value, 3) for stage, value in answer.timings.items()}
    data = asdict(answer) | {
        "verdict": session.bundle.verdict,
        "timings": times,
        "step_ms": [round(value, 3) for value in answer.step_ms],
    }
    return json.dumps(data, ensure_ascii=False)


def _summary(answer: Answer) -> None:
    for found in answer.boxes:
        note(
            f"box: {' '.join(f'{v:.0f}' for v in found.box)} (x1 y1 x2 y2, "
            f"pixels){f'  {found.phrase}' if found.phrase else ''}"
        )
    times = answer.timings
    stages = "  ".join(
        f"{name.replace('_', ' ')} {times[name]:.1f}"
        for name in ("decode_image", "preprocess", "vision", "prefill", "per_token")
    )
    cached = (
        f" {answer.cached_tokens} of {answer.prompt_tokens} prompt tokens from the cache,"
        if answer.cached_tokens
        else ""
    )
    note(
        f"{len(answer.tokens)} tokens, {answer.visual_tokens} visual,{cached} finish: "
        f"{answer.finish_reason} | ms: {stages}"
    )


def _draw(picture: Image.Image, answer: Answer, path: Path) -> None:
    from runtime.output.draw_boxes import FOUND, draw_boxes

    try:
        draw_boxes(picture, ((found.box, FOUND, found.phrase) for found in answer.boxes)).save(
            path, format="PNG"
        )
    except OSError as error:
        raise UsageError(
            f"cannot write {path} ({error.strerror}); choose another --draw file"
        ) from None


def _self_test(session: Session, given: argparse.Namespace, decoding: Decoding) -> None:

    stages = session.replay()
    if given.json:
        print(
            json.dumps(
                {
                    "verdict": session.bundle.verdict,
                    "stages": [asdict(s) | {"passed": s.passed} for s in stages],
                }
            )
        )
    else:
        for stage in stages:
            print(
                f"{stage.stage:8} error {stage.error:.3g} (allowed {stage.tolerance:.3g}) "
                f"{'ok' if stage.passed else 'FAILED'}"
            )
    failed = [stage.stage for stage in stages if not stage.passed]
    if failed:
        raise ParityError(
            f"self-test: {', '.join(failed)} out of tolerance on this machine; rebuild the bundle "
            f"here or report it"
        )


def main() -> None:
    """Entry point of `infmllm-run`."""
    run_command(run)
