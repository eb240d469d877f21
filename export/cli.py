"""`infmllm-export`: imports weights, plans and builds bundles, compares them with
PyTorch, inspects them, and checks what this machine can run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from runtime.contract.bundle import default_bundle
from runtime.contract.errors import UsageError
from runtime.output.console import command_app, note, run_command

__all__ = ["main"]

app = command_app("Build bundles from InfMLLM checkpoints, and inspect them.")


@app.command(
    epilog="Examples:\n\n    infmllm-export build --precision int8"
    "\n\n    infmllm-export build checkpoints/mine --precision int4 --block 64 --calib "
    "train.jsonl -o mine.bundle"
    "\n\n    infmllm-export build checkpoints/mine --precision int4 --keep decoder.layers.0=int8 "
    "--calib train.jsonl"
)
def build(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder. Default: the demo checkpoint.")
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            help="fp32, fp16, int8, int8-static, int8-weights, int4, int4-hybrid, int4-all, or "
            "auto."
        ),
    ] = "int8",
    target: Annotated[
        str, typer.Option(help="Where the bundle runs: cpu, cuda, tensorrt or rtx.")
    ] = "cpu",
    out: Annotated[Path, typer.Option("--out", "-o", help="Bundle folder to write.")] = Path(
        "infmllm-bundle"
    ),
    calib: Annotated[
        str,
        typer.Option(
            help="Data for calibration and comparison, written as for infmllm-eval. Default: "
            "synthetic scenes, if the checkpoint was trained on them."
        ),
    ] = "",
    samples: Annotated[int, typer.Option(min=4, help="Number of calibration images.")] = 32,
    ranges: Annotated[
        str, typer.Option(help="Calibration of static ranges: min-max, percentile, mse or entropy.")
    ] = "mse",
    block: Annotated[
        int | None,
        typer.Option(
            help="Block size of 4-bit weights (inputs that share a scale): 16 to 256. Default: set "
            "by the precision."
        ),
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(help="Rounding of 4-bit weights: nearest, mse or gptq. Default: gptq."),
    ] = None,
    kv: Annotated[
        str | None,
        typer.Option(help="Keys and values (cpu): fp32 or int8. Default: fp32; fp16 on GPUs."),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help="BLOCK=SCHEME: another precision for one block, such as decoder.layers.0=fp16. "
            "Repeatable."
        ),
    ] = None,
    max_drop: Annotated[
        float, typer.Option(help="With auto: most points that --metric may lose.")
    ] = 0.5,
    metric: Annotated[
        str,
        typer.Option(
            help="With auto: accuracy to keep (mean, caption, vqa, ground or chat), or same: the "
            "share of unchanged answers."
        ),
    ] = "mean",
    auto_questions: Annotated[
        int, typer.Option(min=1, help="With auto: images that each candidate is tested on.")
    ] = 150,
    questions: Annotated[
        int,
        typer.Option(
            min=0, help="Images on which answers are compared with PyTorch's; 0: skip this check."
        ),
    ] = 16,
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="tensorrt, rtx: key/value cache length in tokens. Default: the model's."
        ),
    ] = None,
    dump: Annotated[
        Path | None, typer.Option(help="Folder for each graph after each step, for debugging.")
    ] = None,
    allow_unverified: Annotated[
        bool,
        typer.Option(
            "--allow-unverified", help="Keep a bundle that fails parity, marked UNVERIFIED."
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Build even if the plan needs more than is free here."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Builds a bundle from a checkpoint: exports and quantises its graphs, and compares
    the result with PyTorch.
    """
    from export.commands import run_auto, run_build
    from export.mixed_precision import Budget
    from export.schemes import TARGET_SCHEMES, choose_scheme
    from export.state import BuildOptions
    from trainer.checkpoint import DEMO

    if precision == "auto" and (block or rounding):
        raise UsageError(
            "--precision auto chooses blocks and rounding itself; leave out --block and --rounding"
        )
    if precision == "auto" and target in TARGET_SCHEMES and not TARGET_SCHEMES[target].auto:
        raise UsageError(
            f"--precision auto works only with --target cpu; choose another --precision for "
            f"{target}"
        )
    scheme = choose_scheme(
        "int4-all" if precision == "auto" else precision, block, rounding, kv, keep or [], target
    )
    options = BuildOptions(
        checkpoint or DEMO,
        scheme,
        target,
        out,
        dump,
        allow_unverified,
        calib,
        samples,
        ranges,
        questions,
        context,
        force,
    )
    if precision == "auto":
        run_auto(options, Budget(max_drop, metric, auto_questions), as_json)
    else:
        run_build(options, as_json)


