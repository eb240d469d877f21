"""`infmllm-run IMAGE "describe"`: one picture, one question, the answer streamed to standard output.

Written with argparse where the other commands use typer: typer brings pydantic, 0.15 to 0.2 s of a command that should take half a second.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.contract.console import OneLineParser, check_output, note, positive, run_command
from runtime.contract.errors import ParityError, UsageError

if TYPE_CHECKING:
    from PIL import Image

    from runtime.session import Answer, Session

__all__ = ["main"]

DEFAULT_BUNDLE = "infmllm-bundle"
_EXAMPLES = """examples:
  infmllm-run photo.jpg "describe"
  infmllm-run photo.jpg "where is the red circle?" --draw found.png
  cat photo.jpg | infmllm-run - "how many circles are there?" --json
  infmllm-run --self-test --bundle my-bundle
"""


def default_bundle() -> Path:
    """`$INFMLLM_BUNDLE`, else ./infmllm-bundle."""
    return Path(os.environ.get("INFMLLM_BUNDLE") or DEFAULT_BUNDLE)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="infmllm-run", description="Ask a bundle about a picture.", epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("image", nargs="?", help="JPEG, PNG, WebP or BMP file; - reads standard input")
    add("prompt", nargs="?", help='what to ask, for example "describe"')
    add("--bundle", type=Path, help="bundle folder; default: $INFMLLM_BUNDLE, then ./infmllm-bundle")
    add("--task", default="auto", help="auto (default), caption, vqa, ground or chat")
    add("--visual-tokens", type=int, metavar="N", help="visual embeddings to use, fewer is faster; default: the model's best")
    add("--max-new-tokens", type=int, metavar="N", help="longest answer in tokens; default: the task's")
    add("--threads", type=positive, metavar="N", help="CPU threads; default: all available cores")
    add("--context", type=positive, metavar="N", help="rows of the key/value cache; default: the model's context")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add("--draw", type=Path, metavar="OUT.png", help="write the picture with the answer's boxes")
    add("--self-test", action="store_true", help="replay the bundle's golden inputs on this machine and compare")
    return parser


def run() -> None:
    """Answers one question about one picture, as the command line says."""
    given = _parser().parse_args()
    from runtime.contract.image import MAX_BYTES, open_image
    from runtime.session import load

    check_output(given.draw)
    session = load(given.bundle or default_bundle(), threads=given.threads, context=given.context)
    if session.bundle.verdict != "VERIFIED":
        note("warning: this bundle is UNVERIFIED: its build did not prove it equal to PyTorch")
    if given.self_test:
        _self_test(session, given.json)
        return
    if given.image is None or given.prompt is None:
        raise UsageError('give an image and a prompt, for example: infmllm-run photo.jpg "describe"')
    picture = sys.stdin.buffer.read(MAX_BYTES + 1) if given.image == "-" else given.image
    stream = session.stream(picture, given.prompt, given.task, given.visual_tokens, given.max_new_tokens)
    for piece in stream:
        if not given.json:
            print(piece, end="", flush=True)
    answer = stream.answer
    assert answer is not None, "a finished stream has its answer"
    if given.draw:
        _draw(open_image(picture), answer, given.draw)
    if given.json:
        print(json.dumps(_as_json(session, answer), ensure_ascii=False))
    else:
        print(flush=True)
        _summary(answer)


def _as_json(session: Session, answer: Answer) -> dict[str, Any]:
    data = asdict(answer)
    times = {"timings": {k: round(v, 3) for k, v in answer.timings.items()}, "step_ms": [round(v, 3) for v in answer.step_ms]}
    return data | {"tokens": list(answer.tokens), "verdict": session.bundle.verdict, **times}


def _summary(answer: Answer) -> None:
    for found in answer.boxes:
        note(f"box: {' '.join(f'{v:.0f}' for v in found.box)} (x1 y1 x2 y2, pixels){f'  {found.phrase}' if found.phrase else ''}")
    times = answer.timings
    stages = "  ".join(f"{name.replace('_', ' ')} {times[name]:.1f}" for name in ("decode_image", "preprocess", "vision", "prefill", "per_token"))
    note(f"{len(answer.tokens)} tokens, {answer.visual_tokens} visual, finish: {answer.finish_reason} | ms: {stages}")


def _draw(picture: Image.Image, answer: Answer, path: Path) -> None:
    from runtime.contract.draw import FOUND, draw_boxes

    try:
        draw_boxes(picture, ((found.box, FOUND, found.phrase) for found in answer.boxes)).save(path, format="PNG")
    except OSError as error:
        raise UsageError(f"cannot write {path} ({error.strerror}); choose another --draw file") from None


def _self_test(session: Session, as_json: bool) -> None:
    from runtime.selftest import replay

    stages = replay(session, session.bundle.tolerance)
    if as_json:
        print(json.dumps({"verdict": session.bundle.verdict, "stages": [asdict(s) | {"passed": s.passed} for s in stages]}))
    else:
        for stage in stages:
            print(f"{stage.stage:8} error {stage.error:.3g} (allowed {stage.tolerance:.3g}) {'ok' if stage.passed else 'FAILED'}")
    failed = [stage.stage for stage in stages if not stage.passed]
    if failed:
        raise ParityError(f"self-test: {', '.join(failed)} out of tolerance on this machine; rebuild the bundle here or report it")


def main() -> None:
    """Entry point of `infmllm-run`."""
    run_command(run)
