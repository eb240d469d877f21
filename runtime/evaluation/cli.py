"""`infmllm-eval MODEL DATA`: scores a bundle (torch-free) or a checkpoint on a data
set, such as a jsonl file or held-out synthetic scenes.

The package that runs checkpoints must not be imported here. It registers an entry
point, and this module finds it by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image

from runtime.contract.bundle import MANIFEST
from runtime.contract.errors import DataError, UsageError
from runtime.data.bad_rows import Faults
from runtime.data.sample import Sample
from runtime.evaluation.evaluate import ANSWERERS, Answerer, evaluate, find_plugin, open_examples
from runtime.evaluation.html_report import report_page
from runtime.evaluation.metrics import METRIC_NAMES
from runtime.output.console import check_output, command_app, note, run_command, track

if TYPE_CHECKING:
    from runtime.session import Session

__all__ = ["BundleAnswerer", "main", "open_answerer"]

app = command_app("Measure the accuracy of a bundle or a checkpoint.")
_EXAMPLES = """
Examples:

    infmllm-eval infmllm-bundle synthetic:500

    infmllm-eval checkpoints/mine val.jsonl --json

    infmllm-eval infmllm-bundle voc:VOC2007,split=test --html report.html --control
"""


class BundleAnswerer:
    """Answers with a bundle's session; opens the session if a path is given."""

    def __init__(self, bundle: Path | Session, threads: int | None = None) -> None:
        if isinstance(bundle, Path):
            from runtime.session import load

            bundle = load(bundle, threads=threads)
        self.session = bundle

    def answer(self, image: Image.Image, sample: Sample, visual_tokens: int | None) -> str:
        """See `Answerer.answer`."""
        return self.session.answer_prompt(
            image, sample.prompt(), sample.task, sample.text, visual_tokens
        ).text


def open_answerer(path: Path) -> Answerer:
    """Opens the answerer of a bundle or a checkpoint, depending on the files in the
    folder. Raises `UsageError` if the folder is neither.
    """
    if (path / MANIFEST).exists():
        return BundleAnswerer(path)
    if (path / "config.json").exists():
        return find_plugin(ANSWERERS, "checkpoint")(path)  # type: ignore[no-any-return]
    raise UsageError(
        f"{path} is neither a bundle ({MANIFEST}) nor a checkpoint (config.json); check the path"
    )


@app.command(epilog=_EXAMPLES)
def run(
    model: Annotated[Path, typer.Argument(help="Bundle or checkpoint folder.")],
    data: Annotated[
        str,
        typer.Argument(
            help="A .jsonl file, synthetic[:COUNT], or NAME:PATH,option=value (coco, vqav2, "
            "refcoco, llava, voc)."
        ),
    ],
    visual_tokens: Annotated[
        int | None,
        typer.Option(help="Visual tokens per image. Default: the model's preferred number."),
    ] = None,
    control: Annotated[
        bool,
        typer.Option(
            "--control",
            help="Also score with blank images, to show how much the questions alone reveal.",
        ),
    ] = False,
    skip_bad: Annotated[
        bool,
        typer.Option(
            "--skip-bad", help="Skip and count invalid rows instead of stopping at the first."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write all answers to this .jsonl file.")] = None,
    html: Annotated[
        Path | None,
        typer.Option(help="Write an HTML page of images, answers and boxes, worst first."),
    ] = None,
) -> None:
    """Prints accuracy per task with its 95 % interval."""
    check_output(out)
    check_output(html)
    examples, answerer = open_examples(data, skip_bad), open_answerer(model)
    faults, shown = Faults(skip_bad), track(examples, len(examples), "answering")
    tasks, kinds, rows = evaluate(
        answerer, shown, visual_tokens, thumbnails=html is not None, faults=faults
    )
    if summary := faults.summary():
        note(summary)
    if not rows:
        raise DataError(f"data {data!r} has no samples left; check the file and its format")
    result: dict[str, Any] = {
        "model": model.name,
        "data": data,
        "visual_tokens": visual_tokens,
        "tasks": tasks.figures(),
        "kinds": kinds.figures(),
    }
    if control:
        blank, _, _ = evaluate(
            answerer,
            track(examples, len(examples), "answering without images"),
            visual_tokens,
            True,
            faults=Faults(skip_bad),
        )
        result["control"] = blank.figures()
    if out:
        out.write_text(
            "".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows)
        )
    if html:
        html.write_text(report_page(result, rows))
        note(f"wrote {html}")
    print(json.dumps(result) if as_json else format_result(result))


def format_result(result: dict[str, Any]) -> str:
    """Formats the figures as a text table."""
    lines = []
    for task, figures in result["tasks"].items():
        extra = f", mean IoU {figures['mean_iou']:.3f}" if "mean_iou" in figures else ""
        extra += f", CIDEr-D {figures['cider']:.1f}" if "cider" in figures else ""
        if "control" in result:
            extra += f", without images {result['control'][task]['accuracy']:.1f}"
        lines.append(
            f"{task:8} {_share(figures)} {METRIC_NAMES[task]} ({figures['count']:.0f} "
            f"samples{extra})"
        )
    lines += [
        f"  {kind:32} {_share(figures)} of {figures['count']:.0f}"
        for kind, figures in sorted(result["kinds"].items())
    ]
    return "\n".join(lines)


def _share(figures: dict[str, float]) -> str:
    return f"{figures['accuracy']:6.2f} % [{figures['low']:.1f}, {figures['high']:.1f}]"


def main() -> None:
    """Entry point of `infmllm-eval`."""
    run_command(app)
