"""`infmllm-eval MODEL DATA`: scores a bundle (torch-free) or a checkpoint on a jsonl file or on held-out synthetic scenes.

Checkpoints are answered by a package this one must not import; it registers itself as an entry point and is found by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from runtime.contract.bundle import MANIFEST
from runtime.contract.console import check_output, command_app, run_command, track
from runtime.contract.errors import UsageError
from runtime.contract.evaluation import ANSWERERS, Answerer, evaluate, find_plugin, open_examples
from runtime.contract.metrics import METRIC_NAMES
from runtime.contract.sample import Sample

__all__ = ["BundleAnswerer", "main", "open_answerer"]

app = command_app("Score a bundle or a checkpoint.")
_EXAMPLES = """
Examples:

    infmllm-eval infmllm-bundle synthetic:500

    infmllm-eval checkpoints/mine val.jsonl --json
"""


class BundleAnswerer:
    """Answers with a bundle's session."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        from runtime.session import load

        self.session = load(path, threads=threads)

    def answer(self, image: Image.Image, sample: Sample, visual_tokens: int | None) -> str:
        """See `Answerer.answer`."""
        return self.session.answer_prompt(image, sample.prompt(), sample.task, sample.text, visual_tokens).text


def open_answerer(path: Path) -> Answerer:
    """A bundle's or a checkpoint's answerer, by what the folder holds. Raises `UsageError` if it is neither."""
    if (path / MANIFEST).exists():
        return BundleAnswerer(path)
    if (path / "config.json").exists():
        return find_plugin(ANSWERERS, "checkpoint")(path)  # type: ignore[no-any-return]
    raise UsageError(f"{path} is neither a bundle ({MANIFEST}) nor a checkpoint (config.json); check the path")


@app.command(epilog=_EXAMPLES)
def run(
    model: Annotated[Path, typer.Argument(help="Bundle or checkpoint folder.")],
    data: Annotated[str, typer.Argument(help="A .jsonl file, or synthetic[:COUNT] for held-out scenes.")],
    visual_tokens: Annotated[int | None, typer.Option(help="Visual embeddings per image. Default: the model's best.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write every answer to this jsonl file.")] = None,
) -> None:
    """Prints accuracy per task."""
    check_output(out)
    examples = open_examples(data)
    tasks, kinds, rows = evaluate(open_answerer(model), track(examples, len(examples), "answering"), visual_tokens)
    if out:
        out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    if as_json:
        print(json.dumps({"tasks": tasks.figures(), "kinds": kinds.figures()}))
        return
    for task, figures in tasks.figures().items():
        extra = f", mean IoU {figures['mean_iou']:.3f}" if "mean_iou" in figures else ""
        print(f"{task:8} {figures['accuracy']:6.2f} % {METRIC_NAMES[task]} ({figures['count']:.0f} samples{extra})")
    for kind, figures in sorted(kinds.figures().items()):
        print(f"  {kind:16} {figures['accuracy']:6.2f} % of {figures['count']:.0f}")


def main() -> None:
    """Entry point of `infmllm-eval`."""
    run_command(app)