@app.command(epilog="Example:\n\n    infmllm-export parity infmllm-bundle")
def parity(
    bundle: Annotated[
        Path | None,
        typer.Argument(help="Bundle folder. Default: $INFMLLM_BUNDLE, then ./infmllm-bundle."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help="Checkpoint it was built from. Default: the demo checkpoint."),
    ] = None,
    cases: Annotated[int, typer.Option(min=1, help="Number of new inputs to compare.")] = 8,
    calib: Annotated[
        str,
        typer.Option(help="Data for inputs and questions. Default: synthetic, if trained on it."),
    ] = "",
    questions: Annotated[
        int, typer.Option(min=0, help="Images on which answers are compared; 0: skip this check.")
    ] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Proves that a finished bundle is its checkpoint's: stored tensors, graphs,
    users' calls, answers. Exit code 1 with the place of a fault if it is not.
    """
    from export.commands import ParityOptions, run_parity
    from trainer.checkpoint import DEMO

    options = ParityOptions(cases, questions, calib, as_json=as_json)
    run_parity(bundle or default_bundle(), checkpoint or DEMO, options)


@app.command(
    epilog="Examples:\n\n    infmllm-export plan --preset 7b --precision int4 --device "
    "orin-nano-8gb"
    "\n\n    infmllm-export plan checkpoints/mine --precision int8 --context 512 --json"
)
def plan(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            help="Checkpoint folder (only its config.json is read). Default: the demo checkpoint."
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Model size, instead of a checkpoint: nano, edge or 7b.")
    ] = None,
    precision: Annotated[
        str, typer.Option(help="A --precision of build, except auto. Default: all.")
    ] = "",
    target: Annotated[
        str, typer.Option(help="Where the bundle runs: cpu, cuda, tensorrt or rtx.")
    ] = "cpu",
    device: Annotated[
        str | None,
        typer.Option(
            help="orin-nano-8gb, orin-agx-64gb, rtx4090 or a JSON file. Default: this machine."
        ),
    ] = None,
    block: Annotated[int | None, typer.Option(help="Block size of 4-bit weights.")] = None,
    kv: Annotated[
        str | None,
        typer.Option(help="Keys and values (cpu): fp32 or int8. Default: fp32; fp16 on GPUs."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="Length of the key/value cache in tokens. Default: the model's."),
    ] = None,
    samples: Annotated[int, typer.Option(min=4, help="Calibration images of the build.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Predicts disk use, memory and latency from the model's shape alone, within
    seconds. Reports what does not fit and what to change.
    """
    from export.commands import run_plan

    run_plan(checkpoint, preset, precision, target, device, block, kv, context, samples, as_json)


@app.command(
    epilog="Examples:\n\n    infmllm-export inspect infmllm-bundle --json\n\n    infmllm-export "
    "inspect infmllm-bundle --html bundle.html"
)
def inspect(
    bundle: Annotated[
        Path | None,
        typer.Argument(help="Bundle folder. Default: $INFMLLM_BUNDLE, then ./infmllm-bundle."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check the hash of every file again.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Write an HTML page with a diagram of the blocks.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Shows a bundle's operators, parameters, sizes, precision per block, parity, and
    the changes that could not be applied.
    """
    from export.inspection.describe import describe_bundle, format_description
    from export.inspection.html_picture import block_page
    from runtime.contract.bundle import read_bundle
    from runtime.output.console import check_output

    check_output(html)
    opened = read_bundle(bundle or default_bundle())
    opened.verify() if verify else opened.verify_once()
    description = describe_bundle(opened)
    if html:
        html.write_text(block_page(description))
    print(json.dumps(description) if as_json else format_description(description))


@app.command(
    "import",
    epilog="Examples:\n\n    infmllm-export import InfMLLM_7B.pth --tokenizer vicuna-7b-v1.5 -o "
    "checkpoints/infmllm-7b"
    "\n\n    infmllm-export import vicuna-7b-v1.5 --vision blip2-vision --image-size 448 -o "
    "checkpoints/start",
)
def import_(
    source: Annotated[
        Path,
        typer.Argument(
            help="Raw InfMLLM file (.pth, .bin, .safetensors), or a LLaMA folder in Hugging Face "
            "layout."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Checkpoint folder to write.")],
    vision: Annotated[
        Path | None,
        typer.Option(help="Vision tower: raw BLIP-2/EVA file or a Hugging Face BLIP-2 folder."),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Folder or file with tokenizer.json. Default: beside the source."),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Image side in pixels; resizes position embeddings. Default: the tower's."
        ),
    ] = None,
    image_mode: Annotated[
        str, typer.Option(help="Fit to a square: stretch (multitask models) or pad (chat).")
    ] = "stretch",
    vision_heads: Annotated[
        int | None,
        typer.Option(min=1, help="Attention heads of a raw tower, unless it is EVA ViT-g."),
    ] = None,
    decoder_heads: Annotated[
        int | None,
        typer.Option(min=1, help="Attention heads of a raw decoder, unless heads are 128 wide."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Weight type: fp16, bf16 or fp32.")] = "fp16",
) -> None:
    """Converts published InfMLLM or Hugging Face weights into a checkpoint. Unknown or
    missing tensors are errors.
    """
    from trainer.imports.convert import ImportOptions, import_checkpoint

    options = ImportOptions(
        source, out, vision, tokenizer, image_size, vision_heads, decoder_heads, image_mode, dtype
    )
    spec, new = import_checkpoint(options)
    if new:
        parts = ", ".join(sorted({name.rsplit(".", 2)[0] for name in new}))
        note(
            f"initialised at random, because the source has no weights for it: {parts}; train it "
            f"with: infmllm-train --start-from {out} --stage alignment"
        )
    tower, decoder = spec.vision, spec.decoder
    print(
        f"{out}: tower {tower.layers} x {tower.width}, decoder {decoder.layers} x "
        f"{decoder.hidden}, S = {tower.image_size}"
    )


@app.command(
    epilog="Examples:\n\n    infmllm-export doctor\n\n    infmllm-export doctor --target tensorrt "
    "--html doctor.html"
    "\n\n    infmllm-export doctor --json"
)
def doctor(
    target: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, tensorrt or rtx. Default: cpu, the GPU targets whose packages are "
            "installed, and tensorrt on a Jetson."
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write an HTML page.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Checks GPU, driver, CUDA, TensorRT, ONNX Runtime, JetPack, memory and power mode.
    Reports a cause and a fix for each problem.

    Exit code 1 if the target cannot run on this machine.
    """
    from runtime.contract.errors import EngineError
    from runtime.doctor.checks import choose_targets, diagnose
    from runtime.doctor.facts import gather
    from runtime.doctor.report import diagnosis_json, diagnosis_page, diagnosis_text, verdict
    from runtime.output.console import check_output

    check_output(html)
    facts = gather()
    diagnosis = diagnose(facts, choose_targets(facts, target))
    if html:
        html.write_text(diagnosis_page(facts, diagnosis))
    print(diagnosis_json(facts, diagnosis) if as_json else diagnosis_text(facts, diagnosis))
    if diagnosis.problems:
        raise EngineError(f"{verdict(diagnosis)}; apply the fixes, then run the doctor again")


def main() -> None:
    """Entry point of `infmllm-export`."""
    run_command(app)
